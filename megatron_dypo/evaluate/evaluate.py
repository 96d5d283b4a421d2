"""Run evaluation suites on a run's newest checkpoint, another checkpoint, a Hugging Face folder or a server.

Under torchrun each rank has its own engine, and the ranks share the problems. Answers are kept: a killed evaluation
resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_dypo.checkpoint.catalog import complete_steps
from megatron_dypo.config.schema import Config, Parallel
from megatron_dypo.convert.hf_weights import check_folder, folder_weights
from megatron_dypo.convert.import_export import check_checkpoint, metadata_folder, model_of, source_folder
from megatron_dypo.convert.megatron_folder import MegatronFolder, checkpoint_folder
from megatron_dypo.data.provenance import keep, start_day
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.dataprep.endpoint import Endpoint, EndpointFault
from megatron_dypo.errors import UserError
from megatron_dypo.evaluate.respond import (
    AnswerFile,
    ChatServer,
    Respond,
    engine_responses,
    longest_response,
    server_responses,
)
from megatron_dypo.evaluate.run import EvaluationProgress, run_suite, show
from megatron_dypo.evaluate.suites import Suite, load_suites
from megatron_dypo.models.limits import check_policy, check_window
from megatron_dypo.models.shape import ModelShape, of_weights
from megatron_dypo.models.sharding import refuse, watched
from megatron_dypo.records import Prompt
from megatron_dypo.rollout.engines import build_engine, check_vllm, engine_name
from megatron_dypo.rollout.sampling import encode_prompts
from megatron_dypo.runtime import distributed
from megatron_dypo.runtime.determinism import stable_hash
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.runtime.failure import phase
from megatron_dypo.runtime.fs import atomic_write
from megatron_dypo.weight_sync.source import StoredWeights

ROUND = {"cuda": 4096, "cpu": 128}  # responses requested at a time, and lost by a kill; vLLM samples fewer at once


@dataclass(frozen=True)
class EvaluatedModel:
    """The model to evaluate: ``name`` in the results; ``digest`` changes when its files do.

    ``checkpoint``: the checkpoint folder whose files are still to be verified, if it is one.
    """

    name: str
    digest: str
    shape: ModelShape
    read: Callable[[str], Tensor]
    checkpoint: Path | None = None


def evaluate(
    config: Config, names: list[str], hf: str | None, checkpoint: Path | None, out: Path | None, restart: bool
) -> None:
    """Run the suites and print their table; ``out`` gets ``results.json`` and each suite's responses.

    ``hf`` or ``checkpoint``: which weights; default: the run folder's newest checkpoint, else `model.hf`. ``out``
    defaults to a folder in the run folder. ``restart`` discards earlier responses. Raises UserError before any engine
    starts.
    """
    if (name := engine_name(config)) in ("replay", "server"):
        why = {"replay": "samples nothing", "server": "would take the servers from the run that they belong to"}[name]
        instead = "rollout.engine=auto rollout.servers=[] rollout.replay=null rollout.async_rollout=0"
        raise UserError(f"evaluate: rollout.engine: {name} {why}; add {instead}, or give --server")
    with phase("reading the inputs"):
        suites = _load(config, names)
        model = _choose(config, hf, checkpoint)
        check_policy(config.policy, model.shape, "evaluate")
        check_window(config, model.shape, "evaluate")
        if engine_name(config) != "transformers":
            check_vllm(config, model.shape)
        out = out or Path(config.trainer.run_dir) / "evaluation" / model.name
        tokenizer = load_tokenizer(config, model.shape, start_day(Path(config.trainer.run_dir), out))
        for prompts in suites.values():
            encode_prompts(prompts, tokenizer, config.data.max_prompt_tokens)
    with phase("joining the job"):
        layout = distributed.init(Parallel(timeout=config.parallel.timeout))
        if model.checkpoint:
            check_checkpoint(model.checkpoint)
    if tokenizer.reads_clock:
        tokenizer.set_day(distributed.all_gather_objects(tokenizer.day)[0])
        if layout.is_main:
            keep(out, tokenizer)
    with phase("rollout engine start"):
        engine = build_engine(config, model.shape, tokenizer, out / "engine" / f"rank_{layout.rank}", layout)
        distributed.claim_device()
    with phase("weight sync", limit=(config.rollout.sync_timeout, "rollout.sync_timeout")):
        dtype = distributed.training_dtype(config.model.dtype)
        engine.sync(StoredWeights(model.shape, dtype, model.read))
    about: dict[str, str | None] = {
        "model": model.name,
        "weights": model.digest,
        "tokenizer": str(tokenizer.digest),
        "dtype": str(dtype),
    }
    about["chat_template"] = tokenizer.template_digest
    if tokenizer.reads_clock:
        about["day"] = tokenizer.day.isoformat()
    respond = engine_responses(engine, tokenizer, config)
    _run(config, suites, respond, about, layout, out, restart, ROUND[distributed.device().type])


def evaluate_server(config: Config, names: list[str], server: ChatServer, out: Path | None, restart: bool) -> None:
    """Evaluate the model behind an address; the ranks, if there are several, share the problems."""
    with phase("reading the inputs"):
        suites = _load(config, names)
        try:
            Endpoint(server.url, server.model, key=server.key)
        except EndpointFault as fault:
            raise UserError(str(fault)) from None
    distributed.join(config.parallel.timeout)
    layout = Layout(rank=dist.get_rank(), world=dist.get_world_size())
    out = out or Path(config.trainer.run_dir) / "evaluation" / re.sub("[^A-Za-z0-9._-]+", "_", server.model)
    about = {"model": server.model, "weights": server.url}
    _run(config, suites, server_responses(server, config), about, layout, out, restart, 4 * server.concurrency)


def _load(config: Config, names: list[str]) -> dict[Suite, list[Prompt]]:
    asked = names or config.evaluation.suites
    if not asked:
        raise UserError("evaluate: no suite: give --suite, or evaluation.suites in the configuration")
    return load_suites(asked, config.evaluation, "--suite" if names else "evaluation.suites")


def _choose(config: Config, hf: str | None, checkpoint: Path | None) -> EvaluatedModel:
    """Return the model to evaluate; it and its tokenizer become ``config.model.hf`` and ``.tokenizer``."""
    run_dir = Path(config.trainer.run_dir)
    if hf is None and checkpoint is None and complete_steps(run_dir):
        checkpoint = run_dir
    if checkpoint is not None:
        folder = checkpoint_folder(checkpoint)
        origin = metadata_folder(folder)
        shape = model_of(folder, origin)
        config.model.tokenizer, config.model.hf = config.model.tokenizer or origin, origin or config.model.hf
        read = watched(MegatronFolder(folder, shape).read, folder, refuse)
        return EvaluatedModel(_name(folder), _digest(folder), shape, read, folder)
    source = hf or config.model.hf
    if source is None:
        raise UserError(
            f"evaluate: {run_dir} holds no checkpoint, and a preset has no weights: give --hf or --checkpoint"
        )
    folder, shape = source_folder(source, "--hf" if hf else "model.hf")
    shape = shape if hf else of_weights(shape, config.model)
    check_folder(folder, shape)
    config.model.tokenizer, config.model.hf = hf or config.model.tokenizer, source
    return EvaluatedModel(_name(folder), _digest(folder), shape, watched(folder_weights(folder), folder, refuse))


def _name(folder: Path) -> str:
    """Return the last part of the path, resolved if that is ``.`` or ``..``; of a link, its own name."""
    return os.path.basename(os.path.abspath(folder))


def _digest(folder: Path) -> str:
    """Return a digest of a folder of weights, from its files' names, sizes and times."""
    listed = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def _run(
    config: Config,
    suites: dict[Suite, list[Prompt]],
    respond: Respond,
    about: dict[str, Any],
    layout: Layout,
    out: Path,
    restart: bool,
    round_size: int,
) -> None:
    """Ask, write and print. ``about`` goes with every suite's results; ``round_size`` is per rank."""
    results: dict[str, Any] = {}
    for suite, prompts in suites.items():
        name = suite.name
        asked = about | _asked(config, suite, prompts)
        progress = EvaluationProgress(name, layout.is_main)
        with phase(f"evaluation of {name}"), _file(out / f"{name}.jsonl", asked, layout, restart) as file:
            size = round_size * layout.world
            results[name] = asked | run_suite(
                suite, prompts, config, respond, layout, file=file, round_size=size, progress=progress
            )
        if layout.is_main:
            _write(out / "results.json", results, about)
    if layout.is_main:
        show(results, f"{about['model']}: {out / 'results.json'}")


def _write(path: Path, results: dict[str, Any], about: dict[str, Any]) -> None:
    """Merge results into the file, which may hold other suites of the same weights."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    kept = {name: each for name, each in before.items() if each.get("weights") == about["weights"]}
    atomic_write(path, json.dumps(kept | results, indent=2) + "\n")


def _asked(config: Config, suite: Suite, prompts: list[Prompt]) -> dict[str, Any]:
    """Return everything that determines a suite's responses, except the weights."""
    settings = config.evaluation
    return {
        "suite": suite.name,
        "problems": len(prompts),
        "prompts": stable_hash(*prompts),
        "samples": suite.samples_in(settings),
        "extract": suite.extract_in(settings),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_response_tokens": longest_response(config),
        "seed": settings.seed,
        **({"reward": suite.reward} if suite.file else {}),
    }


def _file(
    path: Path, about: dict[str, Any], layout: Layout, restart: bool
) -> AbstractContextManager[AnswerFile | None]:
    return closing(AnswerFile(path, about, restart)) if layout.is_main else nullcontext()
