"""Turn graded groups into optimizer updates.

Two passes make every token's gradient local: the log-prob pass (old policy, reference) yields each response's sums, the
coefficients follow from one small exchange, and the training pass needs no other token. One packing plan serves all
passes, so the first ratio is exactly 1.
"""
