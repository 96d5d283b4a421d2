"""Compute a case's numbers with the training code: grading, ``sequence_terms`` and the grouped loss, in float64.

Legend: n tokens of one sequence, N of all sequences of one kind.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.cases.process import process_advantages, process_update
from megatron_dypo.cases.values import value_advantages, value_update
from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.errors import UserError
from megatron_dypo.kernels.grouped_loss import COEFFICIENTS
from megatron_dypo.objectives import SequenceSums, TokenStreams, sequence_terms
from megatron_dypo.objectives.coefficients import member_advantages, needs_entropies, needs_reference
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.queue import failed
from megatron_dypo.objectives.recipes import ALL, has_ratio, recipe, scheduled, total, update_terms
from megatron_dypo.records import Group, Kind, Prompt, Response, Sequence, Teacher
from megatron_dypo.rollout.sampling import give_unfinished_reward
from megatron_dypo.training.minibatch import grade_groups, training_sequences

SOURCES = {"rollout": Kind.ROLLOUT, "demo": Kind.TEACHER, "expert": Kind.EXPERT}
_IMITATION = torch.tensor([name in ("nll", "tilt") for name in COEFFICIENTS])
STREAMS = {
    "logp": "logp",
    "old": "old_logp",
    "reference": "ref_logp",
    "entropy": "entropy",
    "process": "prm_logp",
    "value": "value",
    "old_value": "old_value",
}


class Case:
    """The sequences of one update and the groups they form; ``logs[i]`` are sequence i's streams [n]."""

    def __init__(self, sequences: list[dict[str, Any]], config: Config) -> None:
        self.sequences, self.objective = sequences, config.objective
        self.logs = [_logs(place, sequence) for place, sequence in enumerate(sequences)]
        self.members: dict[Any, dict[Kind, list[int]]] = {}  # indices by prompt and kind; each expert is by itself
        for place, sequence in enumerate(sequences):
            source = sequence.get("source")
            if source not in SOURCES:
                raise UserError(f"sequences[{place}].source: {source!r} is not one of {', '.join(SOURCES)}")
            name = f"expert {place}" if source == "expert" else sequence.get("prompt")
            self.members.setdefault(name, {kind: [] for kind in Kind})[SOURCES[source]].append(place)
        self.groups = [self._group(str(prompt), kinds) for prompt, kinds in self.members.items()]
        sampled = [group for group in self.groups if group.responses]
        # Traces alone, in a recipe that queues prompts, are an update on the queue, whose groups have no grade.
        self.deferred = recipe(self.objective).defers and not sampled
        for response in (response for group in sampled for response in group.responses):
            give_unfinished_reward(response, config)
        for group in sampled:  # one by one: a group may list more responses than another
            grade_groups([group], config.objective, 0, 1, lambda group: [])

    def _group(self, name: str, kinds: dict[Kind, list[int]]) -> Group:
        responses = [
            Response(self._ids(place), self._ids(place), self._end(place), self.reward(place))
            for place in kinds[Kind.ROLLOUT]
        ]
        demos = kinds[Kind.TEACHER] + kinds[Kind.EXPERT]
        scored = demos if recipe(self.objective).scores_traces else []
        return Group(
            Prompt(name, "", tuple(Teacher(f"demo {i}", "") for i in range(len(demos)))),
            np.zeros(1, np.int32),
            responses,
            teacher_indices=tuple(range(len(demos))),
            teacher_rewards=tuple(self.reward(place) for place in scored),
            expert=bool(kinds[Kind.EXPERT]),
        )

    def _ids(self, place: int) -> np.ndarray:
        return np.zeros(len(self.logs[place]["logp"]), np.int32)

    def reward(self, place: int) -> float:
        """Return a sequence's reward; 1 if the case gives none."""
        reward = self.sequences[place].get("reward")
        return 1.0 if reward is None else float(reward)

    def _end(self, place: int) -> str:
        finished = self.sequences[place].get("finished", True)
        if not isinstance(finished, bool):
            raise UserError(f"sequences[{place}].finished: expected true or false, got {finished!r:.80}")
        return "stop" if finished else "length"

    def place(self, sequence: Sequence) -> int:
        """Return the index of a training sequence in the case."""
        return list(self.members.values())[sequence.group][sequence.kind][sequence.sample]

    def trained(self) -> list[Sequence]:
        """Return the sequences that get a coefficient."""
        prompts = list(self.members.values())
        index = {id(group): g for g, group in enumerate(self.groups)}

        def trace(group: Group, i: int) -> np.ndarray:
            return self._ids(prompts[index[id(group)]][Kind.EXPERT if group.expert else Kind.TEACHER][i])

        return training_sequences(self.groups, self.objective, trace, self.deferred)

    def stream(self, name: str, places: list[int]) -> Tensor | None:
        """Return one stream of the sequences [N]; None if a sequence lacks it."""
        parts = [self.logs[place][name] for place in places if name in self.logs[place]]
        return torch.cat(parts) if len(parts) == len(places) else None


def _logs(place: int, sequence: dict[str, Any]) -> dict[str, Tensor]:
    logs = {}
    for name, given in STREAMS.items():
        if given in sequence:
            values = sequence[given]
            good = isinstance(values, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
            if not good or len(values) != len(sequence.get("logp", values)):
                raise UserError(f"sequences[{place}].{given}: expected a number for each token of logp")
            logs[name] = torch.tensor(values, dtype=torch.float64)
    if "logp" not in logs or not len(logs["logp"]):
        raise UserError(f"sequences[{place}].logp: needed, a number for each token")
    return logs


def evaluate(sequences: list[dict[str, Any]], config: Config, step: int) -> dict[str, Any]:
    """Return loss, derivatives, rewards, advantages and routes of an update at ``step``, under the names in a case's
    ``expected``.
    """
    case, objective = Case(sequences, config), config.objective
    trained = case.trained()
    places = [case.place(sequence) for sequence in trained]
    sums = [_sums(case, place, sequence, objective) for place, sequence in zip(places, trained, strict=True)]
    if (reader := _reads_entropies(objective)) and any("entropy" not in case.logs[place] for place in places):
        raise UserError(f"sequences: entropy is needed by {reader}")
    means = [case.logs[place]["entropy"].mean().item() for place in places] if needs_entropies(objective) else None
    terms = sequence_terms(
        case.groups,
        trained,
        sums,
        objective,
        Correction(),
        max_response_tokens=1,
        step=step,
        deferred=case.deferred,
        entropies=means,
    )
    of_tokens = _of_tokens(case)
    beyond_tokens = {"grpo": terms.grpo_sequence_loss, "gal": terms.gal_loss}
    loss = total(dict.fromkeys(terms.share, 0.0) | beyond_tokens, terms.share)
    slopes: dict[str, dict[int, list[float]]] = {"dloss_dlogp": {}, "dloss_dentropy": {}, "nll_weight_of_token": {}}
    for kind in Kind:
        chosen = [i for i, sequence in enumerate(trained) if sequence.kind == kind]
        at = [places[i] for i in chosen]
        if not chosen:
            continue
        rollout = kind == Kind.ROLLOUT
        logp_N, entropy_N = torch.cat([case.logs[place]["logp"] for place in at]), case.stream("entropy", at)
        streams = TokenStreams.of(
            [terms.sequences[i] for i in chosen],
            [trained[i].loss_tokens for i in chosen],
            dtype=torch.float64,
            objective=objective,
            correction=Correction(),
            share=terms.share,
            old_N=case.stream("old", at) if rollout else None,
            rollout_N=case.stream("old", at) if rollout else None,
            reference_N=case.stream("reference", at) if rollout and needs_reference(objective) else None,
            advantage_N=torch.cat([of_tokens["advantages"][place] for place in at]) if of_tokens else None,
        )
        summands_N, *parts = streams.terms(logp_N, entropy_N, slice(0, len(logp_N)))
        loss += summands_N.sum().item()
        weighed = replace(streams, coefficients_CS=streams.coefficients_CS * _IMITATION.unsqueeze(1), old_N=None)
        _, weight_N, *_ = weighed.terms(logp_N, entropy_N, slice(0, len(logp_N)))
        by_name = dict(zip(("dloss_dlogp", "dloss_dentropy"), parts, strict=False)) | {"nll_weight_of_token": -weight_N}
        for name, slope_N in by_name.items():
            pieces = slope_N.split([trained[i].loss_tokens for i in chosen])
            slopes[name] |= {place: piece.tolist() for place, piece in zip(at, pieces, strict=True)}

    def listed(found: dict[int, list[float]]) -> list[list[float]]:
        return [found.get(place, [0.0] * len(case.logs[place]["logp"])) for place in range(len(sequences))]

    result = {"loss": loss, "dloss_dlogp": listed(slopes["dloss_dlogp"])}
    if all("entropy" in logs for logs in case.logs):
        result["dloss_dentropy"] = listed(slopes["dloss_dentropy"])
    if recipe(objective).has("tilted"):
        result["nll_weight_of_token"] = listed(slopes["nll_weight_of_token"])
    more = scheduled(objective, step) | _rewards(case) | _advantages(case) | _routes(case) | _queued(case)
    if "returns" in of_tokens:
        weights = dict(zip(places, (each.grpo for each in terms.sequences), strict=True))
        more |= _value_update(case, of_tokens["returns"], weights)
    return result | more | {name: [each_n.tolist() for each_n in found] for name, found in of_tokens.items()}


def learn(sequences: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Return the update of a process reward model on a case's responses."""
    case = Case(sequences, config)
    return process_update(*_ratios(case), config.objective)


def _streams(case: Case, reader: str, *names: str) -> list[list[Tensor]]:
    """Return these streams of all sequences of a case, each a list of [n]. Raises UserError if one is missing."""
    for place, logs in enumerate(case.logs):
        for name in names:
            if name not in logs:
                raise UserError(f"sequences[{place}].{STREAMS[name]}: needed by {reader}")
    return [[logs[name] for logs in case.logs] for name in names]


def _rewards_of(case: Case) -> list[float]:
    return [case.reward(place) for place in range(len(case.logs))]


def _ratios(case: Case) -> tuple[list[Tensor], list[float]]:
    """Return the process reward model's log-ratios [n] to the reference, and the rewards, of a case's sequences."""
    process, reference = _streams(case, "a process reward model", "process", "reference")
    return [phi_n - ref_n for phi_n, ref_n in zip(process, reference, strict=True)], _rewards_of(case)


def _of_tokens(case: Case) -> dict[str, list[Tensor]]:
    """Return a second model's values per token; empty if the recipe has none."""
    side, objective = recipe(case.objective).side, case.objective
    if side == "critic":
        (values,) = _streams(case, "a critic", "old_value")
        log_ratios = [torch.zeros_like(values_n) for values_n in values]
        if objective.kl_in_reward:
            old, reference = _streams(case, "objective.kl_in_reward", "old", "reference")
            log_ratios = [old_n - ref_n for old_n, ref_n in zip(old, reference, strict=True)]
        return value_advantages(values, log_ratios, _rewards_of(case), objective)
    if side == "prm":
        prompts = [sequence.get("prompt") for sequence in case.sequences]
        return process_advantages(*_ratios(case), prompts, objective)
    return {}


def _value_update(case: Case, returns: list[Tensor], weights: dict[int, float]) -> dict[str, Any]:
    """Return the critic's update; ``weights`` are per token of each sequence that trains, by index."""
    values, old = _streams(case, "a critic", "value", "old_value")
    of_tokens = [weights.get(place, 0.0) for place in range(len(values))]
    return value_update(values, old, returns, of_tokens, case.objective)


def _reads_entropies(objective: Objective) -> str | None:
    """Return the key that makes the loss read entropies; None if it does not."""
    if recipe(objective).has("tilted"):
        return f"objective.method: {objective.method}"
    return f"objective.entropy_coef: {objective.entropy_coef:g}" if objective.entropy_coef else None


def _sums(case: Case, place: int, sequence: Sequence, objective: Objective) -> SequenceSums | None:
    if sequence.kind != Kind.ROLLOUT:
        return None
    wanted = ["old"] * has_ratio(objective) + ["reference"] * needs_reference(objective)
    for name in wanted:
        if name not in case.logs[place]:
            raise UserError(f"sequences[{place}].{STREAMS[name]}: needed by objective.method: {objective.method}")
    logs = {name: case.logs[place][name].sum().item() for name in ("logp", *wanted)}
    old = logs.get("old", 0.0)
    return SequenceSums(logs["logp"], old, logs.get("reference", 0.0), old)


def _rewards(case: Case) -> dict[str, Any]:
    """Return the rewards that train, if every sequence of the case is a response."""
    seen: dict[int, float] = {}
    for group, kinds in zip(case.groups, case.members.values(), strict=True):
        seen |= dict(zip(kinds[Kind.ROLLOUT], group.rewards, strict=True))
    return {"rewards_seen": [seen[place] for place in sorted(seen)]} if len(seen) == len(case.sequences) else {}


def _advantages(case: Case) -> dict[str, Any]:
    """Return a list if every sequence but the experts' has an advantage, else a dict by the sequences' names."""
    found: dict[int, float] = {}
    for group, kinds in zip(case.groups, case.members.values(), strict=True):
        if group.responses and recipe(case.objective).side is None:
            places = kinds[Kind.ROLLOUT] + kinds[Kind.TEACHER]
            found |= dict(zip(places, member_advantages(group, case.objective), strict=False))
    if not found:
        return {}
    if len(found) == sum(sequence["source"] != "expert" for sequence in case.sequences):
        return {"advantages": [found[place] for place in sorted(found)]}
    return {"advantages": {case.sequences[place].get("name", str(place)): found[place] for place in sorted(found)}}


def _routes(case: Case) -> dict[str, Any]:
    """Return the kind of sequence each prompt trains on, if the recipe chooses between them."""
    if all(term.when == ALL for term in update_terms(case.objective)):
        return {}
    routes = [recipe(case.objective).sources(group) for group in case.groups]
    return {"route_of_prompt": ["rl" if route == [Kind.ROLLOUT] else "sft" for route in routes]}


def _queued(case: Case) -> dict[str, Any]:
    """Return the prompts that the step queues. Each is assumed to have a trace, which a case lists only where it
    trains.
    """
    if case.deferred or not recipe(case.objective).defers:
        return {}
    asked = [
        (prompt, replace(group, teacher_indices=(0,))) for prompt, group in zip(case.members, case.groups, strict=True)
    ]
    queued = [prompt for prompt, group in asked if group.responses and failed([group], case.objective)]
    return {"queued_prompts": queued}
