"""Run one stage in this process (with ``--tiny``, the stages of a part in sequence).

python -m benchmarks.gpu_report.child FOLDER COMMIT TINY STAGE...

Writes FOLDER/STAGE.json. An exception in a stage ends the process, and the runner reports it.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import psutil

from benchmarks.gpu_report.hardware import here, versions
from benchmarks.gpu_report.results import Record
from benchmarks.gpu_report.stages import STAGES

BEGAN = psutil.Process().create_time()  # seconds since the epoch


def main() -> None:
    folder, commit, tiny, *names = sys.argv[1:]
    began = BEGAN
    for name in names:
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        about = {"commit": commit, "date": date, "versions": versions(), "hardware": here()}
        stage = STAGES[name]
        record = Record(Path(folder) / f"{name}.json", stage.options, tiny == "yes", began, about)
        stage.function(record)
        began = record.finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a library that hangs or aborts at exit does not affect the findings


if __name__ == "__main__":
    main()
