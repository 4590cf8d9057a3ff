"""A node of a job on several machines: torchrun's agent, with the workers' own exit codes passed on."""
