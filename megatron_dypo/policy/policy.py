"""The trainable policy on this rank: log-prob pass, training pass, optimizer step, reference weights.

Legend: T packed tokens, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dypo.config.schema import Config
from megatron_dypo.kernels import LogProbs, linear_logprob, linear_loss
from megatron_dypo.models.export import hf_tensors
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.models.sharding import load_weights
from megatron_dypo.objectives import TokenStreams
from megatron_dypo.objectives.coefficients import keeps_reference
from megatron_dypo.policy.accelerations import choose
from megatron_dypo.policy.attention import Segments, angles, frequencies
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.policy.model import build_model, build_optimizer, whole_model_names
from megatron_dypo.policy.moe import Routing, balance_weights, routed_counts, routing_metrics
from megatron_dypo.policy.offload import Offload
from megatron_dypo.policy.optimizer import adam_parts, set_hyperparameters
from megatron_dypo.policy.reference import PLACES, Reference
from megatron_dypo.runtime import cpu_shim, trace
from megatron_dypo.runtime.distributed import Layout, device, training_dtype


class Policy:
    """A Megatron-Core GPT with its optimizer, configured for the run's current stage.

    ``version`` counts optimizer updates since the initial weights; ``stage_version`` is its value when the stage began.
    """

    def __init__(self, config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]):
        self.config, self.shape, self.layout = config, shape, layout
        self.chunks = build_model(config, shape, layout)
        self.parameters: dict[str, torch.nn.Parameter] = {}  # this rank's, keyed by their names in the whole model
        for chunk in self.chunks:
            self.parameters |= whole_model_names(chunk.module, dict(chunk.module.named_parameters()))
        load_weights(self.parameters, shape, layout, read_weights)
        self.optimizer = build_optimizer(config.optimizer, training_dtype(config.model.dtype), self.chunks)
        self.reference = self._stage_reference()
        self.offload = Offload(self.chunks, self.optimizer, self.reference)
        schedule = self.chunks[0].config  # shared by all chunks and the schedule
        # The only place that switches off mcore's own normalisation: every coefficient is already global.
        schedule.finalize_model_grads_func = lambda models, num_tokens=None, **keywords: finalize_model_grads(
            models, None, **keywords
        )
        self._timers = schedule.timers = trace.ScheduleTimers() if trace.recording() else None
        if config.optimizer.overlap_grad_reduce:  # the last micro-batch's backward pass starts the sums
            no_sync = [chunk.no_sync for chunk in self.chunks]
            schedule.no_sync_func = no_sync if layout.vpp > 1 else no_sync[0]
            for parameter in self.parameters.values():
                parameter.awaits_grad = True  # DDP's hook needs one, even of a head whose ``main_grad`` has all of it
        # Transformer Engine's kernels read a pack's offsets on the device; ours read segments and angles
        engine = choose(config.model, shape.head_dim).transformer_engine
        self._offsets_on = device() if engine else torch.device("cpu")
        self._frequencies = frequencies(shape).to(device())
        self.context_group = mpu.get_context_parallel_group() if layout.cp > 1 else None
        self.version = self.stage_version = 0
        self._replays = config.policy.routing_replay != "off"
        self._routed: list[Routing] = []  # of the last training pass, until its metrics are read
        if self.reference:
            self.keep_reference()

    def begin_stage(self, config: Config) -> None:
        """Continue from the current weights, with Adam and a reference as fresh as in a run that starts from them.

        ``config`` is the new stage's; it may differ from the current one only as ``config/stages.py`` allows.
        """
        self.offload.require_device()
        self.config, self.stage_version = config, self.version
        if self.version > 0:  # Adam has no state before the first applied update
            for part in adam_parts(self.optimizer, self.parameters).values():
                part.begin_anew()
        self.reference = self.offload.reference = self._stage_reference(self.reference)
        if self.reference:
            self.keep_reference()

    @property
    def adam_steps(self) -> int:
        """Return the number of updates that Adam's moments cover."""
        return self.version - self.stage_version

    def _stage_reference(self, there: Reference | None = None) -> Reference | None:
        """Return storage for the stage's reference, if it keeps one: ``there`` if given, or new."""
        if not keeps_reference(self.config.objective):
            return None
        on = self.config.model.reference_on  # `auto` is resolved when a run starts (planner/placement.py)
        return there or PLACES["device" if on == "auto" else on](self.parameters)

    def logprobs(self, batches: list[MicroBatch]) -> list[Tensor]:
        """Return the log-probs [N] (nats) of each micro-batch's targets; empty except on the last pipeline stage.

        Without micro-batches, on all ranks or on none, nothing runs.
        """
        if not batches:
            return []

        def collect(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, ...]:
            return (linear_logprob(*self._head_inputs(hidden, batch), **self._head_options(batch)).logp,)

        with torch.no_grad():
            return [logp for (logp,) in self._run(batches, collect, forward_only=True)]

    def logprobs_and_entropies(self, batches: list[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what ``logprobs`` does, and each token's entropy [N] (nats)."""
        if not batches:
            return [], []

        def collect(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
            found = linear_logprob(*self._head_inputs(hidden, batch), entropy=True, **self._head_options(batch))
            return found.logp, found.entropy

        with torch.no_grad():
            found = self._run(batches, collect, forward_only=True)
        return [logp for logp, _ in found], [entropy for _, entropy in found]

    def accumulate(self, batches: list[MicroBatch], streams: list[TokenStreams]) -> None:
        """Run forward and backward over the micro-batches; gradients end up summed over all ranks in ``main_grad``."""
        self.zero_gradients()
        self._routed = self._routings(batches)
        for routing in self._routed:
            routing.begin_training()
        if self._routed and self.config.policy.aux_loss:
            self._balance(batches)
        by_batch = {id(batch): stream for batch, stream in zip(batches, streams, strict=True)}

        def finish(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Any]:
            value, logprobs = self._loss(hidden, batch, by_batch[id(batch)])
            return value, torch.zeros((), dtype=torch.int), logprobs

        self._run(batches, finish, forward_only=False, routings=self._routed)

    def _loss(self, hidden: Tensor, batch: MicroBatch, stream: Any) -> tuple[Tensor, Any]:
        """Return a micro-batch's loss, differentiable in its inputs, and the detached per-token values behind it."""
        inputs, options = self._head_inputs(hidden, batch), self._head_options(batch)
        if stream.own is None:
            return linear_loss(*inputs, stream.terms, entropy=True, **options)
        attached = linear_logprob(*inputs, entropy=True, **options)
        value = stream.loss(attached.logp, attached.entropy).to(attached.logp.dtype)
        logp_N, entropy_N, lse_N = attached
        return value, LogProbs(logp_N.detach(), entropy_N.detach() if entropy_N is not None else None, lse_N.detach())

    def routing_metrics(self) -> dict[str, float]:
        """Return ``moe/...`` of the last training pass, once; equal on all ranks, empty if dense. Collective."""
        if not self._routed:
            return {}
        routed, self._routed = self._routed, []  # otherwise it would occupy the device while the engine samples
        return routing_metrics(routed, self.shape, self.config.policy.aux_loss)

    def zero_gradients(self) -> None:
        self.offload.require_device()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Return the global norm of the accumulated gradients, before clipping; not finite if any of them is not."""
        with cpu_shim.cuda_type_names():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def step(self, lr: float) -> None:
        """Apply one optimizer update with the accumulated gradients, clipped, at this learning rate."""
        self.offload.require_device()
        set_hyperparameters(self.optimizer, self.config.optimizer, lr)
        with cpu_shim.cuda_type_names():
            self.optimizer.step()
        self.version += 1

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the current weights as (Hugging Face name, full tensor), a tied head twice; collective."""
        self.offload.require_device()
        ahead = (
            self.config.rollout.sync_backend != "ipc"
        )  # vLLM's sender makes collectives of all ranks between tensors
        return hf_tensors(self.parameters, self.shape, self.layout, with_tied_head=True, ahead=ahead)

    def keep_reference(self) -> None:
        """Freeze the current weights as the reference."""
        self.offload.require_device()
        self.reference.keep()

    def refresh_reference(self, step: int) -> None:
        """Freeze a new reference before steps 1, N + 1, ... of the stage (first is 1), with ``reference: every:N``."""
        every = self.config.objective.reference.partition("every:")[2]
        if self.reference is not None and every and (step - 1) % int(every) == 0:
            self.keep_reference()

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Put the reference into the modules and the policy back, bit for bit. Its routers choose for themselves."""
        self.offload.require_device()
        replays, self._replays = self._replays, False
        with self.reference.weights():
            yield
        self._replays = replays

    def _run(
        self,
        batches: list[MicroBatch],
        finish: Callable[[Tensor, MicroBatch], tuple],
        forward_only: bool,
        routings: list[Routing] | None = None,
    ) -> list:
        """Run mcore's schedule over the micro-batches; ``finish(hidden, batch)`` handles the last stage's outputs."""
        self.offload.require_device()
        routings = self._routings(batches) if routings is None else routings
        routed = dict(zip(map(id, batches), routings, strict=False))  # empty for a dense policy

        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module):
            number, batch = next(iterator)
            if self._timers:
                self._timers.details = {"micro_batch": number, "tokens": len(batch.ids_T)}
            ids, positions = batch.ids_T.to(device()), batch.positions_T.to(device())
            packed = self._packed_params(batch, positions)
            packed.routing = routed.get(id(batch))
            output = model(ids.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=packed)
            return output, lambda hidden, **_: finish(hidden, batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[enumerate(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.shape.max_position,  # not read with variable lengths
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _routings(self, batches: list[MicroBatch]) -> list[Routing]:
        """Return the routings of a pass over the micro-batches; empty for a dense policy."""
        if not self.shape.num_experts:
            return []
        if not self._replays:
            return [Routing(self._own_slice(batch.owner_T) >= 0) for batch in batches]
        for batch in batches:
            if batch.routing is None:
                batch.routing = Routing(self._own_slice(batch.owner_T) >= 0, *self._given(batch))
        return [batch.routing for batch in batches if batch.routing is not None]

    @property
    def layers(self) -> list[int]:
        """Return this rank's layers, numbered from 1 in the whole model."""
        return [layer.layer_number for chunk in self.chunks for layer in chunk.module.decoder.layers]

    def _given(self, batch: MicroBatch) -> tuple[dict[int, Tensor], Tensor | None]:
        """Take from the batch the rollout engine's choice in this rank's layers, and for which tokens it made one."""
        if batch.given_TLK is None or batch.is_given_T is None:
            return {}, None
        given_TLK, is_given_T = self._own_slice(batch.given_TLK), self._own_slice(batch.is_given_T)
        batch.given_TLK = batch.is_given_T = None
        return {layer: given_TLK[:, i].contiguous() for i, layer in enumerate(self.layers)}, is_given_T

    def _own_slice(self, values_T: Tensor) -> Tensor:
        """Return this tensor-parallel rank's slice of the tokens, which sequence parallelism routes separately."""
        return values_T.chunk(self.layout.tp)[self.layout.tp_rank].to(device())

    def _balance(self, batches: list[MicroBatch]) -> None:
        """Run one forward pass to count expert loads over the mini-batch and set the balance-loss weights."""
        with torch.no_grad():
            self._run(batches, lambda hidden, batch: (), forward_only=True, routings=self._routed)
        counts_LE = routed_counts(self._routed, self.shape)
        weights_LE = balance_weights(counts_LE, self.config.policy.aux_loss, self.shape.router_topk)
        for routing in self._routed:
            routing.weights = weights_LE

    def _head_inputs(self, hidden_1TH: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states of the loss tokens, the head's weight, and the targets."""
        hidden_TH = hidden_1TH.squeeze(0)
        if self.config.parallel.sequence_parallel:
            hidden_TH = gather_from_sequence_parallel_region(hidden_TH, tensor_parallel_output_grad=False)
        hidden_NH = hidden_TH.index_select(0, batch.loss_index_N.to(hidden_TH.device))
        head = self.parameters.get("output_layer.weight")  # absent if it is tied to an embedding on this stage
        weight = self.parameters["embedding.word_embeddings.weight"] if head is None else head
        return hidden_NH, weight, batch.targets_N.to(hidden_TH.device)

    def _head_options(self, batch: MicroBatch) -> dict:
        group = mpu.get_tensor_model_parallel_group() if self.layout.tp > 1 else None
        return {"temperature": batch.temperature_N.to(device()), "tp_group": group, "vocab_size": self.shape.vocab_size}

    def _packed_params(self, batch: MicroBatch, positions_T: Tensor) -> PackedSeqParams:
        """Return attention's parameters; mcore passes the object to ours, with ``segments`` and ``angles``."""
        cu_seqlens = torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=self._offsets_on)
        longest = max(end - start for start, end in itertools.pairwise(batch.cu_seqlens))
        params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
        params.segments = Segments(batch.cu_seqlens, device(), self.layout.cp, self.layout.cp_rank)
        params.angles = angles(self._frequencies, positions_T, training_dtype(self.config.model.dtype))
        return params
