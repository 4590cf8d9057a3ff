"""What starts workers: this machine, several, Slurm, Kubernetes. Never imports torch: its commands answer at once."""
