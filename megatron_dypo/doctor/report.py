"""``doctor``: print the findings as a table, and run the self-test."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from megatron_dypo.doctor import selftest
from megatron_dypo.doctor.findings import BAD, GOOD, NOTE, Finding, Machine, examine, this_machine
from megatron_dypo.monitor.progress import default_console

_COLOURS = {GOOD: "#35c99b", BAD: "#e5484d"}


def doctor(with_selftest: bool) -> int:
    """Print the findings; return 1 if something is wrong, else 0."""
    machine = this_machine()
    findings = all_findings(machine)
    if with_selftest and not any(each.verdict == BAD for each in findings):
        passed, says = selftest.run(machine.devices)
        findings.append(Finding("self-test", GOOD if passed else BAD, "passed" if passed else "failed", says))
    _show(findings)
    wrong = sum(each.verdict == BAD for each in findings)
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return int(wrong > 0)


def all_findings(machine: Machine) -> list[Finding]:
    """Return the findings on packages and settings and, with CUDA, on what accelerates the policy's layers."""
    return examine(machine) + (_accelerations() if machine.cuda else [])


def _accelerations() -> list[Finding]:
    """Return which accelerations the policy's layers use on the first device."""
    import torch

    from megatron_dypo.policy.accelerations import explained

    lines = explained(capability=torch.cuda.get_device_capability())
    return [
        Finding(line.name, GOOD if line.in_use else NOTE, "in use" if line.in_use else "not used", line.why)
        for line in lines
    ]


def _show(findings: list[Finding]) -> None:
    console = default_console()
    if not console.is_terminal:
        for each in findings:
            mend = f"   -> {each.mend}" if each.mend else ""
            print(f"{each.verdict:5}  {each.name:18} {each.found:24} {each.says}{mend}".rstrip())
        return
    table = Table(border_style="dim", show_header=False)
    for each in findings:
        verdict = Text(each.verdict, style=_COLOURS.get(each.verdict, "yellow"))
        says = Text(each.says)
        if each.mend:
            says.append(f"\n{each.mend}" if each.says else each.mend, style="bold")
        table.add_row(verdict, each.name, each.found, says)
    console.print(table)
