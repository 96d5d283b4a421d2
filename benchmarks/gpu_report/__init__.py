"""One page on what works on a GPU and how fast (docs/gpu-report.md).

``stages.py`` is the table of what is measured, ``runner.py`` gives each stage a process and a deadline, the modules
named in the table measure, ``results.py`` keeps what was found, ``targets.py`` is what is to be reached, ``page.py``
shows both, and ``published.py`` puts them into README.md, docs/status.md and benchmarks/README.md.
"""
