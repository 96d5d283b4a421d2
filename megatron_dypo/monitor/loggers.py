"""Fan out a step's metrics to the loggers that the configuration enables. Rank 0 only.

``metrics.jsonl`` is the record (``metrics_file.py``); these are copies of it for the tools people already use. The
report's panels become TensorBoard's layout of the tab "Custom scalars".
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_dypo.config.schema import Config, Logging
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.panels import EVALUATION, TABLE, Panel


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """Return heading -> panel -> ["Multiline", tags], as ``SummaryWriter.add_custom_scalars`` takes it.

    Tags are regular expressions: an exact name, or the prefix of a family of names. TensorBoard has no stacked areas,
    bands or log axes here: every curve is a line, and its "smoothing" slider gives the running mean.
    """
    layout = {heading: {panel.title: _chart(panel) for panel in panels} for heading, panels in TABLE.items()}
    layout["Learning"][EVALUATION] = ["Multiline", ["^eval/.*(accuracy|avg@[0-9]+|pass@[0-9]+)$"]]
    return layout


def _chart(panel: Panel) -> list[Any]:
    if panel.family:
        return ["Multiline", [f"^{panel.family}"]]
    return ["Multiline", [f"^{re.escape(curve.key)}$" for curve in panel.curves]]


class Writer(Protocol):
    """A destination for one step's metrics (numbers, by their documented names)."""

    name: str

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbWriter:
    """Weights & Biases. The run's id is kept in ``run_dir/wandb_id``, so a resumed run continues the same curves.

    Never prompts, and never touches the network offline. Raises UserError if ``online`` has no credentials or no
    connection.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, run_dir: Path, resume_step: int) -> None:
        offline = config.logging.wandb == "offline"
        if offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports use the network
        import wandb

        if not offline and not wandb.login(prompt=False, verify=False):
            raise UserError("logging.wandb: online needs WANDB_API_KEY or `wandb login`; or use logging.wandb=offline")
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                dir=str(run_dir),
                name=run_dir.resolve().name,
                id=_wandb_id(run_dir / "wandb_id"),
                mode=config.logging.wandb,
                resume=None if offline else "allow",  # offline, the equal id joins the parts at `wandb sync`
                config=config.model_dump(),
                settings=wandb.Settings(console="off", quiet=True, disable_git=True, silent=offline),
            )
        except wandb.Error as error:
            raise UserError(f"logging.wandb: {' '.join(str(error).split())}") from None
        # Not wandb's own step counter: it rejects the steps that a resume from an older checkpoint repeats.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({**_finite(metrics), "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoardWriter:
    """Event files in ``run_dir/tensorboard``; on resume, later steps of the stopped run are hidden.

    The tab "Custom scalars" has the report's panels.
    """

    name = "TensorBoard"

    def __init__(self, config: Config, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step > 0 else None
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self._events.add_custom_scalars(tensorboard_layout())

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in _finite(metrics).items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


WRITERS: tuple[tuple[Callable[[Logging], bool], Callable[[Config, Path, int], Writer]], ...] = (
    (lambda logging: logging.wandb != "off", WandbWriter),
    (lambda logging: logging.tensorboard, TensorBoardWriter),
)


class Writers:
    """All writers that ``config.logging`` enables, as one; the others are not imported.

    A writer that fails during training (a full disk, a lost connection) is dropped: metrics.jsonl has every step.
    """

    def __init__(self, config: Config, run_dir: str | Path, resume_step: int = 0) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._writers = [writer(config, run_dir, resume_step) for wanted, writer in WRITERS if wanted(config.logging)]

    def write(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Write one step; return a line about each writer that failed and is dropped."""
        failures = {writer: error for writer in self._writers if (error := _failure(writer.write, step, metrics))}
        for writer in failures:
            self._writers.remove(writer)
            _failure(writer.close)
        return [
            f"{writer.name} failed and is dropped at step {step}, training continues: {error}"
            for writer, error in failures.items()
        ]

    def close(self) -> list[str]:
        """Close all writers; return a line about each one that failed."""
        failures = {writer: error for writer in self._writers if (error := _failure(writer.close))}
        return [f"{writer.name} was not closed properly: {error}" for writer, error in failures.items()]


def _failure(action: Callable[..., None], *arguments: Any) -> str | None:
    """Return the error of an action, or None. Loggers raise anything, and none of it may end a training run."""
    try:
        action(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that a curve can show: not the step, null, infinite or NaN."""
    numbers = {name: float(value) for name, value in metrics.items() if value is not None and name != "step"}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _wandb_id(path: Path) -> str:
    """Return the run's id, read from ``path`` or newly drawn and written there."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
