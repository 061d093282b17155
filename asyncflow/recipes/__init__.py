"""Complete runs, each a short readable file."""
