"""The command `asyncflow`."""
