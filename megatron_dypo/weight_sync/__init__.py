"""Synchronise weights from the policy to the rollout engine, after every update."""
