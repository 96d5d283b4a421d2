"""Measure how good the policy is on held-out prompts."""
