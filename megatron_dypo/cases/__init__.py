"""One update's loss without a model: a case of log-probs and rewards, put through the code that trains."""
