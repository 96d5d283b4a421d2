"""The report's panels as a layout of TensorBoard's tab "Custom scalars"."""

from __future__ import annotations

import re
from typing import Any

from megatron_dypo.monitor.panels import EVALUATION, LEARNING, OPTIMISATION, ROLLOUT, SPEED, Panel


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """Heading -> panel -> ["Multiline", tags], as ``SummaryWriter.add_custom_scalars`` takes it.

    Tags are regular expressions, so each is an exact name. TensorBoard has no stacked areas, bands or log axes here:
    every curve is a line, and the box "smoothing" gives the running mean.
    """
    tables = {"Learning": LEARNING, "Optimisation": OPTIMISATION, "Rollout": ROLLOUT, "Speed": SPEED}
    layout = {heading: {panel.title: _chart(panel) for panel in panels} for heading, panels in tables.items()}
    layout["Learning"][EVALUATION] = ["Multiline", ["^eval/.*(accuracy|avg@[0-9]+|pass@[0-9]+)$"]]
    return layout


def _chart(panel: Panel) -> list[Any]:
    return ["Multiline", [f"^{re.escape(curve.key)}$" for curve in panel.curves]]
