"""Build the second model that a recipe trains alongside the policy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_dypo.config.schema import Config
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.training.process_rewards import ProcessRewards
from megatron_dypo.training.side_model import SideModel
from megatron_dypo.training.token_values import TokenValues

SIDES: dict[str, type[SideModel]] = {"critic": TokenValues, "prm": ProcessRewards}


def build_side(
    config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]
) -> SideModel | None:
    """Return the recipe's second model, or None. ``read_weights`` gives the policy's weights."""
    side = recipe(config.objective).side
    return SIDES[side](config, shape, layout, read_weights) if side else None
