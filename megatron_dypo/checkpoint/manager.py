"""Checkpoints: a snapshot written in a thread, or written at once; committed when all ranks are done; and loading.

Loading takes the newest checkpoint whose files are what was written. ``Counters`` is what a run counts between its
steps, kept as ``state.json``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.checkpoint.catalog import PREFETCHED, SIDE, complete_steps, find_fault, none_left, step_folder
from megatron_dypo.checkpoint.io import (
    TensorPiece,
    WrittenFile,
    read_index,
    shared_fault,
    write_file,
    write_index,
    write_pieces,
)
from megatron_dypo.checkpoint.state import exchange_holders, host_pieces, restore, snapshot, written_bytes
from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import stage_at, stages_of
from megatron_dypo.errors import TrainingError
from megatron_dypo.objectives.queue import Waiting
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group
from megatron_dypo.rollout import recording
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.runtime.fs import sync_folder
from megatron_dypo.runtime.process import in_thread
from megatron_dypo.runtime.recent import RECENT

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a run counts; everything else it draws is a hash of seed, step and prompt.

    ``grad_norms`` are those of the last applied updates, oldest first, and ``flush_norms`` those of updates on the
    queue: JSON keeps every bit of them, so that a resumed run judges the next norm as the uninterrupted one would.
    ``queue`` is what waits for such an update (objectives/queue.py).
    """

    step: int = 0
    weight_version: int = 0
    stage_version: int = 0  # the weight version that the present stage of the run began with
    skipped_steps: int = 0
    empty_steps: int = 0
    skipped_in_a_row: int = 0
    grad_norms: list[float] = field(default_factory=list)
    flush_norms: list[float] = field(default_factory=list)
    queue: list[Waiting] = field(default_factory=list)

    def count(
        self,
        step: int,
        weight_version: int,
        skipped: bool,
        empty: bool,
        grad_norms: Sequence[float] = (),
        flush_norms: Sequence[float] = (),
        queue: Sequence[Waiting] = (),
    ) -> None:
        """A finished step, with the norms of its applied updates, and what it left waiting. An empty one neither adds
        to nor ends a row of skipped ones."""
        self.step, self.weight_version = step, weight_version
        self.skipped_steps += skipped
        self.empty_steps += empty
        if not empty:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.grad_norms = [*self.grad_norms, *grad_norms][-RECENT:]
        self.flush_norms = [*self.flush_norms, *flush_norms][-RECENT:]
        self.queue = list(queue)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Counters:
        """Those of a ``state.json``, also of one of before a field was there."""
        state = {"stage_version": 0, "grad_norms": state.get("norms"), "flush_norms": [], "queue": []} | state
        state["queue"] = [(prompt, tuple(teachers)) for prompt, teachers in state["queue"]]
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def begin_stage(self, weight_version: int) -> None:
        """Adam counts anew, gradient norms of another objective do not count, and what waited is the old stage's."""
        self.stage_version, self.grad_norms, self.flush_norms, self.queue = weight_version, [], [], []

    def metrics(self) -> dict[str, float]:
        return {"train/skipped_steps": self.skipped_steps, "train/empty_steps": self.empty_steps}


def load_newest(run_dir: Path, steps: list[int], policy: Policy, side: Policy | None = None) -> Counters:
    """Load the newest of the checkpoints ``steps`` that is undamaged; warn of each damaged one. Collective.

    Raises TrainingError where none is left: training from the start in their place is for the user to decide.
    """
    for step in reversed(steps):
        folder = step_folder(run_dir, step)
        fault = shared_fault(folder)
        if fault is None:
            return _load(folder, policy, side)
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the checkpoint before", fault)
    raise TrainingError(none_left(run_dir))


def _load(folder: Path, policy: Policy, side: Policy | None) -> Counters:
    """Restore weights, optimizer and reference exactly, at any layout, and a second model's; collective.

    Raises TrainingError where mcore cannot read them, UserError where ``.metadata`` holds more than plain data.
    """
    state = json.loads((folder / "state.json").read_text())
    counters = Counters.of(state)
    read_index(folder / ".metadata")
    policy.begin_stage(stage_at(stages_of(policy.config), counters.step).config)  # whose last step it was saved after
    policy.version, policy.stage_version = counters.weight_version, counters.stage_version
    try:
        restore(policy, folder)
        if side:
            side.version = state["side_version"]
            restore(side, folder, SIDE)
    except (CheckpointException, CheckpointingException) as error:  # the first is no Exception: reports would miss it
        raise TrainingError(f"{folder}: {error}") from error
    return counters


_Piece = tuple[TensorPiece, Tensor]
_PARTIAL = ".partial-"  # what is not, or no longer, a checkpoint; removed when a run starts


@dataclass
class _Pending:
    """A save under way. ``written`` gets the files that this rank wrote, or the OSError."""

    folder: Path
    state: dict
    written: Future[list[WrittenFile]]


def _taken(kept: deque[_Piece]) -> Iterator[_Piece]:
    """What is in it, which is let go of once it is written."""
    while kept:
        yield kept.popleft()


def _at_once(write: Callable[[Iterator[_Piece]], list[WrittenFile]], pieces: Iterator[_Piece]) -> Future:
    """``write(pieces)``, now. What it leaves is asked for nevertheless: other ranks may wait for this one."""
    done: Future[list[WrittenFile]] = Future()
    try:
        done.set_result(write(pieces))
    except OSError as error:
        done.set_exception(error)
    for _ in pieces:
        pass
    return done


class Saver:
    """The run's checkpoints. Its methods are collective: every rank calls them at the same steps.

    A failed save (a full disk) leaves the older checkpoints as they are, is logged, and is tried again at the next
    step.
    """

    def __init__(self, config: Config, policy: Policy, side: Policy | None = None):
        self._trainer, self._timeout, self._policy = config.trainer, config.parallel.timeout, policy
        self._run_dir = Path(config.trainer.run_dir)
        models = {"": policy} | ({SIDE: side} if side else {})
        self._models = {name: (model, exchange_holders(model)) for name, model in models.items()}
        self._pending: _Pending | None = None
        self._retry = False
        self._score: float | None = None
        self._seconds = 0.0  # that the loop was held up since `take_seconds`
        if dist.get_rank() == 0:
            for left_over in self._run_dir.glob(f"checkpoints/{_PARTIAL}*"):
                shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier()

    def after_step(
        self, counters: Counters, score: float | None, prefetched: Sequence[Group] = (), last: bool = False
    ) -> None:
        """Complete what has been written, and save where ``trainer.save_every`` says so, or, whatever that says,
        after the ``last`` step before a stop.

        ``score`` is this step's held-out accuracy, if it was evaluated: the best checkpoint is kept. ``prefetched`` is
        what has been sampled for the next step already.
        """
        began = time.perf_counter()
        self._complete(wait=False)
        every, step = self._trainer.save_every, counters.step
        due = every and (step % every == 0 or step == self._trainer.steps or self._retry)
        if due or last:
            self._complete(wait=True)
            self._score = score
            self._save(counters, score, prefetched)
        self._seconds += time.perf_counter() - began

    def finish(self, counters: Counters) -> None:
        """Wait for the save under way. Raises TrainingError where the last one could not be written, tried twice."""
        self._complete(wait=True)
        if self._retry:
            self._save(counters, self._score)
            self._complete(wait=True)
        if self._retry:
            raise TrainingError(f"the checkpoint of step {counters.step} could not be written; see the warning above")
        if dist.get_rank() == 0:
            self._prune()  # a kill right after the last checkpoint got its name left this undone

    def take_seconds(self) -> float:
        """Seconds that saving held up the loop since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _save(self, counters: Counters, score: float | None, prefetched: Sequence[Group] = ()) -> None:
        """Take a snapshot and start writing it; with ``trainer.save_blocking`` write now, without one."""
        own = sum(written_bytes(*model) for model in self._models.values())
        total = sum(all_gather_objects(own))
        folder = self._on_rank_0(lambda: self._make_folder(counters.step, total))
        if folder is None:
            return
        name = f"__{dist.get_rank()}_0.distcp"
        waiting = [replace(group) for group in prefetched]  # the next step grades them while the thread writes

        def write(pieces: Iterator[_Piece]) -> list[WrittenFile]:
            files = [write_pieces(folder / name, pieces)] if own else []
            if waiting and dist.get_rank() == 0:
                files.append(write_file(folder / PREFETCHED, recording.lines(waiting).encode()))
            return files

        state = asdict(counters) | {"score": score, "model": asdict(self._policy.shape)}
        if SIDE in self._models:
            state["side_version"] = self._models[SIDE][0].version
        if self._trainer.save_blocking:
            parts = (host_pieces(*model, name) for name, model in self._models.items())
            written = _at_once(write, chain.from_iterable(parts))
        else:
            kept = deque(piece for name, model in self._models.items() for piece in snapshot(*model, name))
            written = in_thread(lambda: write(_taken(kept)), "checkpoint-writer")
        self._pending = _Pending(folder, state, written)

    def _complete(self, wait: bool) -> None:
        """Turn the save under way into a checkpoint, once all ranks have written (``wait``: when they have)."""
        if self._pending is None:
            return
        pending = self._pending
        mine: tuple[str, list[WrittenFile] | str] | None = None
        if wait or pending.written.done():
            try:
                mine = ("written", pending.written.result(self._timeout))
            except OSError as error:
                mine = ("failed", str(error))
            except TimeoutError:
                mine = ("failed", f"not written within parallel.timeout: {self._timeout:g} s")
        everyone = all_gather_objects(mine)
        if None in everyone:
            return
        self._pending = None
        failures = [f"rank {rank}: {result[1]}" for rank, result in enumerate(everyone) if result[0] == "failed"]
        parts = [part for result in everyone if result[0] == "written" for part in result[1]]

        def commit() -> Path:
            if failures:
                raise OSError("; ".join(failures))
            write_index(pending.folder, parts, pending.state)
            return self._publish(pending)

        self._on_rank_0(commit, pending.folder)

    def _publish(self, pending: _Pending) -> Path:
        """Give the folder its name and let go of older checkpoints, but for the newest and the best."""
        final = step_folder(self._run_dir, pending.state["step"])
        if final.exists():  # damaged: a run that skipped it has come to this step again
            _remove(final)
        os.replace(pending.folder, final)
        sync_folder(final.parent)
        self._prune()
        return final

    def _prune(self) -> None:
        """Remove the checkpoints beyond the newest and the best."""
        steps = complete_steps(self._run_dir)
        scores = {step: score for step in steps if (score := _score(step_folder(self._run_dir, step))) is not None}
        best = max(scores, key=lambda step: (scores[step], -step), default=None)
        for step in steps[: -self._trainer.keep_checkpoints]:
            if step != best:
                _remove(step_folder(self._run_dir, step))

    def _make_folder(self, step: int, total: int) -> Path:
        """A new folder to write to; OSError where the disk has no room for ``total`` bytes."""
        checkpoints = self._run_dir / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(checkpoints).free
        if free < total:
            raise OSError(f"{checkpoints}: {total} bytes are needed and {free} are free")
        # A name of its own: a rank of an earlier launch that was frozen then may still be writing to that one's.
        folder = checkpoints / f"{_PARTIAL}step_{step}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return folder

    def _on_rank_0(self, action: Callable[[], Path], folder: Path | None = None) -> Path | None:
        """``action``'s path on all ranks; None, and a warning, where it failed, and then ``folder`` is removed."""
        outcome: tuple[Path | None, str] | None = None
        if dist.get_rank() == 0:
            try:
                outcome = action(), ""
            except OSError as error:
                outcome = None, str(error)
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
        path, fault = all_gather_objects(outcome)[0]
        self._retry = path is None
        if fault and dist.get_rank() == 0:
            log.warning("checkpoint not written, older ones are kept, next try at the next step: %s", fault)
        return path


def _remove(folder: Path) -> None:
    """Under another name first: a kill in the middle leaves no folder that looks like a damaged checkpoint."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _score(folder: Path) -> float | None:
    """The checkpoint's held-out accuracy; None where it has none, or where the file that holds it is damaged."""
    if find_fault(folder, ["state.json"]):
        return None
    return json.loads((folder / "state.json").read_text())["score"]
