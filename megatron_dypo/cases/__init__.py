"""One update's loss without a model: a case of log-probs and rewards, run through the training code."""
