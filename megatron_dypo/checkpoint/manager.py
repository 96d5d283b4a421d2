"""Asynchronous checkpoints: snapshot to host memory, write in a thread, commit once every rank is done; and loading.

Loading takes the newest checkpoint whose files are undamaged. ``Counters``, a run's counts between steps, are saved as
``state.json``. With ``trainer.save_blocking`` the step itself writes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
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
from megatron_dypo.runtime.measure import Stopwatch
from megatron_dypo.runtime.process import in_thread
from megatron_dypo.runtime.recent import RECENT

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """A run's counters; everything else it draws is a hash of seed, step and prompt.

    ``grad_norms`` are those of the last applied updates, oldest first, and ``flush_norms`` those of updates on the
    queue: JSON keeps every bit of them, so a resumed run judges the next norm as the uninterrupted one would. ``queue``
    holds the prompts waiting for such an update (objectives/queue.py).
    """

    step: int = 0
    weight_version: int = 0
    stage_version: int = 0  # the weight version at which the current stage of the run began
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
        """Count a finished step: the norms of its applied updates, and the prompts left waiting.

        An empty step neither extends nor ends a run of skipped ones.
        """
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
        """Return the counters of a ``state.json``, including one written before a field existed."""
        state = {"stage_version": 0, "grad_norms": state.get("norms"), "flush_norms": [], "queue": []} | state
        state["queue"] = [(prompt, tuple(teachers)) for prompt, teachers in state["queue"]]
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def begin_stage(self, weight_version: int) -> None:
        """Reset what belongs to the previous stage: Adam's count, gradient norms of its objective, and its queue."""
        self.stage_version, self.grad_norms, self.flush_norms, self.queue = weight_version, [], [], []

    def metrics(self) -> dict[str, float]:
        return {"train/skipped_steps": self.skipped_steps, "train/empty_steps": self.empty_steps}


def load_newest(run_dir: Path, steps: list[int], policy: Policy, side: Policy | None = None) -> Counters:
    """Load the newest undamaged checkpoint of ``steps``; warn about each damaged one. Collective.

    Raises TrainingError if none is left: the user decides whether to train from the start in their place.
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

    Raises TrainingError if mcore cannot read them, UserError if ``.metadata`` holds more than plain data.
    """
    state = json.loads((folder / "state.json").read_text())
    counters = Counters.of(state)
    read_index(folder / ".metadata")
    policy.begin_stage(stage_at(stages_of(policy.config), counters.step).config)  # the stage of its last step
    policy.version, policy.stage_version = counters.weight_version, counters.stage_version
    try:
        restore(policy, folder)
        if side:
            side.version = state["side_version"]
            restore(side, folder, SIDE)
    except (CheckpointException, CheckpointingException) as error:  # the first is not an Exception, so reports miss it
        raise TrainingError(f"{folder}: {error}") from error
    return counters


_Piece = tuple[TensorPiece, Tensor]
_PARTIAL = ".partial-"  # prefix of folders that are not (or no longer) checkpoints; removed when a run starts


@dataclass
class _Pending:
    """A save in progress. ``written`` receives the files that this rank wrote, or the OSError."""

    folder: Path
    state: dict
    written: Future[list[WrittenFile]]


def _taken(kept: deque[_Piece]) -> Iterator[_Piece]:
    """Yield the pieces, releasing each one once it is written."""
    while kept:
        yield kept.popleft()


def _at_once(write: Callable[[Iterator[_Piece]], list[WrittenFile]], pieces: Iterator[_Piece]) -> Future:
    """Return the finished result of ``write(pieces)``; drain the pieces it leaves, because other ranks may wait."""
    done: Future[list[WrittenFile]] = Future()
    try:
        done.set_result(write(pieces))
    except OSError as error:
        done.set_exception(error)
    for _ in pieces:
        pass
    return done


class Saver:
    """Saves the run's checkpoints. Methods are collective: every rank calls them at the same steps.

    A failed save (a full disk) leaves older checkpoints untouched, is logged, and is retried at the next step.
    ``clock`` measures the seconds that saving blocked the loop.
    """

    def __init__(self, config: Config, policy: Policy, side: Policy | None = None):
        self._trainer, self._timeout, self._policy = config.trainer, config.parallel.timeout, policy
        self._run_dir = Path(config.trainer.run_dir)
        models = {"": policy} | ({SIDE: side} if side else {})
        self._models = {name: (model, exchange_holders(model)) for name, model in models.items()}
        self._pending: _Pending | None = None
        self._retry = False
        self._score: float | None = None
        self.clock = Stopwatch("save")
        if dist.get_rank() == 0:
            for left_over in self._run_dir.glob(f"checkpoints/{_PARTIAL}*"):
                shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier()

    def after_step(
        self,
        counters: Counters,
        score: float | None,
        prefetched: Callable[[], Sequence[Group]] = list,
        last: bool = False,
    ) -> None:
        """Commit what has been written; save if ``trainer.save_every`` is due, or after the ``last`` step.

        ``score`` is this step's held-out accuracy, if it was evaluated: the best checkpoint is kept. ``prefetched``
        returns the groups already sampled for the next step, and is collective. ``last``: the run stops after this.
        """
        with self.clock():
            self._complete(wait=False)
            every, step = self._trainer.save_every, counters.step
            due = every and (step % every == 0 or step == self._trainer.steps or self._retry)
            if due or last:
                self._complete(wait=True)
                self._score = score
                self._save(counters, score, prefetched())

    def finish(self, counters: Counters) -> None:
        """Wait for the save in progress. Raises TrainingError if the last one could not be written in two attempts."""
        self._complete(wait=True)
        if self._retry:
            self._save(counters, self._score)
            self._complete(wait=True)
        if self._retry:
            raise TrainingError(f"the checkpoint of step {counters.step} could not be written; see the warning above")
        if dist.get_rank() == 0:
            self._prune()  # in case a kill right after the last rename prevented it

    def _save(self, counters: Counters, score: float | None, prefetched: Sequence[Group] = ()) -> None:
        """Take a snapshot and start writing it; with ``trainer.save_blocking`` write at once, without a snapshot."""
        own = sum(written_bytes(*model) for model in self._models.values())
        total = sum(all_gather_objects(own))
        folder = self._on_rank_0(lambda: self._make_folder(counters.step, total))
        if folder is None:
            return
        name = f"__{dist.get_rank()}_0.distcp"
        waiting = [replace(group) for group in prefetched]  # copied: the next step grades them meanwhile

        def write(pieces: Iterator[_Piece]) -> list[WrittenFile]:
            files = [write_pieces(folder / name, pieces)] if own else []
            if waiting and dist.get_rank() == 0:
                files.append(write_file(folder / PREFETCHED, recording.lines(waiting).encode()))
            return files

        state = asdict(counters) | {"score": score, "model": asdict(self._policy.shape)}
        if SIDE in self._models:
            side, _ = self._models[SIDE]
            state |= {"side_version": side.version, "side_model": asdict(side.shape)}
        if self._trainer.save_blocking:
            parts = (host_pieces(*model, name) for name, model in self._models.items())
            written = _at_once(write, chain.from_iterable(parts))
        else:
            kept = deque(piece for name, model in self._models.items() for piece in snapshot(*model, name))
            written = in_thread(lambda: write(_taken(kept)), "checkpoint-writer")
        self._pending = _Pending(folder, state, written)

    def _complete(self, wait: bool) -> None:
        """Commit the save in progress as a checkpoint if all ranks have written; with ``wait``, wait for them."""
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
        """Rename the folder to its final name and prune older checkpoints."""
        final = step_folder(self._run_dir, pending.state["step"])
        if final.exists():  # damaged: a run that skipped it has reached this step again
            _remove(final)
        os.replace(pending.folder, final)
        sync_folder(final.parent)
        self._prune()
        return final

    def _prune(self) -> None:
        """Remove all checkpoints but the newest ``trainer.keep_checkpoints`` and the best."""
        steps = complete_steps(self._run_dir)
        scores = {step: score for step in steps if (score := _score(step_folder(self._run_dir, step))) is not None}
        best = max(scores, key=lambda step: (scores[step], -step), default=None)
        for step in steps[: -self._trainer.keep_checkpoints]:
            if step != best:
                _remove(step_folder(self._run_dir, step))

    def _make_folder(self, step: int, total: int) -> Path:
        """Make a new folder to write to; raise OSError if the disk has no room for ``total`` bytes."""
        checkpoints = self._run_dir / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(checkpoints).free
        if free < total:
            raise OSError(f"{checkpoints}: {total} bytes are needed and {free} are free")
        # A unique name: a frozen rank of an earlier launch may still be writing to its own.
        folder = checkpoints / f"{_PARTIAL}step_{step}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return folder

    def _on_rank_0(self, action: Callable[[], Path], folder: Path | None = None) -> Path | None:
        """Return ``action``'s path on all ranks; on failure, warn, remove ``folder`` and return None."""
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
            log.warning("checkpoint not written; older ones are kept, the next step tries again: %s", fault)
        return path


def _remove(folder: Path) -> None:
    """Remove a folder after renaming it: a kill halfway leaves nothing that looks like a damaged checkpoint."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _score(folder: Path) -> float | None:
    """Return the checkpoint's held-out accuracy; None if it has none or its file is damaged."""
    if find_fault(folder, ["state.json"]):
        return None
    return json.loads((folder / "state.json").read_text())["score"]
