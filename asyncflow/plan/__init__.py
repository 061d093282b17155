"""Virtual time: the real loop, simulated."""
