"""Turn published data sets, and answers of teachers behind an API, into the training rows of ``data/rows.py``.

sources (files, hub) --formats--> Item --filters (answer, proof, overlap, length)--> store: problems
                                        └─ traces --complete, short enough, verified--> store: traces --> output rows

``prepare.py`` reads in this order; the store (SQLite, next to the output) holds everything that a kill must not lose.
``teachers.py`` asks OpenAI-compatible endpoints (``endpoint.py``) for traces, which ``prepare`` then merges.
"""
