"""What a graded batch looks like, as metrics; the same on every rank."""

from __future__ import annotations

from megatron_dypo.records import Group, Kind, Regime
from megatron_dypo.update.work import Work


def batch_metrics(groups: list[Group], works: list[Work]) -> dict[str, float | None]:
    """Rewards, regime shares, offline ratio (trained Hard prompts / trained prompts), lengths in tokens.

    ``rollout/entropy`` is the mean surprise of the sampled tokens: an estimate over all responses, where
    ``policy/entropy`` is exact but covers the trained ones only.
    """
    responses = [response for group in groups for response in group.responses]
    traces = [sequence for work in works for sequence in work.sequences if sequence.kind == Kind.TEACHER]
    trained = {(w, sequence.group): sequence.kind for w, work in enumerate(works) for sequence in work.sequences}
    offline = sum(kind == Kind.TEACHER for kind in trained.values())
    sampled = sum(len(response.ids) for response in responses)
    metrics: dict[str, float | None] = {
        "tokens": sampled + sum(sequence.loss_tokens for sequence in traces),
        "dypo/offline_ratio": offline / len(trained) if trained else None,
        "dypo/hard_without_teacher": sum(group.teacher_indices == () for group in groups),
    }
    if responses:
        truncated = sum(response.finish_reason == "length" for response in responses)
        metrics |= {
            "reward/mean": sum(response.reward for response in responses) / len(responses),
            "rollout/response_tokens": sampled / len(responses),
            "rollout/truncated_frac": truncated / len(responses),
            "rollout/entropy": -sum(float(response.logprobs.sum()) for response in responses) / sampled,
        }
        for regime in Regime:
            metrics[f"dypo/{regime.name.lower()}_frac"] = sum(g.regime == regime for g in groups) / len(groups)
    return metrics
