"""Sampling from the policy: engines behind one interface, recorded and replayed rollouts."""
