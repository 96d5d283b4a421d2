"""Which regime trains on what, per recipe: the table behind ``objective.method``.

``group`` = the k sampled responses (GRPO and GAL), ``teacher`` = drawn teacher traces (SFT), absent = dropped. A recipe
that never looks at a group needs no rollouts. ``alpha`` fixes the GRPO share where the recipe has no GAL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dypo.records import Regime


@dataclass(frozen=True)
class Recipe:
    routes: dict[Regime, str] = field(default_factory=dict)
    alpha: float | None = None
    samples: bool = True

    def route(self, regime: Regime | None) -> str | None:
        return self.routes.get(regime) if self.samples else "teacher"


RECIPES = {
    "dypo": Recipe({Regime.MID: "group", Regime.HARD: "teacher"}),
    "grpo": Recipe({Regime.MID: "group"}, alpha=1.0),
    "sft": Recipe(samples=False),
}
