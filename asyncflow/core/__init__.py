"""The nouns, the ports, the configuration, the errors and the world outside."""
