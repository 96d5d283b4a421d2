"""Log-probs of a text by transformers and by the policy, for comparison: ``convert verify``, and ``train``'s probe.

``python -m megatron_dypo.policy.hf_logprobs FOLDER IDS OUT`` runs transformers in a separate process, without CUDA,
which can be ended at a deadline and releases its memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_dypo.policy.policy import Policy

TEXT = """\
A baker sells 48 rolls in the morning, and half as many in the afternoon. How many rolls does she sell that day? In the
afternoon she sells 48 / 2 = 24 rolls. Altogether she sells 48 + 24 = 72 rolls, so the answer is \\boxed{72}.
Let f(x) = x^2 - 5x + 6; its roots are 2 and 3, since (x - 2)(x - 3) = x^2 - 5x + 6. Überprüfen wir das:
4 - 10 + 6 = 0 und 9 - 15 + 6 = 0. 因此方程的两个根是 2 和 3。 def square(n: int) -> int: return n * n
"""


def transformers_logprobs(folder: str | Path, ids: np.ndarray, rope_base: float | None = None) -> np.ndarray:
    """Return the log-probs (nats, fp32) of all ids but the first. ``rope_base`` overrides the folder's."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if rope_base is not None:
        config.rope_parameters["rope_theta"] = rope_base
    options = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    row = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        logp = model(row).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(1, row[0, 1:, None]).squeeze(1).numpy()


def policy_logprobs(policy: Policy, ids: np.ndarray) -> np.ndarray:
    """Return the same from the policy, at any layout, on all ranks; collective."""
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.runtime.distributed import all_gather_objects

    layout = policy.layout
    batch = MicroBatch.pack([Sequence(ids, 1, Kind.TEACHER, 0, 0)], [0], 1.0, **layout.packing)
    logp = policy.logprobs([batch] * layout.micro_batch_multiple)
    mine = dict(zip(batch.tail_N.tolist(), logp[0].tolist(), strict=True)) if layout.owns_logprobs else {}
    every: dict[int, float] = {}
    for part in all_gather_objects(mine):
        every |= part
    return np.array([every[token] for token in range(len(ids) - 1)])


def gaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the differences of log-probs in nats; infinite if either is NaN or only one is infinite."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.where(ours == theirs, 0.0, np.abs(ours - theirs)), nan=np.inf)


if __name__ == "__main__":
    model_folder, ids_file, out_file, *base = sys.argv[1:]
    np.save(out_file, transformers_logprobs(model_folder, np.load(ids_file), *map(float, base)))
