"""Define the commands, their arguments and what each calls. A command imports its own heavy modules."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from megatron_dypo.errors import UserError

_OVERRIDE = re.compile(r"[a-z_0-9]+\.[a-z_0-9.]+=|[^-=][^=]*\.ya?ml$")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command's options; unlike plain argparse, accept overrides before and after them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all(_OVERRIDE.match(word) for word in rest)):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_dypo", description="DYPO post-training on Megatron-Core and vLLM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    from megatron_dypo.config.render import key_reference

    train = commands.add_parser(
        "train",
        help="train; resumes from the newest complete checkpoint in the run folder",
        epilog=key_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    _add_overrides(train)
    train.set_defaults(run=_train)

    serve = commands.add_parser("serve", help="run one vLLM server for rollout.engine=server (see launch/servers.sh)")
    serve.add_argument("config", metavar="CONFIG", help="YAML file of the training run")
    _add_overrides(serve, "overrides of the training run")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    serve.set_defaults(run=_serve)

    _add_show(commands)
    _add_evaluate(commands)
    _add_plan(commands)

    doctor = commands.add_parser("doctor", help="check the installation: what it enables, what is wrong, how to fix it")
    doctor.add_argument("--no-selftest", action="store_true", help="skip the self-test on two ranks (about 10 s)")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="write one self-contained HTML page of a run, or comparing several")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run folder; give several to compare them")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write; default: report.html in the run folder, or in the current folder for several runs",
    )
    report.set_defaults(run=_report)

    objective = commands.add_parser("objective", help="compute the loss and dloss/dlogp of one case, without a model")
    objective.add_argument("case", type=Path, metavar="CASE.json", help="log-probs, rewards and settings of one update")
    objective.add_argument("--table", action="store_true", help="print a readable table, one row per token, not JSON")
    objective.set_defaults(run=_objective)

    _add_convert(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # prints its usage with an error
    return parser


OVERRIDES = "override one key, or every key in a FILE.yaml; the last one wins"


def _add_overrides(command, text: str = OVERRIDES, form: str = "section.key=value") -> None:
    """Add the overrides, with a default: without one, argparse lists them among the missing arguments."""
    command.add_argument("overrides", nargs="*", default=[], metavar=form, help=text)


def _add_show(commands) -> None:
    show = commands.add_parser(
        "show", help="print the first prompts, traces and options exactly as the model will see them, with warnings"
    )
    show.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    _add_overrides(show)
    show.add_argument("--json", action="store_true", help="print everything as JSON")
    show.add_argument("--prompts", type=int, default=3, metavar="N", help="prompts of data.train (default: 3)")
    show.set_defaults(run=_show)


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure accuracy on evaluation suites: pass@1, avg@n, pass@n, with confidence intervals",
        description="Suites: aime24, aime25, amc23, math500, minerva, arc_c, gpqa_diamond, gsm8k. Without --hf and "
        "--checkpoint: the newest checkpoint in the run folder, else model.hf. A killed evaluation resumes.",
    )
    evaluate.add_argument("config", metavar="CONFIG", help="YAML file of the run; its `evaluation` section applies")
    _add_overrides(evaluate)
    evaluate.add_argument(
        "--suite",
        metavar="NAME[,NAME]",
        default="",
        help="suites, or your own files: [NAME=]FILE[?samples=N&extract=number] (docs/evaluation.md); "
        "default: evaluation.suites",
    )
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument("--hf", metavar="DIR", help="evaluate a Hugging Face folder")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="evaluate a Megatron checkpoint, or a run folder")
    which.add_argument(
        "--server", metavar="URL", help="evaluate the model behind an OpenAI-compatible URL (http://host:8000/v1)"
    )
    evaluate.add_argument("--model", metavar="NAME", help="with --server: the served model name")
    evaluate.add_argument(
        "--key-env", metavar="VARIABLE", help="with --server: environment variable that holds the API key"
    )
    evaluate.add_argument("--concurrency", type=int, default=32, metavar="N", help="with --server: requests in flight")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/evaluation/NAME_OF_THE_WEIGHTS")
    evaluate.add_argument("--restart", action="store_true", help="discard the responses already in --out")
    evaluate.set_defaults(run=_evaluate)


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan", help="estimate memory and step time of every layout, best first, and why the others do not fit"
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    _add_overrides(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    plan.add_argument("--gpu-memory", type=float, required=True, metavar="GiB", help="memory of one GPU")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="a100, a800, h100 (default), h800, h200 or b200")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs in one node (default: 8)")
    plan.add_argument("--response-tokens", type=float, metavar="N", help="mean response length; default: maximum / 3")
    plan.add_argument("--prompt-tokens", type=float, metavar="N", help="mean prompt length; default: maximum / 2")
    plan.add_argument("--mid", type=float, default=0.5, metavar="SHARE", help="share of Mid prompts (default: 0.5)")
    plan.add_argument("--hard", type=float, default=0.25, metavar="SHARE", help="share of Hard prompts (default: 0.25)")
    plan.add_argument(
        "--calibrate",
        type=Path,
        metavar="RUN_DIR",
        help="fit the time constants to a run of this model, state the error",
    )
    plan.add_argument("--all", action="store_true", help="show every layout, virtual pipelines and server counts too")
    plan.set_defaults(run=_plan)


def _add_convert(commands) -> None:
    """Add ``convert import | export | verify``."""
    convert = commands.add_parser(
        "convert", help="convert Hugging Face folder <-> Megatron checkpoint, or compare them"
    )
    ways = convert.add_subparsers(metavar="WAY", required=True)
    hf = {"metavar": "DIR", "help": "Hugging Face folder or hub name"}
    checkpoint = {
        "type": Path,
        "metavar": "DIR",
        "required": True,
        "help": "Megatron checkpoint or run folder",
    }
    out = {"type": Path, "metavar": "DIR", "required": True, "help": "new folder to write"}
    dtype = {"choices": ("fp32", "bf16", "fp16"), "help": "dtype to write; default: unchanged"}

    way = ways.add_parser("import", help="write a Megatron checkpoint, which loads at any layout")
    way.add_argument("--hf", required=True, **hf)
    way.add_argument("--out", **out)
    way.add_argument("--dtype", **dtype)
    way.add_argument("--bin", action="store_true", help="read pytorch_model.bin (a pickle) if there are no safetensors")
    _add_overrides(way, "layout that the model must be divisible by", "parallel.KEY=VALUE")
    way.set_defaults(run=_import)

    way = ways.add_parser("export", help="write a Hugging Face folder, which transformers and vLLM load")
    way.add_argument("--checkpoint", **checkpoint)
    way.add_argument("--out", **out)
    way.add_argument(
        "--hf", **hf | {"help": "folder to copy configuration and tokenizer from; default: the weights' origin"}
    )
    way.add_argument("--dtype", **dtype)
    way.add_argument(
        "--side", action="store_true", help="export the run's second model (a critic, PRIME's reward model)"
    )
    way.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file, in GB (default: 5)")
    way.set_defaults(run=_export)

    way = ways.add_parser("verify", help="compare every tensor and the log-probs of a text; exit code 1 if they differ")
    way.add_argument("--hf", required=True, **hf)
    way.add_argument("--checkpoint", **checkpoint)
    way.add_argument("--tensors-only", action="store_true", help="skip the log-probs, which need the model in memory")
    _add_overrides(way, "layout of the model that computes the log-probs", "parallel.KEY=VALUE")
    way.set_defaults(run=_verify)
    for way in ways.choices.values():
        way.set_defaults(parser=way)


def _import(options: argparse.Namespace) -> None:
    from megatron_dypo.config.load import load_parallel

    parallel = load_parallel(options.overrides, "convert import")  # before torch is imported

    from megatron_dypo.convert.import_export import import_folder

    _say(import_folder(options.hf, options.out, parallel, options.dtype, options.bin))


def _export(options: argparse.Namespace) -> None:
    from megatron_dypo.convert.import_export import export_folder

    if not 0 < options.shard_size < 1e6:
        raise UserError(f"--shard-size: {options.shard_size:g} GB is not a file size: give a number above 0")
    shard_bytes = int(options.shard_size * 1e9)
    _say(export_folder(options.checkpoint, options.out, options.hf, options.dtype, shard_bytes, options.side))


def _verify(options: argparse.Namespace) -> int:
    from megatron_dypo.config.load import load_parallel

    parallel = load_parallel(options.overrides, "convert verify")

    from megatron_dypo.convert.verify import verify

    comparison = verify(options.hf, options.checkpoint, parallel, options.tensors_only)
    for line in comparison.lines():
        _say(line)
    return 0 if comparison.equal else 1


def _say(line: str) -> None:
    """Print a line on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _train(options: argparse.Namespace) -> int:
    from megatron_dypo.runtime.process import setup_process

    setup_process()
    from megatron_dypo.config import load_config

    config = load_config(
        options.config, options.overrides
    )  # before importing torch, so that typos are reported at once

    from megatron_dypo.preflight import check_inputs
    from megatron_dypo.runtime.failure import phase

    with phase("reading the inputs"):
        inputs = check_inputs(config, options.config)  # before megatron-core is imported

    from megatron_dypo.runtime.stop_request import EXIT_CODE
    from megatron_dypo.trainer import train

    return 0 if train(config, inputs) else EXIT_CODE


def _show(options: argparse.Namespace) -> None:
    from megatron_dypo.config import load_config

    if options.prompts < 1:
        raise UserError(f"show: --prompts: {options.prompts} is less than 1")
    config = load_config(options.config, options.overrides)

    from megatron_dypo.show import show

    show(config, options.prompts, options.json)


def _evaluate(options: argparse.Namespace) -> None:
    from megatron_dypo.runtime.process import setup_process

    setup_process()
    from megatron_dypo.config import load_config

    config = load_config(options.config, options.overrides)

    from megatron_dypo.evaluate.evaluate import evaluate, evaluate_server
    from megatron_dypo.evaluate.respond import ChatServer

    names = list(filter(None, options.suite.split(",")))
    if options.server is None:
        evaluate(config, names, options.hf, options.checkpoint, options.out, options.restart)
        return
    if not options.model or options.concurrency < 1:
        raise UserError("evaluate: --server needs --model, and a --concurrency of at least 1")
    key = os.environ.get(options.key_env) if options.key_env else None
    if options.key_env and not key:
        raise UserError(f"evaluate: --key-env: the environment variable {options.key_env} is not set")
    server = ChatServer(options.server, options.model, key, options.concurrency)
    evaluate_server(config, names, server, options.out, options.restart)


def _plan(options: argparse.Namespace) -> int:
    from megatron_dypo.config import load_config

    config = load_config(options.config, options.overrides)

    from megatron_dypo.planner.cluster import Cluster, gpu
    from megatron_dypo.planner.show_plan import show_plan, work_of

    for name in ("gpus", "gpu_memory", "gpus_per_node"):
        if not 0 < getattr(options, name) < 1e6:
            raise UserError(f"plan: --{name.replace('_', '-')}: {getattr(options, name):g} is out of range")
    cluster = Cluster(options.gpus, options.gpu_memory * 2**30, gpu(options.gpu), options.gpus_per_node)
    if options.calibrate:
        from megatron_dypo.planner.calibrate import calibrated

        cluster = calibrated(cluster, config, options.calibrate, options.gpu, options.prompt_tokens)
    work = work_of(config, options.response_tokens, options.prompt_tokens, options.mid, options.hard)
    return show_plan(config, cluster, work, options.config, options.overrides, options.all)


def _doctor(options: argparse.Namespace) -> int:
    from megatron_dypo.doctor.report import doctor

    return doctor(not options.no_selftest)


def _serve(options: argparse.Namespace) -> None:
    from megatron_dypo.config import load_config

    if not 0 < options.port < 65536 or options.tensor < 1:
        raise UserError(f"--port {options.port}, --tensor {options.tensor}: out of range")
    config = load_config(options.config, options.overrides)

    from megatron_dypo.rollout.serve import serve

    serve(config, options.host, options.port, options.tensor)


def _objective(options: argparse.Namespace) -> None:
    from megatron_dypo.cases.command import show

    show(options.case, options.table)


def _report(options: argparse.Namespace) -> None:
    from megatron_dypo.monitor.report import write_report

    print(write_report(*options.run_dirs, out=options.out))
