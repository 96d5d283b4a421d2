"""How far the weights that are trained are from those that sampled: log-probs, versions, and what is done about it."""

from __future__ import annotations

import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import ratio_unit
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.update.work import Work

DECADES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # nats, lower bounds; fp32 agrees to 1e-6, bf16 to 1e-2
SHARE_KEYS = tuple(f"rollout/mismatch_share/{bound:g}" for bound in DECADES)


def agreement_metrics(policy: Policy, works: list[Work], config: Config) -> dict[str, float]:
    """Metrics of the step's trained responses, all its mini-batches together; the same on every rank.

    rollout/mismatch_mean|max|kl and the share of tokens in each decade: the old policy's log-probs beside the engine's.
    rollout/staleness_mean|max: optimizer updates between the weights that sampled a response and those that train it
    first, whichever is newer (a replay that skipped a step is behind its recording). rollout/corrected_frac, with a
    rollout correction: tokens whose weight in GRPO is capped or 0. Empty where no response is trained. Reads
    ``work.logp`` and ``work.sums``.
    """
    correction = Correction(config.rollout.correction, config.rollout.correction_cap)
    totals, largest = _totals(policy, works, correction)
    count = totals["tokens"]
    if not count:
        return {}
    stale = [abs(policy.version - version) for work in works for version in _weight_versions(work)]
    metrics = {
        "rollout/mismatch_mean": totals["gap"] / count,
        "rollout/mismatch_max": largest,
        "rollout/mismatch_kl": totals["kl"] / count,
        **{key: totals[key] / count for key in SHARE_KEYS},
        "rollout/staleness_mean": sum(stale) / len(stale),
        "rollout/staleness_max": max(stale),
    }
    if correction.kind != "none":
        by_response = config.objective.ratio_level == "sequence"
        corrected = _corrected_responses(works, config, correction) if by_response else totals["corrected"]
        metrics["rollout/corrected_frac"] = corrected / count
    return metrics


def _totals(policy: Policy, works: list[Work], correction: Correction) -> tuple[dict[str, float], float]:
    """Sums over the tokens of all ranks, and the largest gap (nats)."""
    log_ratios = [torch.zeros(0)]
    if policy.layout.speaks_for_tokens:
        for work in works:
            pairs = zip(work.logp["old"], work.logp["rollout"], strict=True)
            log_ratios += [old_N.cpu() - rollout_N for old_N, rollout_N in pairs]
    log_ratio_N = torch.cat(log_ratios)
    signed_N = log_ratio_N.double()
    gap_N = signed_N.abs()
    decade_N = torch.bucketize(gap_N, torch.tensor(DECADES[1:], dtype=torch.float64), right=True)
    mine = {
        "tokens": len(gap_N),
        "gap": gap_N.sum().item(),
        "kl": (signed_N.exp() - signed_N - 1).sum().item(),
        "corrected": correction.binds(log_ratio_N).sum().item(),
        **dict(zip(SHARE_KEYS, torch.bincount(decade_N, minlength=len(DECADES)).tolist(), strict=True)),
    }
    everyone = all_gather_objects((mine, gap_N.max().item() if len(gap_N) else 0.0))
    totals = {name: sum(part[name] for part, _ in everyone) for name in mine}
    return totals, max(largest for _, largest in everyone)


def _corrected_responses(works: list[Work], config: Config, correction: Correction) -> int:
    """Tokens of the responses whose one weight, that of a sequence-level ratio, is corrected."""
    corrected = 0
    for work in works:
        for sequence, sums in zip(work.sequences, work.sums, strict=True):
            if sums is not None:
                tokens = sequence.loss_tokens
                log_ratio = (sums.old - sums.rollout) * ratio_unit(config.objective, tokens)
                corrected += tokens * correction.binds(torch.tensor(log_ratio, dtype=torch.float64)).item()
    return corrected


def _weight_versions(work: Work) -> list[int]:
    """Of the trained responses."""
    rollouts = [sequence for sequence in work.sequences if sequence.kind == Kind.ROLLOUT]
    return [work.groups[sequence.group].responses[sequence.sample].weight_version for sequence in rollouts]
