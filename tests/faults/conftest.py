"""Shared by the fault tests: uninterrupted runs, and a record of their counts, shown at the end."""

import pytest

from tests.faults.submit import submit  # noqa: F401 - a fixture

pytest.register_assert_rewrite("tests.faults.job", "tests.faults.kills", "tests.faults.outcome")
_lines: list[str] = []


@pytest.fixture
def fault_record(record_property):
    """Return a function that adds a line to the report."""

    def record(line: str) -> None:
        _lines.append(line)
        record_property("faults", line)

    return record


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Return the folder in which ``task.reference`` keeps the uninterrupted runs."""
    return tmp_path_factory.mktemp("references")


def pytest_terminal_summary(terminalreporter):
    if _lines:
        terminalreporter.section("faults")
        for line in _lines:
            terminalreporter.write_line(line)
