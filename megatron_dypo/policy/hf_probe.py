"""Check after ``train`` starts from a folder: do the policy and transformers give a short text the same log-probs?

Tables of fields and weights cannot reveal what they omit; this can. Transformers runs once, on rank 0, on the CPU, in a
separate process (``policy/hf_logprobs.py``).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import megatron_dypo
from megatron_dypo.config.schema import Model
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.policy.hf_logprobs import TEXT, gaps, policy_logprobs
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.distributed import all_gather_objects, training_dtype
from megatron_dypo.runtime.measure import free_host_memory

log = logging.getLogger(__name__)
SECONDS = 60.0  # that `auto` waits for transformers
TOKENS = 256
MOST = {torch.float32: ("at most", 1e-3), torch.bfloat16: ("on average", 0.05)}  # nats between the log-probs


@dataclass(frozen=True)
class HfLogprobs:
    """Transformers' log-probs (nats) of ``ids[1:]``; or ``missing``, the reason why there are none."""

    ids: np.ndarray | None = None
    logp: np.ndarray | None = None
    missing: str = ""


def probe(policy: Policy, folder: Path, tokenizer: Tokenizer, timeout: float) -> None:
    """Raise UserError if the policy, fresh from ``folder``, differs from transformers' model; log the difference.

    ``timeout``: the deadline of collectives, within which transformers must finish. With `model.probe: on` a comparison
    that cannot be made raises UserError, too. Collective.
    """
    model, dtype = policy.config.model, training_dtype(policy.config.model.dtype)
    limit = timeout / 2 if model.probe == "on" else min(SECONDS, timeout / 2)
    mine = _reference(model, folder, tokenizer, limit, policy.shape.max_position) if policy.layout.is_main else None
    reference = all_gather_objects(mine)[0]
    if reference.missing:
        line = f"model.hf: {model.hf}: log-probs not compared with transformers': {reference.missing}"
        if model.probe == "on":
            raise UserError(f"{line} (model.probe: on)")
        log.info("%s", line)
        return
    gap = gaps(policy_logprobs(policy, reference.ids), reference.logp)
    mean, most, at = float(gap.mean()), float(gap.max()), int(gap.argmax())
    where = f"token {at + 1} of {len(reference.ids)}, id {reference.ids[at + 1]}"
    found = f"{mean:.2g} nats on average and {most:.2g} at most ({where})"
    kind, bound = MOST[dtype]
    if not (most if kind == "at most" else mean) <= bound:
        raise UserError(
            f"model.hf: {model.hf}: the policy's log-probs are {found} from transformers', more than {bound:g} {kind}: "
            "transformers reads another model in the folder; check its config.json (rope, norms, biases) and run "
            "`convert verify` on an import; model.probe=off trains all the same"
        )
    log.info("log-probs of a text match transformers' up to %s", found)


def _reference(model: Model, folder: Path, tokenizer: Tokenizer, limit: float, positions: int) -> HfLogprobs:
    size, free = sum(file.stat().st_size for file in folder.glob("*.safetensors")), free_host_memory()
    if model.probe == "auto" and size > free / 4:
        return HfLogprobs(
            missing=f"{size / 2**30:.3g} GiB are more than a quarter of {free / 2**30:.3g} GiB free memory"
        )
    ids = tokenizer.encode_prompt(Prompt("probe", "", (), text=TEXT))[: min(TOKENS, positions)]
    base = [] if model.shape.rope_base is None else [str(model.shape.rope_base)]
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "ids.npy", Path(scratch) / "logp.npy"
        np.save(given, ids)
        command = [
            sys.executable,
            "-m",
            "megatron_dypo.policy.hf_logprobs",
            str(folder.resolve()),
            str(given),
            str(out),
        ]
        try:
            done = subprocess.run(
                command + base, env=_environment(), cwd=scratch, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return HfLogprobs(missing=f"transformers did not finish within {limit:g} s")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return HfLogprobs(missing=f"transformers failed: {lines[-1]}")
        return HfLogprobs(ids, np.load(out))


def _environment() -> dict[str, str]:
    """Return an environment without rank and GPUs, with all cores of this rank, since the others wait."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, [str(Path(megatron_dypo.__file__).parents[1]), kept.get("PYTHONPATH")]))
    cores = str(len(os.sched_getaffinity(0)))
    return kept | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": cores,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
