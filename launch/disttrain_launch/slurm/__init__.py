"""Jobs on a Slurm cluster: a batch script as a value, and one small function that submits it."""
