"""How old the weights behind a response may be when it is first trained on."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import TrainingError
from megatron_dypo.records import Group


def check_staleness(groups: list[Group], version: int, config: Config) -> None:
    """Raises TrainingError where a response is older than ``rollout.max_staleness`` has it.

    ``version``: optimizer updates behind the policy that is about to train on the groups.
    """
    limit = _limit(config)
    if limit is None:
        return
    for group in groups:
        for response in group.responses:
            if response.weight_version < version - limit:
                raise TrainingError(
                    f"prompt {group.prompt.id}: a response was sampled from weights of version "
                    f"{response.weight_version} and the policy is at version {version}, "
                    f"more than rollout.max_staleness: {limit} updates later"
                )


def _limit(config: Config) -> int | None:
    """In optimizer updates; None where nothing is checked."""
    rollout = config.rollout
    if rollout.max_staleness is not None or rollout.engine == "replay":
        return rollout.max_staleness
    return config.objective.updates_per_rollout if rollout.async_rollout else 0
