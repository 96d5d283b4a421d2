"""Checkpoints: exact at the same layout, the same tensors at any other, written while training continues."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_dypo.checkpoint.catalog import complete_steps, step_folder
from megatron_dypo.checkpoint.manager import Counters
from megatron_dypo.config.schema import Parallel
from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

DISTRIBUTED = {"distributed": True}
EXPERTS = {"expert": 2}  # a layout with this key is a mixture's
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}


@functools.cache
def join(parallel: tuple[tuple[str, int | bool], ...]):
    """Return this rank's layout; the process groups are built once."""
    from megatron_dypo.runtime import distributed

    return distributed.init(Parallel(timeout=60.0, **dict(parallel)))


class Run:
    """A policy on made-up batches, driven as by the training loop."""

    def __init__(self, folder: str, parallel: dict, optimizer: dict, seed: int = 1, **sections):
        from megatron_dypo.checkpoint.manager import Saver
        from megatron_dypo.models.shape import model_shape
        from megatron_dypo.models.sharding import random_weights
        from megatron_dypo.policy.policy import Policy

        shape = "qwen3_moe" if "expert" in parallel else "deep"
        self.config = make_config(shape, parallel=parallel, optimizer=optimizer, **sections)
        self.config.trainer.run_dir = folder
        for key, value in {"steps": 100, "save_every": 1, "keep_checkpoints": 2}.items():
            setattr(self.config.trainer, key, value)
        shape, layout = model_shape(self.config.model), join(tuple(parallel.items()))
        self.policy = Policy(self.config, shape, layout, random_weights(shape, seed=seed))
        self.saver = Saver(self.config, self.policy)

    def step(self, number: int) -> dict:
        from megatron_dypo.training.minibatch import build_minibatches
        from megatron_dypo.training.passes import logprob_passes
        from megatron_dypo.training.step import StepContext, run_updates

        minibatches = build_minibatches(self.policy.layout, make_groups(seed=number), self.config, trace_ids)
        logprob_passes(self.policy, minibatches, self.config)
        return run_updates(self.policy, minibatches, self.config, StepContext(1, 1e-3)).metrics

    def save(self, step: int, score: float | None = None) -> Counters:
        counters = Counters(step=step, weight_version=self.policy.version, skipped_steps=7)
        self.saver.after_step(counters, score, lambda: make_groups(2))
        return counters

    def load(self) -> Counters:
        from megatron_dypo.checkpoint.manager import load_newest

        run_dir = Path(self.config.trainer.run_dir)
        return load_newest(run_dir, complete_steps(run_dir), self.policy)

    def weights(self) -> dict:
        return {name: tensor.float().numpy().copy() for name, tensor in self.policy.named_tensors()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def digests(*folders: Path) -> list[dict[str, str]]:
    """Return a digest of every whole tensor in each checkpoint, read by torch's own reader, without mcore."""
    import torch
    import torch.distributed.checkpoint as dcp

    found = []
    for folder in folders:
        reader = dcp.FileSystemReader(str(folder))
        entries = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        digest = lambda tensor: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()  # noqa: E731
        found.append({name: digest(tensor) for name, tensor in tensors.items()})
    return found


def round_trip(folder: str, parallel: dict, optimizer: dict, model: dict) -> dict:
    """Save after two updates, take two more; load into another policy, take the same two: compare bits."""
    run = Run(folder, parallel, optimizer, model=model)
    run.step(0), run.step(1)
    counters = run.save(2)
    metrics = [run.step(2), run.step(3)]  # while the checkpoint is written
    run.saver.finish(counters)
    other = Run(folder, parallel, optimizer, seed=99, model=model)
    loaded = other.load()
    again = [other.step(2), other.step(3)]
    return {
        "counters": loaded == counters,
        "version": other.policy.version == run.policy.version == 4,
        "metrics": metrics == again,
        "weights": same(run.weights(), other.weights()),
    }


@pytest.mark.parametrize(
    ("ranks", "parallel", "optimizer", "model"),
    [
        (2, {}, {}, {}),
        (4, SEQUENCE, DISTRIBUTED, {}),
        (4, {"pipeline": 2}, DISTRIBUTED, {}),
        (2, VIRTUAL, {}, {}),
        (4, VIRTUAL | {"context": 2}, DISTRIBUTED, {}),
        (2, {}, {}, {"dtype": "bf16"}),
        (2, {}, DISTRIBUTED, {"dtype": "bf16"}),
        (2, EXPERTS, DISTRIBUTED, {}),
    ],
    ids=str,
)
def test_resume_at_the_same_layout_is_bit_equal(ranks, parallel, optimizer, model, tmp_path):
    for result in run_ranks(ranks, round_trip, str(tmp_path), parallel, optimizer, model):
        assert result == {"counters": True, "version": True, "metrics": True, "weights": True}


def first_half(folder: str, parallel: dict, optimizer: dict) -> dict:
    """Make three updates, a checkpoint, and two more updates; return the final full weights."""
    run = Run(folder, parallel, optimizer)
    for number in range(3):
        run.step(number)
    counters = run.save(3)
    run.saver.finish(counters)
    for number in (3, 4):
        run.step(number)
    return run.weights()


def second_half(folder: str, parallel: dict, optimizer: dict) -> dict:
    """Load it at another layout, save it again at once, and make the same two updates."""
    run = Run(folder, parallel, optimizer, seed=99)
    counters = run.load()
    counters.step += 1
    run.saver.after_step(counters, None)
    run.saver.finish(counters)
    for number in (3, 4):
        run.step(number)
    return run.weights()


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, {"tensor": 2, "pipeline": 2}, {}), (1, {}, {})),
        ((2, {}, DISTRIBUTED), (1, {}, DISTRIBUTED)),
        ((1, {}, DISTRIBUTED), (2, {}, DISTRIBUTED)),
        ((4, VIRTUAL | {"context": 2}, DISTRIBUTED), (2, {"tensor": 2}, {})),
        ((2, {"context": 2}, {}), (4, SEQUENCE | VIRTUAL, DISTRIBUTED)),
        ((4, EXPERTS, DISTRIBUTED), (2, {"expert": 1} | SEQUENCE, DISTRIBUTED)),
        ((2, {"expert": 1, "expert_tensor": 2} | SEQUENCE, {}), (2, EXPERTS, DISTRIBUTED)),
    ],
    ids=str,
)
def test_resume_at_another_layout_has_the_same_tensors_and_goes_on_alike(saved, loaded, tmp_path):
    """Weights, reference and moments are bit-equal after passing through the other layout; updates within 1e-5."""
    there = run_ranks(saved[0], first_half, str(tmp_path), *saved[1:])[0]
    here = run_ranks(loaded[0], second_half, str(tmp_path), *loaded[1:])[0]
    before, after = run_ranks(1, digests, *(step_folder(tmp_path, step) for step in (3, 4)))[0]
    assert before == after
    assert {name.rsplit("decoder", 1)[0] for name in before if "decoder" in name} == {
        "",
        "reference.",
        "optimizer.state.exp_avg.",
        "optimizer.state.exp_avg_sq.",
    }
    for name, tensor in there.items():
        assert abs(here[name] - tensor).max() <= 1e-5 * abs(tensor).max(), name


def save_before_any_update(folder: str) -> bool:
    run = Run(folder, {}, {})
    before = run.weights()
    run.saver.finish(run.save(1))
    other = Run(folder, {}, {}, seed=99)
    return other.load().step == 1 and same(before, other.weights())


def test_checkpoint_before_the_first_applied_update_loads(tmp_path):
    assert run_ranks(2, save_before_any_update, str(tmp_path)) == [True, True]


def save_with_scores(folder: str, scores: list) -> list[int]:
    run = Run(folder, {}, {})
    for step, score in enumerate(scores, start=1):
        counters = run.save(step, score)
    run.saver.finish(counters)
    return complete_steps(Path(folder))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    """Of six checkpoints, the two newest and the first with the best held-out accuracy stay."""
    assert run_ranks(2, save_with_scores, str(tmp_path), [0.1, 0.7, 0.7, None, 0.2, None])[0] == [2, 5, 6]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


def damage(folder: str, file: str) -> dict:
    """Damage ``file`` of the newer of two checkpoints; return what is loaded, and the log."""
    import torch.distributed as dist

    run = Run(folder, {}, {})
    run.step(0)
    run.saver.finish(run.save(1))
    weights = run.weights()
    run.step(1)
    run.saver.finish(run.save(2))
    steps = complete_steps(Path(folder))
    dist.barrier()  # before the damage
    if dist.get_rank() == 0:
        path = step_folder(Path(folder), 2) / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_dypo").addHandler(handler)
    other = Run(folder, {}, {}, seed=99)
    from megatron_dypo.checkpoint.manager import load_newest

    loaded = load_newest(Path(folder), steps, other.policy)
    return {"step": loaded.step, "said": said, "weights": same(weights, other.weights())}


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "in_flight.jsonl"])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before_and_names_the_file(file, tmp_path):
    results = run_ranks(2, damage, str(tmp_path), file)
    assert all(result["step"] == 1 and result["weights"] for result in results)
    (line,) = results[0]["said"]
    assert str(step_folder(tmp_path, 2) / file) in line and "checksum" in line
    assert results[1]["said"] == [], "one rank speaks"


def every_checkpoint_damaged(folder: str) -> str:
    from megatron_dypo.errors import TrainingError

    run = Run(folder, {}, {})
    run.saver.finish(run.save(1))
    state = step_folder(Path(folder), 1) / "state.json"
    state.write_text(state.read_text().replace("7", "8"))
    try:
        run.load()
    except TrainingError as error:
        return str(error)
    return ""


def test_without_an_undamaged_checkpoint_a_run_does_not_start_anew(tmp_path):
    assert "every checkpoint is damaged" in run_ranks(1, every_checkpoint_damaged, str(tmp_path))[0]
    assert (tmp_path / "checkpoints" / "step_1").exists()


def test_incomplete_checkpoints_are_ignored(tmp_path):
    run_ranks(1, save_with_scores, str(tmp_path), [None, None])
    data = next((tmp_path / "checkpoints" / "step_2").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert complete_steps(tmp_path) == [1], "a truncated file"
    (tmp_path / "checkpoints" / "step_1" / "manifest.json").unlink()
    assert complete_steps(tmp_path) == [], "no manifest"


def full_disk(folder: str) -> list[list[int]]:
    """Return the checkpoints after saves of steps 1 to 3, with no room at step 2."""
    run, kept = Run(folder, {}, {}), []
    run.config.trainer.save_every = 2
    real = shutil.disk_usage
    for step in (1, 2, 3):
        if step == 2:
            shutil.disk_usage = lambda path: real(path)._replace(free=10)
        counters = run.save(step)
        run.saver._complete(wait=True)
        shutil.disk_usage = real
        kept.append(complete_steps(Path(folder)))
    run.saver.finish(counters)
    return kept


def test_a_save_without_room_is_tried_again_at_the_next_step(tmp_path):
    assert run_ranks(2, full_disk, str(tmp_path))[0] == [[], [], [3]]


def test_counters_survive_their_file():
    counters = Counters(step=3, weight_version=2, skipped_steps=1, grad_norms=[0.1], flush_norms=[0.3])
    counters.queue = [("a", (1, 0)), ("b", (2,)), ("a", (0, 1))]
    state = json.loads(json.dumps(asdict(counters)))
    assert Counters.of(state | {"score": None}) == counters
    of_before = {name: state[name] for name in state if name not in ("grad_norms", "flush_norms", "queue")}
    assert Counters.of(of_before | {"norms": [0.1]}) == replace(counters, flush_norms=[], queue=[])


def saved_at_once(folder: str, parallel: dict, optimizer: dict) -> dict:
    """Write one state in a thread and then blocking, in pieces of 3 kB; resume from the second."""
    from megatron_dypo.checkpoint import state

    run = Run(folder, parallel, optimizer)
    run.step(0), run.step(1)
    run.saver.finish(run.save(2))
    copied, plain, state.PIECE = [], state._on_host, 3000
    state._on_host = lambda tensor: copied.append(tensor.nbytes) or plain(tensor)
    run.config.trainer.save_blocking = True
    counters = run.save(3)
    at_once = run.saver._pending.written.done()
    run.saver.finish(counters)
    metrics = run.step(2)
    other = Run(folder, parallel, optimizer, seed=99)
    loaded = other.load()
    return {
        "largest": max(copied) <= 3000 and len(copied) > 20,
        "at once": at_once,
        "counters": loaded == counters,
        "metrics": metrics == other.step(2),
        "weights": same(run.weights(), other.weights()),
    }


@pytest.mark.parametrize(
    ("ranks", "parallel", "optimizer"),
    [
        (2, {}, DISTRIBUTED),
        pytest.param(2, EXPERTS, DISTRIBUTED, marks=pytest.mark.faults),
        pytest.param(4, SEQUENCE, DISTRIBUTED, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_a_save_that_training_waits_for_writes_the_same_tensors_piece_by_piece(ranks, parallel, optimizer, tmp_path):
    for result in run_ranks(ranks, saved_at_once, str(tmp_path), parallel, optimizer):
        assert all(result.values()), result
    before, after = run_ranks(1, digests, step_folder(tmp_path, 2), step_folder(tmp_path, 3))[0]
    assert before == after


def test_a_piece_of_a_snapshot_is_written_without_a_copy_and_let_go_of(tmp_path):
    import io
    import tracemalloc
    import weakref
    from collections import deque

    import torch

    from megatron_dypo.checkpoint.io import TensorPiece, write_pieces
    from megatron_dypo.checkpoint.manager import _taken

    size = 2**20
    kept = deque(
        (TensorPiece(str(i), (size,), (0,), (size,), torch.float32), torch.full((size,), float(i))) for i in range(6)
    )
    held, alive = [weakref.ref(tensor) for _, tensor in kept], []
    buffer = io.BytesIO()
    torch.save(kept[0][1], buffer)

    def watched():
        for piece in _taken(kept):
            alive.append(sum(tensor() is not None for tensor in held))
            yield piece
            del piece

    tracemalloc.start()
    written = write_pieces(tmp_path / "file", watched())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size, "bytes: a quarter of a piece"
    assert alive == [6, 6, 5, 4, 3, 2], "each is freed when the next arrives"
    content = (tmp_path / "file").read_bytes()
    assert content[: len(buffer.getbuffer())] == buffer.getvalue(), "as torch writes it by itself"
    assert written.sha256 == hashlib.sha256(content).hexdigest() and written.size == len(content)


def test_a_save_at_once_asks_for_all_pieces_though_the_disk_is_full_or_none_is_its_own():
    """Otherwise the ranks that hold parts of them would wait for this one."""
    from megatron_dypo.checkpoint.manager import _at_once

    asked = []

    def write(pieces) -> list:
        next(pieces)
        raise OSError("no space left")

    done = _at_once(write, (asked.append(i) for i in range(5)))
    assert isinstance(done.exception(), OSError) and asked == [0, 1, 2, 3, 4]
    assert _at_once(lambda pieces: [], (asked.append(i) for i in range(2))).result() == [] and asked[5:] == [0, 1]
