"""What a graded batch looks like, as metrics; the same on every rank."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.records import Group, Kind, Regime
from megatron_dypo.update import Work


def batch_metrics(groups: list[Group], works: list[Work], config: Config) -> dict[str, float | None]:
    """Rewards, regime shares, offline ratio (trained Hard prompts / trained prompts), lengths in tokens.

    ``rollout/entropy`` is the mean surprise of the sampled tokens: an estimate over all responses, where
    ``policy/entropy`` is exact but covers the trained ones only.
    """
    responses = [response for group in groups for response in group.responses]
    trained = {(w, sequence.group): sequence.kind for w, work in enumerate(works) for sequence in work.sequences}
    offline = sum(kind == Kind.TEACHER for kind in trained.values())
    metrics: dict[str, float | None] = {
        "dypo/offline_ratio": offline / len(trained) if trained else None,
        "dypo/hard_without_teacher": sum(group.teacher_indices == () for group in groups),
    }
    for regime in Regime:
        metrics[f"dypo/{regime.name.lower()}_frac"] = sum(group.regime == regime for group in groups) / len(groups)
    if responses:
        tokens = sum(len(response.ids) for response in responses)
        metrics |= {
            "reward/mean": sum(response.reward for response in responses) / len(responses),
            "rollout/response_tokens": tokens / len(responses),
            "rollout/truncated_frac": sum(response.finish_reason == "length" for response in responses)
            / len(responses),
            "rollout/entropy": -sum(float(response.logprobs.sum()) for response in responses) / tokens,
        }
    return metrics | {
        "tokens": sum(len(r.ids) for r in responses)
        + sum(s.loss_tokens for w in works for s in w.sequences if s.kind == Kind.TEACHER)
    }
