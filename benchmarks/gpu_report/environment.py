"""Record what is installed, as ``doctor`` sees it, and run the tests that need a GPU."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu_report.results import Record
from benchmarks.machine import ROOT
from megatron_dypo.doctor.findings import BAD, this_machine
from megatron_dypo.doctor.report import all_findings


def environment(record: Record) -> None:
    """Record the packages; a broken one fails the stage, because later figures may mean nothing."""
    findings = all_findings(this_machine())
    rows = [[each.verdict, each.name, each.found, each.says, each.mend] for each in findings]
    record.table("`python -m megatron_dypo doctor --no-selftest`", ["", "", "found", "", "to mend it"], rows)
    wrong = [each.name for each in findings if each.verdict == BAD]
    record.figure("wrong", len(wrong), "", "findings that are wrong")
    if wrong:
        record.fail(f"doctor finds wrong: {', '.join(wrong)}")


class _Counter:
    """A pytest plugin that counts tests by outcome and updates the record after each."""

    def __init__(self, record: Record):
        self._record, self._began = record, time.perf_counter()
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.failed:
                last = str(report.longrepr).strip().splitlines()[-1]
                self._record.note(f"failed: `{report.nodeid}`: {last}")
                self._record.fail(report.nodeid)
            self._record.figure(report.outcome, self.counts[report.outcome], "", f"tests {report.outcome}")
            self._record.figure("seconds", time.perf_counter() - self._began, "s", "time of the tests")


def tests(record: Record) -> None:
    """Run tests/test_gpu.py in this process; without CUDA all of it is skipped."""
    counter = _Counter(record)
    code = pytest.main([str(ROOT / "tests/test_gpu.py"), "-m", "gpu", "-p", "no:cacheprovider"], plugins=[counter])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record.fail(f"pytest ended with {pytest.ExitCode(code).name}")
