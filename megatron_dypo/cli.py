"""The command line: parse, run, and turn failures into exit codes (0 done, 2 unusable input, 1 anything else)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_dypo.errors import UserError

_LONGEST_LINE = 2000  # characters
_PATIENCE = 30.0  # seconds that the other ranks leave rank 0 to say what the user got wrong


def script() -> NoReturn:
    """The command as a process. After a failure it ends on the spot: no library's exit handler may keep it waiting."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130  # as a shell has it; a thread may still be sampling
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Under torchrun only rank 0 prints what the user got wrong."""
    options = _parser().parse_args(arguments)
    _quiet()
    try:
        return options.run(options) or 0
    except UserError as error:
        first = getattr(error, "first", None)  # None: there are no process groups yet, to know it
        if first is None and os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)  # rank 0's end ends this rank; still here after it, only this rank knows
        if first is not False:
            print(f"megatron_dypo: {_one_line(str(error))}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:  # the last line of defence; most errors have been reported where they were raised
        from megatron_dypo.runtime.failure import report

        report(error)
        return 1


def _one_line(text: str) -> str:
    """On one line of bearable length, whatever bytes of a file it quotes, and nothing in it that steers a terminal."""
    words = " ".join(text.split())
    shown = words if len(words) <= _LONGEST_LINE else f"{words[:_LONGEST_LINE]}..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


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

    serve = commands.add_parser("serve", help="one vLLM server for rollout.engine: server (see launch/servers.sh)")
    serve.add_argument("config", metavar="CONFIG", help="the training run's YAML file")
    serve.add_argument("overrides", nargs="*", metavar="section.key=value", help="the training run's overrides")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    serve.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel devices (default: 1)")
    serve.set_defaults(run=_serve)

    report = commands.add_parser("report", help="one self-contained HTML page with the run's curves")
    report.add_argument("run_dir", metavar="RUN_DIR", help="a run folder")
    report.set_defaults(run=_report)

    _add_convert(commands)
    return parser


def _add_convert(commands) -> None:
    """``convert import | export | verify``."""
    convert = commands.add_parser("convert", help="Hugging Face folder <-> Megatron checkpoint, and proof of equality")
    ways = convert.add_subparsers(metavar="WAY", required=True)
    hf = {"metavar": "DIR", "help": "a Hugging Face folder, or a hub name"}
    checkpoint = {
        "type": Path,
        "metavar": "DIR",
        "required": True,
        "help": "a checkpoint, or a run folder",
    }
    out = {"type": Path, "metavar": "DIR", "required": True, "help": "a new folder"}
    dtype = {"choices": ("fp32", "bf16", "fp16"), "help": "default: as it is"}

    way = ways.add_parser("import", help="write a Megatron checkpoint, which loads at any layout")
    way.add_argument("--hf", required=True, **hf)
    way.add_argument("--out", **out)
    way.add_argument("--dtype", **dtype)
    way.add_argument("--bin", action="store_true", help="read pytorch_model.bin, a pickle (tensors alone), if need be")
    way.add_argument("overrides", nargs="*", metavar="parallel.KEY=VALUE", help="check that the model can be cut so")
    way.set_defaults(run=_import)

    way = ways.add_parser("export", help="write a Hugging Face folder, which transformers and vLLM load")
    way.add_argument("--checkpoint", **checkpoint)
    way.add_argument("--out", **out)
    way.add_argument(
        "--hf", **hf | {"help": "whose configuration and tokenizer to take; default: where the weights came from"}
    )
    way.add_argument("--dtype", **dtype)
    way.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="of a file, at most (default: 5)")
    way.set_defaults(run=_export)

    way = ways.add_parser("verify", help="compare every tensor, and a text's log-probs; exit code 1 if they differ")
    way.add_argument("--hf", required=True, **hf)
    way.add_argument("--checkpoint", **checkpoint)
    way.add_argument("--tensors-only", action="store_true", help="leave out log-probs: they need the model in memory")
    way.add_argument("overrides", nargs="*", metavar="parallel.KEY=VALUE", help="layout of the log-probs' model")
    way.set_defaults(run=_verify)


def _import(options: argparse.Namespace) -> None:
    from megatron_dypo.config.load import load_parallel

    parallel = load_parallel(options.overrides, "convert import")  # before torch is imported

    from megatron_dypo.convert.commands import import_folder

    _say(import_folder(options.hf, options.out, parallel, options.dtype, options.bin))


def _export(options: argparse.Namespace) -> None:
    from megatron_dypo.convert.commands import export_folder

    if not 0 < options.shard_size < 1e6:
        raise UserError(f"--shard-size: {options.shard_size:g} GB is no size of a file")
    shard_bytes = int(options.shard_size * 1e9)
    _say(export_folder(options.checkpoint, options.out, options.hf, options.dtype, shard_bytes))


def _verify(options: argparse.Namespace) -> int:
    from megatron_dypo.config.load import load_parallel

    parallel = load_parallel(options.overrides, "convert verify")

    from megatron_dypo.convert.verify import verify

    comparison = verify(options.hf, options.checkpoint, parallel, options.tensors_only)
    for line in comparison.lines():
        _say(line)
    return 0 if comparison.equal else 1


def _say(line: str) -> None:
    """Once, whatever the number of ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _train(options: argparse.Namespace) -> None:
    from megatron_dypo.runtime.process import settle

    settle()
    from megatron_dypo.config import load_config

    config = load_config(options.config, options.overrides)  # before torch is imported: a typing error is seen at once

    from megatron_dypo.preflight import prepare
    from megatron_dypo.runtime.failure import phase

    with phase("reading the inputs"):
        inputs = prepare(config, options.config)  # before megatron-core is imported

    from megatron_dypo.train import train

    train(config, inputs)


def _serve(options: argparse.Namespace) -> None:
    from megatron_dypo.config import load_config

    if not 0 < options.port < 65536 or options.tensor < 1:
        raise UserError(f"--port {options.port}, --tensor {options.tensor}: out of range")
    config = load_config(options.config, options.overrides)

    from megatron_dypo.rollout.serve import serve

    serve(config, options.host, options.port, options.tensor)


def _report(options: argparse.Namespace) -> None:
    from megatron_dypo.monitor.report import write_report

    print(write_report(options.run_dir))


def _quiet() -> None:
    """Our own log lines from rank 0, warnings from all; not the libraries' notices about what is not installed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM announces its NUMA binding on every rank
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron_dypo").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on tokenizers would stand beside our one line
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the same, where it is imported already
    for module in (r"megatron\.core", "torch", "transformers", "vllm", "flashinfer"):
        warnings.filterwarnings("ignore", module=module)
