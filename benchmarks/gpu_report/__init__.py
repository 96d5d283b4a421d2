"""Report on one page what works on a GPU and how fast (docs/gpu-report.md).

``stages.py`` is the table of measurements, ``runner.py`` gives each stage a process and a deadline, the modules named
in the table measure, ``results.py`` stores the findings, ``targets.py`` holds the targets, ``page.py`` shows both, and
``published.py`` copies them into README.md, docs/status.md and benchmarks/README.md.
"""
