"""Hold each folder to its number of type errors: `python tools/type_ratchet.py [--lower]` (`make types`).

mypy checks the package as pyproject.toml says. ``tools/type_errors.json`` has the number of errors of each folder, and
of each top-level module, that is not yet clean; all others must have none. A number that rises is exit code 1, with the
errors; a number that falls is reported, and ``--lower`` records it. No option raises a number. The numbers hold for the
versions in requirements/cpu.txt.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ALLOWED = Path("tools/type_errors.json")  # relative to the repository root
ERROR = re.compile(r"(?P<path>[^:\n]+\.py):\d+(:\d+)?: error: ")


def place(path: str) -> str:
    """Return the folder within the package, or the top-level module."""
    return "/".join(Path(path).parts[:2])


def by_place(output: str) -> dict[str, list[str]]:
    """Return mypy's error lines, by place."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in output.splitlines():
        if error := ERROR.match(line):
            found[place(error["path"])].append(line)
    return dict(found)


def compare(found: dict[str, list[str]], allowed: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Return (lines that say what rose, each place's lowest number so far: that of ``allowed`` or fewer)."""
    risen = []
    for where, errors in sorted(found.items()):
        if len(errors) > allowed.get(where, 0):
            risen += [*errors, f"{where}: {len(errors)} type errors; {ALLOWED} allows {allowed.get(where, 0)}"]
    lowest = {where: min(number, len(found.get(where, ()))) for where, number in sorted(allowed.items())}
    return risen, {where: number for where, number in lowest.items() if number}


def mypy() -> str:
    """Return mypy's output; exit with its code if it could not check."""
    ran = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True)
    if ran.returncode not in (0, 1) or ran.stderr:
        sys.stderr.write(ran.stdout + ran.stderr)
        sys.exit(2)
    return ran.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lower", action="store_true", help=f"write the counts that have fallen to {ALLOWED}")
    options = parser.parse_args(arguments)
    allowed = json.loads(ALLOWED.read_text())
    output = mypy()
    risen, lowest = compare(by_place(output), allowed)
    if risen:
        print("\n".join(risen))
        return 1
    if lowest == allowed:
        print(f"types: no new errors; {ALLOWED} allows {sum(allowed.values())} in {len(allowed)} places")
    elif options.lower:
        ALLOWED.write_text(json.dumps(lowest, indent=2) + "\n")
        print(f"types: {ALLOWED} lowered from {sum(allowed.values())} to {sum(lowest.values())} errors")
    else:
        for where in sorted(allowed):
            if (now := lowest.get(where, 0)) < allowed[where]:
                print(f"{where}: {now} type errors; {ALLOWED} allows {allowed[where]}")
        print("types: fewer errors than allowed: `python tools/type_ratchet.py --lower` writes the numbers down")
    return 0


if __name__ == "__main__":
    sys.exit(main())
