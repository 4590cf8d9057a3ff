"""What can be checked on a machine with a GPU; see README.md."""
