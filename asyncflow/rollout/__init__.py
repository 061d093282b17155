"""Rollouts: the chat through which an agent talks to the policy, groups, rewards."""
