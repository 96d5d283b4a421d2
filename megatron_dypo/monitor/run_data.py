"""The report's input: the files of a run folder, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.metrics_file import read_metrics


@dataclass(frozen=True)
class Run:
    """One run: ``steps[n]`` and a float64 column [n] per metric, NaN if a step lacks it or has null.

    ``config`` is the configuration as written (``config_text``), empty if the folder has none.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    config: dict[str, Any]
    config_text: str
    environment_text: str

    @property
    def label(self) -> str:
        """Return the name, and the recipe if it differs from the name."""
        method = ", ".join(dict.fromkeys(map(str, self.settings("objective", "method"))))
        return f"{self.name} ({method})" if method and method != self.name else self.name

    def known(self, key: str) -> np.ndarray:
        """Return the metric's finite values, in order; empty if the run has none."""
        return finite(self.columns.get(key))

    def setting(self, section: str, key: str) -> Any:
        """Return a configuration key's value, the last stage's if stages set their own; None if absent."""
        return next(reversed(self.settings(section, key)), None)

    def settings(self, section: str, key: str) -> list[Any]:
        """Return the values of a configuration key: the run's, and those of its stages."""
        stages = self.config.get("stages")
        parts = [self.config, *(stages if isinstance(stages, list) else ())]
        sections = [part.get(section) for part in parts if isinstance(part, dict)]
        return [values[key] for values in sections if isinstance(values, dict) and key in values]


def read_runs(folders: list[Path]) -> list[Run]:
    """Return the runs, named by the shortest distinct endings of their paths.

    Raises UserError if a folder is given twice, if metrics are missing, empty or unreadable, or if a configuration is
    not YAML.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UserError(f"{folder}: given twice")
    return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def finite(column: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if column is None else column[np.isfinite(column)]


def is_share(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _names(folders: list[Path]) -> list[str]:
    """Return the last parts of the paths, as few as keep them different."""
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{folder / 'metrics.jsonl'}: no step has been written yet")
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    config_text = _text(folder / "config.yaml")
    return Run(
        name=name,
        folder=folder,
        rows=rows,
        steps=np.array([row["step"] for row in rows]),
        columns={key: np.array([_float(row.get(key)) for row in rows]) for key in keys},
        config=_config(folder / "config.yaml", config_text),
        config_text=config_text,
        environment_text=_text(folder / "environment.json"),
    )


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _text(path: Path) -> str:
    """Return the text of a file in the run folder; "" if it does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return tree if isinstance(tree, dict) else {}
