"""`python -m disttrain_launch` is the command `disttrain`."""

from disttrain_launch.cli import main

main(prog_name="disttrain")
