"""Adapters behind the rollout and training ports."""
