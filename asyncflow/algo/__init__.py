"""Pure algorithms: advantages, aggregation, losses, samples from groups."""
