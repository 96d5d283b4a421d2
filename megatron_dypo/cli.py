"""The command line: parse, run, and turn failures into exit codes (0 done, 2 unusable input, 1 anything else)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from megatron_dypo.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Under torchrun only rank 0 prints what the user got wrong."""
    options = _parser().parse_args(arguments)
    _quiet()
    try:
        options.run(options)
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("megatron_dypo:", *str(error).split(), file=sys.stderr, flush=True)
        return 2
    except Exception as error:  # the last line of defence: name rank and phase, then end the process
        from megatron_dypo.runtime.distributed import report_failure

        report_failure(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_dypo", description="DYPO post-training on Megatron-Core and vLLM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    from megatron_dypo.config.render import key_reference

    train = commands.add_parser(
        "train",
        help="the training run; resumes by itself from the run folder's newest complete checkpoint",
        epilog=key_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key; a later one wins")
    train.set_defaults(run=_train)

    report = commands.add_parser("report", help="one self-contained HTML page with the run's curves")
    report.add_argument("run_dir", metavar="RUN_DIR", help="a run folder")
    report.set_defaults(run=_report)
    return parser


def _train(options: argparse.Namespace) -> None:
    from megatron_dypo.config import load_config
    from megatron_dypo.runtime.distributed import die_with_parent
    from megatron_dypo.train import train

    die_with_parent()
    train(load_config(options.config, options.overrides), options.config)


def _report(options: argparse.Namespace) -> None:
    from megatron_dypo.monitor.report import write_report

    print(write_report(options.run_dir))


def _quiet() -> None:
    """Our own log lines from rank 0, warnings from all; the libraries' notices about what is not installed are doctor's business."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron_dypo").setLevel(level)
    for module in (r"megatron\.core", "torch", "transformers", "vllm", "flashinfer"):
        warnings.filterwarnings("ignore", module=module)
