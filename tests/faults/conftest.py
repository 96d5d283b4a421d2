"""What the fault tests share: uninterrupted runs, and a record of what they count, shown at the end."""

import pytest

from tests.faults.submit import submit  # noqa: F401 - a fixture

pytest.register_assert_rewrite("tests.faults.job", "tests.faults.kills", "tests.faults.outcome")
_lines: list[str] = []


@pytest.fixture
def fault_record(record_property):
    """Call it with a line for the report."""

    def record(line: str) -> None:
        _lines.append(line)
        record_property("faults", line)

    return record


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Where ``task.reference`` keeps the uninterrupted runs."""
    return tmp_path_factory.mktemp("references")


def pytest_terminal_summary(terminalreporter):
    if _lines:
        terminalreporter.section("faults")
        for line in _lines:
            terminalreporter.write_line(line)
