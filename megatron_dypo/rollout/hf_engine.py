"""Sampling with ``transformers``, if vLLM is not installed: one sequence batch, no paging, many times slower."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.models.shape import ModelShape
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.runtime.distributed import device

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import VersionedWeights

BATCH = 256
_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.weight")
# A layer's experts are two tensors in transformers: which of them, and which half.
_STACKED = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", None)),
}


class HfEngine:
    """See ``Engine``: its own copy of the model, left-padded batches, per-request generators."""

    devices = 0

    def __init__(self, shape: ModelShape, returns_experts: bool = False):
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = shape.to_hf_config()
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device()).eval()
        self._version = 0  # of the weights, once synced
        self._routed: list[Tensor] | None = [] if returns_experts else None  # [tokens, K] of each layer in turn
        for name, module in self._model.named_modules():
            if returns_experts and name.endswith(".mlp.gate"):
                module.register_forward_hook(lambda module, given, result: self._routed.append(result[-1]))

    @torch.no_grad()
    def sync(self, weights: VersionedWeights) -> None:
        missing = {name: weight.numel() for name, weight in self._model.state_dict().items()}
        for name, tensor in weights:
            place, target = _target(self._model, name)
            if tensor.shape != target.shape:
                raise RuntimeError(
                    f"weight sync to transformers: {name}: {list(tensor.shape)}, not {list(target.shape)}"
                )
            target.copy_(tensor)
            missing[place] -= target.numel()
        if any(missing.values()):
            raise RuntimeError(f"weight sync to transformers: missing {sorted(filter(missing.get, missing))}")
        self._version = weights.version

    def sleep(self, keep_weights: bool) -> None:
        """Move the weights to host memory, whether they are to be kept or not."""
        self._model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        self._model.to(device())
        return [
            response
            for start in range(0, len(requests), BATCH)
            for response in self._batch(requests[start : start + BATCH], sampling)
        ]

    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long, device=device())
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.astype(np.int64))
            mask[row, width - len(request.prompt_ids) :] = 1
        generators = [None if r.seed is None else torch.Generator().manual_seed(r.seed) for r in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        running = [True] * len(requests)
        cache, fresh = None, ids
        experts_BSLK: list[np.ndarray] = []  # the S tokens of each pass
        for _ in range(sampling.max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
            output = self._model(
                fresh, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            if self._routed:
                routed = torch.stack(self._routed, dim=1).unflatten(0, fresh.shape)
                experts_BSLK.append(routed.cpu().numpy().astype(np.int16))
                self._routed.clear()
            logits = output.logits[:, -1].float().cpu()
            picked = [
                self._pick(logits[row], generators[row], sampling) if running[row] else (0, 0.0)
                for row in range(len(requests))
            ]
            for row, (token, logprob) in enumerate(picked):
                if running[row]:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    running[row] = token not in sampling.end_ids
            if not any(running):
                break
            fresh = torch.tensor([[token] for token, _ in picked], device=device())
            mask = torch.cat([mask, torch.ones_like(fresh)], dim=1)
        responses = []
        for row, request in enumerate(requests):
            experts = None
            if experts_BSLK:
                first = width - len(request.prompt_ids)
                experts = np.concatenate([part[row] for part in experts_BSLK])[first : width + len(tokens[row]) - 1]
            responses.append(
                Response(
                    np.array(tokens[row], np.int32),
                    np.array(logprobs[row], np.float32),
                    "length" if running[row] else "stop",
                    weight_version=self._version,
                    experts=experts,
                )
            )
        return responses

    @staticmethod
    def _pick(logits: Tensor, generator: torch.Generator | None, sampling: Sampling) -> tuple[int, float]:
        if generator is None:
            logp = logits.log_softmax(-1)
            token = int(logp.argmax())
            return token, float(logp[token])
        logp = (logits / sampling.temperature).log_softmax(-1)
        if sampling.top_p < 1:
            order = logp.argsort(descending=True)
            before = logp[order].exp().cumsum(0) - logp[order].exp()
            logp[order[before >= sampling.top_p]] = float("-inf")
            logp = logp.log_softmax(-1)
        token = int(torch.multinomial(logp.exp(), 1, generator=generator))
        return token, float(logp[token])


def _target(model: torch.nn.Module, name: str) -> tuple[str, Tensor]:
    """Return a parameter's name, and the part of it that holds a Hugging Face tensor."""
    if expert := _EXPERT.fullmatch(name):
        layer, number, kind = expert.groups()
        stacked, half = _STACKED[kind]
        place = f"{layer}.mlp.experts.{stacked}"
        weight = model.get_parameter(place)[int(number)]
        return place, weight if half is None else weight.chunk(2)[half]
    place = name.replace(".block_sparse_moe.", ".mlp.")
    return place, model.get_parameter(place)
