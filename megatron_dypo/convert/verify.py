"""``convert verify``: whether a Megatron checkpoint and a Hugging Face folder are the same model, with the evidence.

Two proofs that do not rest on each other. Every tensor, unfolded by our table, is compared bit for bit. And the model
that Megatron-Core itself loads from the checkpoint, at any layout, must give the log-probs of a text that transformers
gives: a table that is wrong both ways fails here.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.config.checks import check_layout
from megatron_dypo.config.schema import Config, Data, Model, Objective, Parallel, Trainer
from megatron_dypo.convert.commands import check_checkpoint, source_folder
from megatron_dypo.convert.hf_folder import check_folder, folder_weights
from megatron_dypo.convert.mapping import hf_shapes, rules
from megatron_dypo.convert.megatron_folder import MegatronFolder, checkpoint_folder
from megatron_dypo.convert.tokenizer_files import tokenizer_files
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.distributed import all_gather_objects, init, join, training_backend, world_size

TOLERANCE = 1e-4  # nats, fp32, on log-probs
NAMED = 8  # differing tensors that are named
TEXT = """\
A baker sells 48 rolls in the morning, and half as many in the afternoon. How many rolls does she sell that day? In the
afternoon she sells 48 / 2 = 24 rolls. Altogether she sells 48 + 24 = 72 rolls, so the answer is \\boxed{72}.
Let f(x) = x^2 - 5x + 6; its roots are 2 and 3, since (x - 2)(x - 3) = x^2 - 5x + 6. Überprüfen wir das:
4 - 10 + 6 = 0 und 9 - 15 + 6 = 0. 因此方程的两个根是 2 和 3。 def square(n: int) -> int: return n * n
"""


@dataclass
class Comparison:
    """``differing``: a line for each tensor that is not the same; ``gap``: of log-probs, in nats, over ``tokens``."""

    tensors: int
    differing: list[str] = field(default_factory=list)
    gap: float | None = None
    tokens: int = 0

    @property
    def equal(self) -> bool:
        return not self.differing and (self.gap is None or self.gap <= TOLERANCE)

    def lines(self) -> list[str]:
        """What to print."""
        found = [f"differs: {line}" for line in self.differing[:NAMED]]
        if len(self.differing) > NAMED:
            found.append(f"differs: {len(self.differing) - NAMED} more tensors")
        if not self.differing:
            found.append(f"tensors: all {self.tensors} are equal, bit for bit")
        if self.gap is not None:
            verdict = "at most" if self.gap <= TOLERANCE else f"more than {TOLERANCE:g} nats from transformers':"
            found.append(f"log-probs: {self.tokens} tokens of text, {verdict} {self.gap:.2g} nats apart (fp32)")
        return [*found, "verified: the same model" if self.equal else "NOT the same model"]


def verify(hf: str, checkpoint: Path, parallel: Parallel, tensors_only: bool) -> Comparison:
    """Compare; collective over the ranks of ``parallel``, which share the tensors out and build the model together.

    ``tensors_only`` leaves the log-probs out: they need the whole model in transformers, in fp32, on rank 0. Raises
    UserError where either cannot be read.
    """
    source, shape = source_folder(hf)
    if not tensors_only:
        check_layout(parallel, shape, world_size(), "convert verify")
    join(parallel.timeout, "gloo" if tensors_only else training_backend())
    folder = checkpoint_folder(checkpoint)
    check_folder(source, shape)
    check_checkpoint(folder)
    comparison = Comparison(len(hf_shapes(shape)), _differing_tensors(source, folder, shape))
    if not tensors_only:
        comparison.gap, comparison.tokens = _compare_logprobs(source, folder, shape, parallel)
    return comparison


def _differing_tensors(source: Path, folder: Path, shape: ModelShape) -> list[str]:
    theirs, ours = folder_weights(source), MegatronFolder(folder, shape)
    found = []
    for rule in rules(shape)[dist.get_rank() :: dist.get_world_size()]:
        for name in rule.names:
            wanted, got = theirs(name), ours.read(name)
            if wanted.dtype != got.dtype:
                wanted = wanted.to(got.dtype)  # asked for at import
            if not torch.equal(wanted, got):
                gap = (wanted.double() - got.double()).abs()
                found.append(f"{name}: {int((gap > 0).sum())} of {gap.numel()} elements, by up to {gap.max():.3g}")
    return sorted(line for part in all_gather_objects(found) for line in part)


def _compare_logprobs(source: Path, folder: Path, shape: ModelShape, parallel: Parallel) -> tuple[float, int]:
    """(largest gap, tokens) between transformers on rank 0 and Megatron-Core on all ranks."""
    expected = None
    if dist.get_rank() == 0:
        ids = _text_ids(source, shape)
        expected = (ids, _transformers_logprobs(source, ids))
    ids, wanted = all_gather_objects(expected)[0]
    got = _megatron_logprobs(folder, shape, parallel, ids)
    got = next(part for part in all_gather_objects(got) if part is not None)
    gap = float(np.abs(got - wanted).max())
    return (gap if np.isfinite(gap) else float("inf")), len(wanted)


def _text_ids(source: Path, shape: ModelShape) -> np.ndarray:
    """Real text where the folder has a tokenizer, else ids all over the vocabulary."""
    limit = min(512, shape.max_position)
    if not tokenizer_files(source):
        return np.random.default_rng(0).integers(0, shape.vocab_size, limit).astype(np.int32)
    config = Config(model=Model(hf=str(source)), data=Data(train="none"), trainer=Trainer(steps=1, run_dir="none"))
    return load_tokenizer(config, shape).encode_prompt(Prompt("text", "", (), text=TEXT))[:limit]


def _transformers_logprobs(source: Path, ids: np.ndarray) -> np.ndarray:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
    row = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        logp = model(row).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(1, row[0, 1:, None]).squeeze(1).numpy()


def _megatron_logprobs(folder: Path, shape: ModelShape, parallel: Parallel, ids: np.ndarray) -> np.ndarray | None:
    """On one rank; None on the others. The weights come through mcore's own loading of the checkpoint."""
    from megatron_dypo.batching.micro_batch import MicroBatch
    from megatron_dypo.checkpoint.state import restore
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.records import Kind, Sequence

    with tempfile.TemporaryDirectory() as unused:
        config = Config(
            model=Model(preset="tiny", dtype="fp32"),  # the shape is given beside it
            data=Data(train=unused),
            parallel=parallel,
            objective=Objective(method="sft"),
            trainer=Trainer(steps=1, run_dir=unused),
        )
    layout = init(parallel)
    shapes = hf_shapes(shape)
    policy = Policy(config, shape, layout, lambda name: torch.zeros(shapes[name]))
    restore(policy, folder)
    sequence = Sequence(ids, 1, Kind.TEACHER, 0, 0)
    batch = MicroBatch.pack([sequence], [0], 1.0, **layout.packing)
    logp = policy.logprobs([batch] * layout.micro_batch_multiple)
    mine = dict(zip(batch.tail_N.tolist(), logp[0].tolist(), strict=True)) if layout.speaks_for_tokens else {}
    every: dict[int, float] = {}
    for part in all_gather_objects(mine):
        every |= part
    return np.array([every[token] for token in range(len(ids) - 1)]) if layout.rank == 0 else None
