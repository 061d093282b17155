"""The main loop and what surrounds it: stages, evaluation, checkpoint and resume."""
