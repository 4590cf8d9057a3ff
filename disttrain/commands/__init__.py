"""The commands that work on runs and checkpoints, each as `python -m disttrain.commands.NAME`."""
