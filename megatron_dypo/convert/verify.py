"""Run ``convert verify``: show whether a Megatron checkpoint and a Hugging Face folder are the same model.

There are two independent proofs. Every tensor, unfolded by our table, is compared bit for bit. And the model that
Megatron-Core itself loads from the checkpoint, at any layout, must give the same log-probs of a text as transformers: a
table that is wrong in both directions fails here.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.config.schema import Config, Data, Model, Objective, Parallel, Trainer
from megatron_dypo.convert.hf_files import tokenizer_files
from megatron_dypo.convert.hf_weights import check_folder, folder_weights
from megatron_dypo.convert.import_export import check_checkpoint, source_folder
from megatron_dypo.convert.megatron_folder import MegatronFolder, checkpoint_folder
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.models.families import hf_shapes, rules
from megatron_dypo.models.limits import check_layout
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.models.sharding import describe, is_finite
from megatron_dypo.policy.hf_logprobs import TEXT, gaps, policy_logprobs, transformers_logprobs
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.distributed import all_gather_objects, init, join, training_backend, world_size

if TYPE_CHECKING:
    from megatron_dypo.policy.policy import Policy

TOLERANCE = 1e-4  # nats, fp32, on log-probs
NAMED = 8  # tensors named in the output, at most
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes


@dataclass
class Comparison:
    """A comparison. ``differing``: one line per tensor that differs; ``gap``: of log-probs, in nats, over ``tokens``.

    ``unfinite``: one line per tensor with a NaN or infinity, which may still be equal.
    """

    tensors: int
    differing: list[str] = field(default_factory=list)
    unfinite: list[str] = field(default_factory=list)
    gap: float | None = None
    tokens: int = 0

    @property
    def equal(self) -> bool:
        return not self.differing and (self.gap is None or self.gap <= TOLERANCE)

    def lines(self) -> list[str]:
        """Return the lines to print."""
        found = _listed("WARNING", self.unfinite) + _listed("differs", self.differing)
        if not self.differing:
            found.append(f"tensors: all {self.tensors} are equal, bit for bit")
        if self.gap is not None:
            verdict = "at most" if self.gap <= TOLERANCE else f"more than {TOLERANCE:g} nats from transformers':"
            kept = " that have finite ones" if self.unfinite else ""
            found.append(f"log-probs: {self.tokens} tokens of text{kept}, {verdict} {self.gap:.2g} nats apart (fp32)")
        return [*found, "verified: the same model" if self.equal else "NOT the same model"]


def _listed(label: str, lines: list[str]) -> list[str]:
    more = [f"{label}: {len(lines) - NAMED} more tensors"] if len(lines) > NAMED else []
    return [f"{label}: {line}" for line in lines[:NAMED]] + more


def verify(hf: str, checkpoint: Path, parallel: Parallel, tensors_only: bool) -> Comparison:
    """Compare; collective over the ranks of ``parallel``, which share the tensors and build the model together.

    ``tensors_only`` skips the log-probs, which need the whole model in transformers, in fp32, on rank 0. Raises
    UserError if either cannot be read.
    """
    source, shape = source_folder(hf, critics=tensors_only)
    if not tensors_only:
        check_layout(parallel, shape, world_size(), "convert verify")
    join(parallel.timeout, "gloo" if tensors_only else training_backend())
    folder = checkpoint_folder(checkpoint)
    check_folder(source, shape)
    check_checkpoint(folder)
    comparison = Comparison(len(hf_shapes(shape)), *_compare_tensors(source, folder, shape))
    if not tensors_only:
        finite = not comparison.unfinite
        comparison.gap, comparison.tokens = _compare_logprobs(source, folder, shape, parallel, finite)
    return comparison


def _compare_tensors(source: Path, folder: Path, shape: ModelShape) -> tuple[list[str], list[str]]:
    """Return the lines of ``Comparison``: of tensors that differ, and of tensors that are not finite."""
    theirs, ours = folder_weights(source), MegatronFolder(folder, shape)
    differing, unfinite = [], []
    for rule in rules(shape)[dist.get_rank() :: dist.get_world_size()]:
        for name in rule.names:
            wanted, got = theirs(name), ours.read(name)
            if wanted.dtype != got.dtype:
                wanted = wanted.to(got.dtype)  # the dtype requested at import
            bits = _BITS[got.itemsize]
            if (differ := wanted.view(bits) != got.view(bits)).any():  # NaN is not equal to itself, but its bits are
                gap = (wanted[differ].double() - got[differ].double()).abs().max()
                differing.append(f"{name}: {int(differ.sum())} of {got.numel()} elements, by up to {gap:.3g}")
            if not is_finite(got):
                unfinite.append(describe(name, got))
    every = all_gather_objects((differing, unfinite))
    differing, unfinite = (sorted(line for part in every for line in part[kind]) for kind in (0, 1))
    return differing, unfinite


def _compare_logprobs(
    source: Path, folder: Path, shape: ModelShape, parallel: Parallel, finite: bool
) -> tuple[float, int]:
    """Return (largest gap in nats, tokens) between transformers on rank 0 and Megatron-Core on all ranks.

    Unless all weights are ``finite``, tokens without a finite log-prob on either side are excluded.
    """
    expected = None
    if dist.get_rank() == 0:
        ids = _text_ids(source, shape)
        expected = (ids, transformers_logprobs(source, ids))
    ids, wanted = all_gather_objects(expected)[0]
    got = policy_logprobs(_policy(folder, shape, parallel), ids)
    compared = finite | (np.isfinite(wanted) & np.isfinite(got))
    return float(gaps(got, wanted)[compared].max(initial=0.0)), int(compared.sum())


def _text_ids(source: Path, shape: ModelShape) -> np.ndarray:
    """Return real text if the folder has a tokenizer, else ids from all over the vocabulary."""
    limit = min(512, shape.max_position)
    if not tokenizer_files(source):
        return np.random.default_rng(0).integers(0, shape.vocab_size, limit).astype(np.int32)
    config = Config(model=Model(hf=str(source)), data=Data(train="none"), trainer=Trainer(steps=1, run_dir="none"))
    return load_tokenizer(config, shape).encode_prompt(Prompt("text", "", (), text=TEXT))[:limit]


def _policy(folder: Path, shape: ModelShape, parallel: Parallel) -> Policy:
    """Build the checkpoint's policy through mcore's own loading."""
    from megatron_dypo.checkpoint.state import restore
    from megatron_dypo.policy.policy import Policy

    with tempfile.TemporaryDirectory() as unused:
        config = Config(
            model=Model(preset="tiny", dtype="fp32"),  # the shape is passed separately
            data=Data(train=unused),
            parallel=parallel,
            objective=Objective(method="sft"),
            trainer=Trainer(steps=1, run_dir=unused),
        )
    layout = init(parallel)
    shapes = hf_shapes(shape)
    policy = Policy(config, shape, layout, lambda name: torch.zeros(shapes[name]))
    restore(policy, folder)
    return policy
