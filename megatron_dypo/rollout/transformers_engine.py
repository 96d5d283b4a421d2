"""Sampling with ``transformers``, where vLLM is not installed: one sequence batch, no paging, many times slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.runtime.distributed import device

if TYPE_CHECKING:
    from megatron_dypo.sync.weights import Weights

BATCH = 256


class TransformersEngine:
    """See ``Engine``: its own copy of the model, left-padded batches, per-request generators."""

    def __init__(self, shape: ModelShape):
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = shape.to_hf_config()
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device()).eval()
        self._version = 0  # of the weights, once synced

    def sync(self, weights: Weights) -> None:
        missing, unexpected = self._model.load_state_dict(dict(weights), strict=False)
        if missing or unexpected:
            raise RuntimeError(f"weight sync to transformers: missing {missing}, unexpected {unexpected}")
        self._version = weights.version

    def sleep(self, keep_weights: bool) -> None:
        """The weights go to host memory in any case."""
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
        for _ in range(sampling.max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
            output = self._model(
                fresh, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            picked = [
                self._pick(logits[row], generators[row], sampling) if running[row] else (0, 0.0)
                for row in range(len(requests))
            ]
            for row, (token, logprob) in enumerate(picked):
                if running[row]:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    running[row] = token != sampling.eos_id
            if not any(running):
                break
            fresh = torch.tensor([[token] for token, _ in picked], device=device())
            mask = torch.cat([mask, torch.ones_like(fresh)], dim=1)
        return [
            Response(
                np.array(ids, np.int32),
                np.array(values, np.float32),
                "length" if unfinished else "stop",
                weight_version=self._version,
            )
            for ids, values, unfinished in zip(tokens, logprobs, running, strict=True)
        ]

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
