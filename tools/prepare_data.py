#!/usr/bin/env python3
"""Make training rows (docs/data.md) from published data sets, teachers' traces, or your own files.

    python tools/prepare_data.py IN [IN ...] --out FILE.jsonl|FILE.parquet [--decontaminate EVAL ...]

IN: a .jsonl, .json (a list) or .parquet file, a folder of them, or hub:NAME?config=..&split=..&revision=.. for a data
set on the Hugging Face hub. Traces of the same problem are merged across all inputs. If killed, run the same command
again: it resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dypo.dataprep.formats import LAYOUTS
from megatron_dypo.dataprep.options import COLUMNS, INSTRUCTION, VERIFY, Options
from megatron_dypo.dataprep.prepare import prepare, print_counts
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import run_tool


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="file, folder or hub:NAME (see above)")
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet file to write")
    add("--layout", choices=LAYOUTS, help="layout of all inputs; default: detected from each file's columns")
    add("--columns", type=_pairs, metavar="NAME=COLUMN,..", help=f"map other columns to {', '.join(COLUMNS)}")
    add("--instruction", help=f"text after each problem and a blank line; '' for none (default: {INSTRUCTION!r})")
    add("--system", help="system message; '' for none (default: the row's own)")
    add("--teacher", metavar="NAME", help="teacher of all traces (default: as the layout says)")
    add("--traces-per-teacher", type=int, default=1, metavar="N", help="traces per problem; 0 for all (default: 1)")
    add(
        "--verify",
        choices=VERIFY,
        default="grader",
        help="check answers with our grader (default), or by the data set's marks (our grader where there are none)",
    )
    add("--extract", choices=("boxed", "marked", "number"), default="boxed", help="as reward.extract (default: boxed)")
    add("--tokenizer", metavar="DIR", help="tokenizer for the two limits below")
    add("--max-prompt-tokens", type=int, metavar="N", help="drop longer prompts (chat template included)")
    add("--max-trace-tokens", type=int, metavar="N", help="drop longer traces (end token included)")
    evaluations = "evaluation files, folders or hub names; drop the problems that overlap with them"
    add("--decontaminate", nargs="+", default=[], metavar="EVAL", help=evaluations)
    add("--ngram", type=int, default=8, metavar="N", help="words per n-gram of the overlap test (default: 8)")
    add(
        "--overlap-share",
        type=float,
        default=0.5,
        metavar="S",
        help="share of the shorter problem in shared n-grams from which two problems overlap (default: 0.5)",
    )
    add("--keep-without-trace", action="store_true", help="keep problems that are left without a trace")
    add("--skip-bad-rows", action="store_true", help="skip (and count) malformed rows instead of stopping")
    escapes = "restore (and count) the backslash of LaTeX commands where a control character replaced it"
    add("--repair-escapes", action="store_true", help=escapes)
    add("--workers", type=int, default=1, metavar="N", help="grading processes (default: 1)")
    add("--restart", action="store_true", help="start over, discarding what a killed run left")
    dry = "only count, over the first N rows (default: 1000)"
    add("--dry-run", type=int, nargs="?", const=1000, default=0, metavar="N", help=dry)
    return parser


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    if not all(name and column for name, column in pairs):
        raise argparse.ArgumentTypeError("expected NAME=COLUMN,NAME=COLUMN")
    return dict(pairs)


def main() -> int:
    arguments = vars(parser().parse_args())
    run = {name: arguments.pop(name) for name in ("out", "workers", "restart", "dry_run")}
    if run["workers"] < 1 or run["dry_run"] < 0:
        raise UserError("--workers must be at least 1, --dry-run at least 0")
    tuples = {name: tuple(arguments.pop(name)) for name in ("inputs", "decontaminate")}
    counts = prepare(Options(**arguments, **tuples), **run)
    print_counts(f"dry run of {run['dry_run']} rows" if run["dry_run"] else str(run["out"]), counts)
    return 0


if __name__ == "__main__":
    run_tool("prepare_data", main)
