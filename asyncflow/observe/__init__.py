"""The run folder, written and read back; live progress."""
