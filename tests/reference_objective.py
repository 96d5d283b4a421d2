"""The objective as its page states it, to test the package against: whole batch, float64, torch's autograd.

Written from docs/objective.md and the paper (Eq. 14, 15, 20-24), importing nothing of megatron_dypo: neither its
coefficients and slopes nor its two passes are used here. ``c`` is any object with the keys of the configuration's
``objective`` section. Legend: n tokens of one response or trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass
class Rollout:
    """A sampled response: its reward, each token's log-prob [n] under the four policies and its entropy, in nats."""

    reward: float
    logp_n: Tensor
    old_n: Tensor
    reference_n: Tensor
    engine_n: Tensor
    entropy_n: Tensor
    finished: bool = True
    advantage_n: Tensor | None = None  # per token, from a second model


@dataclass
class Trace:
    """A teacher's trace: each token's log-prob and entropy [n], and its reward, if any."""

    logp_n: Tensor
    entropy_n: Tensor
    reward: float | None = None


@dataclass
class Question:
    """A prompt's k rollouts, and each teacher trace drawn for it (maybe none)."""

    rollouts: list[Rollout]
    traces: list[Trace]


@dataclass
class Terms:
    """Summands of each term with every normaliser applied, but without alpha, gamma and mu.

    ``kl`` is part of ``grpo``; ``shaped`` is LUFFY's on traces, ``expert`` CHORD's, ``sign`` SRFT's on rollouts.
    """

    alpha: float
    gamma: float
    mu: float
    grpo: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    gal: list[Tensor] = field(default_factory=list)
    sft: list[Tensor] = field(default_factory=list)
    shaped: list[Tensor] = field(default_factory=list)
    expert: list[Tensor] = field(default_factory=list)
    sign: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)

    def summands(self) -> Tensor:
        """Return all summands of L (Eq. 24), one per token or pair."""
        weighted = [
            (self.alpha, self.grpo),
            (1 - self.alpha, self.gal),
            (self.gamma, self.sft),
            (1.0, self.shaped),
            (self.mu, self.expert),
            (1.0, self.sign),
            (1.0, self.entropy),
        ]
        return torch.cat([torch.zeros(1).double(), *(w * x.flatten() for w, term in weighted for x in term)])


def regime(
    rewards: list[float], threshold: float, hard_max_solved: int, gate: str = "reward", easy: int | None = None
) -> str:
    """Return the regime (paper 3.1); a gate on advantages is shut if all responses are equal (SuperRL's variant)."""
    solved = sum(reward >= threshold for reward in rewards)
    if gate == "advantage":
        return "hard" if len(set(rewards)) == 1 else "easy" if solved == len(rewards) else "mid"
    if solved >= (len(rewards) if easy is None else easy):
        return "easy"
    return "hard" if solved <= hard_max_solved else "mid"


def advantages(rewards: list[float], std: str, xi: float = 1e-6) -> list[float]:
    """Return the advantages of Eq. 22."""
    k = len(rewards)
    mean = sum(rewards) / k
    if std == "none" or len(set(rewards)) == 1:
        return [0.0 if len(set(rewards)) == 1 else reward - mean for reward in rewards]
    variance = sum((reward - mean) ** 2 for reward in rewards) / (k if std == "population" else k - 1)
    return [(reward - mean) / (variance**0.5 + xi) for reward in rewards]


def gal_pairs(scores: list[Tensor], rewards: list[float], beta: float) -> list[Tensor]:
    """Return -log sigmoid(beta d) of every pair (s, f) with r_s > r_f (Eq. 14, 15)."""
    k = range(len(rewards))
    return [-logsigmoid(beta * (scores[s] - scores[f])) for s in k for f in k if rewards[s] > rewards[f]]


def surrogate(log_ratio: Tensor, advantage: float | Tensor, logp: Tensor, c) -> Tensor:
    """Return CLIP of Eq. 21; CISPO (arXiv 2506.13585, Eq. 4); SAPO (arXiv 2511.20347)."""
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    if c.surrogate == "cispo":
        return bounded.detach() * advantage * logp
    if c.surrogate == "sapo":
        A = torch.as_tensor(advantage, dtype=torch.float64)
        tau = (A > 0).double() * c.sapo_tau_pos + (A <= 0).double() * c.sapo_tau_neg
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    return torch.minimum(ratio * advantage, bounded * advantage)


def shape(logp: Tensor, kind: str, gamma: float) -> Tensor:
    """Return f of a token's probability p: LUFFY's, p itself, its logarithm, or that weighted by CHORD's constants."""
    p = logp.exp()
    return {
        "luffy": p / (p + gamma),
        "p": p,
        "nll": logp,
        "phi": (p * (1 - p)).detach() * logp,
        "sg_p": p.detach() * logp,
    }[kind]


def trust(log_ratio: Tensor, correction: str, cap: float, floor: float | None = None) -> Tensor:
    """Return the rollout correction's weight, from log(old / engine)."""
    ratio = log_ratio.exp()
    if correction == "truncate":
        return ratio.clamp(max=cap)
    one = torch.ones_like(ratio)
    if correction == "none":
        return one
    low = 1 / cap if floor is None else floor
    return torch.where((low <= ratio) & (ratio <= cap), one if correction == "mask" else ratio, 0.0)


def grpo(rollout: Rollout, advantage: float, c, correction: str, cap: float) -> tuple[Tensor, Tensor]:
    """Return (surrogate [n], KL [n]) of a response's tokens, with the correction's weight.

    With one ratio per response each of its tokens carries that surrogate. Under `scale: trajectory` it counts once.
    """
    n = len(rollout.logp_n)
    base_n = rollout.old_n if c.ratio_base == "old" else rollout.reference_n
    trust_n = trust(rollout.old_n - rollout.engine_n, correction, cap)
    gap_n = rollout.reference_n - rollout.logp_n
    kl_n = trust_n * (gap_n.exp() - gap_n - 1)
    if c.ratio_level == "token" or c.method in ("ppo", "prime"):
        return trust_n * surrogate(rollout.logp_n - base_n, advantage, rollout.logp_n, c), kl_n
    unit = 1 / n if c.scale == "token" else 1.0
    weight = trust(unit * (rollout.old_n - rollout.engine_n).sum(), correction, cap)
    score, base = unit * rollout.logp_n.sum(), unit * base_n.sum()
    value = weight * surrogate(score - base, advantage, score, c)
    once = c.aggregation == "scale" and c.scale == "trajectory"
    return value.expand(n) / (n if once else 1), kl_n


def mix(c, step: int) -> float:
    """Return CHORD's mu (arXiv 2508.11408): linear up, half a cosine down."""
    since = step - c.mix.warmup
    if since < 0:
        return step / c.mix.warmup * c.mix.peak
    fallen = min(since / c.mix.decay, 1.0) if c.mix.decay else 1.0
    return c.mix.peak - (c.mix.peak - c.mix.valley) * (1 - math.cos(math.pi * fallen)) / 2


def leaning(sequence: Rollout | Trace, tilt: float, c) -> Tensor:
    """Return SRFT's constant weight [n] of a sequence's tokens, from the entropies or (HPT's form) their mean."""
    H_n = sequence.entropy_n.detach()
    return (tilt * (H_n if c.tilt_level == "token" else H_n.mean().expand(len(H_n)))).exp()


def dypo(
    questions: list[Question],
    c,
    correction: str = "none",
    cap: float = 2.0,
    longest: int = 8192,
    experts: Sequence[Trace] = (),
    step: int = 1,
) -> Terms:
    """Return L = (1/Q) sum_q [Hard: gamma SFT | Mid: alpha (1/k) sum_i GRPO_i + (1 - alpha) GAL | Easy: 0] (Eq. 24).

    For ``relift`` this is the step's own update; the one on its queue is an update of ``sft``.
    """
    pairs_too, srft = c.method == "dypo", c.method == "srft"
    mu = mix(c, step) if c.method == "chord" else 0.0
    terms = Terms(alpha=c.alpha if pairs_too else 1.0 - mu, gamma=c.gamma, mu=mu)
    groups, taught, idle = [], [], 0
    for question in questions:
        rewards = [rollout.reward for rollout in question.rollouts]
        limits = c.reward_threshold, c.hard_max_solved, c.gate, c.easy_min_solved
        kind = "hard" if c.method == "sft" else regime(rewards, *limits)
        if srft:
            groups.append((question.rollouts, question.traces))
            taught += [question.traces] if question.traces else []
            idle += not question.traces and c.mask_truncated and not any(x.finished for x in question.rollouts)
        elif (
            kind == "mid"
            or c.method in ("chord", "grpo", "luffy", "ppo", "relift")
            or (c.method == "switch" and kind == "easy")
        ):
            members = question.traces if c.method == "luffy" else []
            groups.append((question.rollouts, members))
            tied = c.method != "ppo" and len({*rewards, *(trace.reward for trace in members)}) == 1
            shown = [rollout for rollout in question.rollouts if rollout.finished or not c.mask_truncated]
            held = (c.kl_coef and shown) or (c.entropy_coef and (shown or members))
            idle += not held and (tied or not (shown or members))
        elif kind == "hard" and c.method not in ("grpo", "ppo", "prime") and question.traces:
            taught.append(question.traces)
    Q = len(questions) if c.normalize == "all" else len(groups) - idle + len(taught) * (not srft)

    def carries(member: Rollout | Trace) -> bool:
        return not c.mask_truncated or getattr(member, "finished", True)

    routed = [member for group in groups for members in group for member in members if carries(member)]
    tokens = sum(len(member.logp_n) for member in routed)
    routed += [*(trace for traces in taught for trace in traces if not srft), *experts]
    all_tokens = sum(len(sequence.logp_n) for sequence in routed)
    terms.entropy = [-c.entropy_coef * sequence.entropy_n / all_tokens for sequence in routed]

    def per_token(override: bool | None) -> bool:
        return c.scale == "token" if override is None else override

    for traces in taught:
        for trace in traces:
            unit = 1 / len(trace.logp_n) if per_token(c.sft_length_normalize) else 1.0
            of_all = len(taught) / sum(len(x.logp_n) for each in taught for x in each)
            weight = of_all if c.demo_aggregation == "token_mean" else unit / len(traces)
            weight *= leaning(trace, c.tilt_demo, c) if srft else 1.0
            terms.sft.append(-trace.logp_n * weight / Q)

    for trace in experts:  # a batch of their own: one mean over all their tokens, or over the traces
        n, all_n = len(trace.logp_n), sum(len(each.logp_n) for each in experts)
        unit = 1 / n if per_token(c.sft_length_normalize) else 1.0
        weight = 1 / all_n if c.demo_aggregation == "token_mean" else unit / len(experts)
        terms.expert.append(-weight * shape(trace.logp_n, c.shape or "nll", c.shape_gamma))

    def weigh(n: int, k: int) -> float:
        if c.aggregation == "scale":
            return 1 / (Q * k * n) if c.scale == "token" else 1 / (Q * k)
        if c.aggregation == "token_mean":  # these groups' share of the prompts, times one mean over all their tokens
            return len(groups) / Q / tokens
        return 1 / (Q * k * (c.aggregation_constant or longest))

    for group, traces in groups:
        rewards = [rollout.reward for rollout in group]
        baseline = [*rewards, *(trace.reward for trace in traces)]
        if len(set(baseline)) == 1 and not c.kl_coef and c.method not in ("ppo", "prime") and not srft:
            continue  # all advantages are 0, and there is no pair
        A_k = advantages(baseline, c.advantage_std)
        if c.method in ("ppo", "prime"):
            A_k = [rollout.advantage_n for rollout in group]
        k = len(A_k)
        for trace, advantage in zip(traces, A_k[len(group) :], strict=True):
            f_n = shape(trace.logp_n, c.shape or ("p" if srft else "luffy"), c.shape_gamma)
            terms.shaped.append(-weigh(len(f_n), k) * advantage * f_n)
        for rollout, advantage in zip(group, A_k, strict=False):
            if not carries(rollout):
                continue
            weight = weigh(len(rollout.logp_n), k)
            if srft:
                right = rollout.reward >= c.reward_threshold
                weigh_n = c.weight_right * leaning(rollout, c.tilt_right, c) if right else -1.0
                terms.sign.append(-weight * weigh_n * rollout.logp_n)
                continue
            surrogate_n, kl_n = grpo(rollout, advantage, c, correction, cap)
            terms.grpo.append(weight * (-surrogate_n + c.kl_coef * kl_n))
            terms.kl.append(weight * kl_n)
        if not pairs_too:
            continue
        scores, rewards = [], [rollout.reward for rollout in group if carries(rollout)]
        for rollout in filter(carries, group):
            unit = 1 / len(rollout.logp_n) if per_token(c.gal_length_normalize) else 1.0
            scores.append(unit * (rollout.logp_n - rollout.reference_n).sum())
        pairs = gal_pairs(scores, rewards, c.beta_gal)
        terms.gal += [value / len(pairs) / Q for value in pairs]
    return terms
