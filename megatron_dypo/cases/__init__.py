"""Compute one update's loss without a model: a case of log-probs and rewards goes through the training code."""
