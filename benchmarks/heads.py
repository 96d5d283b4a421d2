"""Define the heads that benchmarks/linear_logprob.py compares: ours, the naive one, and the peers' own functions.

Each runs forward and backward of sum_t slope_t logp_t, from hidden states and the output weight; an inactive token's
slope is 0. Peers are called as their users call them, with their own way, if any, to skip inactive tokens.

Legend: T tokens, A active ones, H hidden size, V vocabulary, B sequences (of equal length).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dypo.kernels import linear_logprob, linear_loss

SEQUENCES = 8
ENTROPY_COEF = 0.001
IGNORED = -100
NAIVE, CEILING, FLOOR = "naive", "matmul", "three_products"
# importable package -> its name for pip
DISTRIBUTIONS = {
    "liger_kernel": "liger-kernel",
    "cutlass": "nvidia-cutlass-dsl",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}


@dataclass(frozen=True)
class Setting:
    """One measurement; ``active`` is the share of tokens with a non-zero slope."""

    tokens: int
    hidden: int
    vocab: int
    active: float


@dataclass(frozen=True)
class Batch:
    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    active_T: Tensor  # bool
    active_A: Tensor  # indices of the active tokens
    advantages_B: Tensor
    slopes_T: Tensor  # -advantage / A, or 0
    vocab: int  # rows of the weight without padding

    @classmethod
    def of(cls, setting: Setting, device: str, dtype: torch.dtype) -> Batch:
        """Make the same numbers in every process. Weights are scaled for logits of unit variance, and hidden states
        lean towards their targets, so that p(target) ranges from 1 / V to near 1, as in a trained model.
        """
        seed = torch.Generator(device).manual_seed(0)
        options = {"generator": seed, "device": device}
        weight_VH = (torch.randn(setting.vocab, setting.hidden, **options) * setting.hidden**-0.5).to(dtype)
        targets_T = torch.randint(setting.vocab, (setting.tokens,), **options)
        lean_T1 = 16 * torch.rand(setting.tokens, 1, **options)
        noise_TH = torch.randn(setting.tokens, setting.hidden, **options)
        hidden_TH = (noise_TH + lean_T1 * weight_VH[targets_T].float()).to(dtype)
        count = round(setting.active * setting.tokens)
        active_T = torch.zeros(setting.tokens, dtype=torch.bool, device=device)
        active_T[torch.randperm(setting.tokens, **options)[:count]] = True
        advantages_B = torch.randn(SEQUENCES, **options)
        slopes_T = -advantages_B.repeat_interleave(setting.tokens // SEQUENCES) * active_T / count
        return cls(
            hidden_TH.requires_grad_(),
            weight_VH.requires_grad_(),
            targets_T,
            active_T,
            active_T.nonzero().flatten(),
            advantages_B,
            slopes_T,
            setting.vocab,
        )

    def as_in_megatron(self) -> Batch:
        """Return the batch with a policy's weight on CUDA: padded to a multiple of 1024 rows, fp32 ``main_grad``."""
        weight_VH = F.pad(self.weight_VH.detach(), (0, 0, 0, -self.vocab % 1024)).requires_grad_()
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        return replace(self, weight_VH=weight_VH)

    @property
    def targets_or_ignored_T(self) -> Tensor:
        return self.targets_T.where(self.active_T, IGNORED)


def backward(logp: Tensor, slopes: Tensor) -> Tensor:
    (slopes * logp).sum().backward()
    return logp.detach()


def naive_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)


def naive(b: Batch) -> Tensor:
    return backward(naive_logp(b.hidden_TH, b.weight_VH, b.targets_T), b.slopes_T)


def naive_compacted(b: Batch) -> Tensor:
    hidden_AH = b.hidden_TH.index_select(0, b.active_A)
    return backward(naive_logp(hidden_AH, b.weight_VH, b.targets_T[b.active_A]), b.slopes_T[b.active_A])


def local_loss(b: Batch, hidden_TH: Tensor, targets_T: Tensor, slopes_T: Tensor, entropy: bool) -> Tensor:
    def token_loss(logp_t, entropy_t, t):
        return slopes_T[t] * logp_t, slopes_T[t]

    loss, logprobs = linear_loss(hidden_TH, b.weight_VH, targets_T, token_loss, vocab_size=b.vocab, entropy=entropy)
    loss.backward()
    return logprobs.logp


def ours(b: Batch) -> Tensor:
    return local_loss(b, b.hidden_TH, b.targets_T, b.slopes_T, entropy=True)


def ours_entropy_gradient(b: Batch) -> Tensor:
    """Add an entropy bonus: every active token also has a slope of its entropy."""
    dentropy_T = -ENTROPY_COEF * b.active_T / len(b.active_A)

    def token_loss(logp_t, entropy_t, t):
        return b.slopes_T[t] * logp_t + dentropy_T[t] * entropy_t, b.slopes_T[t], dentropy_T[t]

    loss, logprobs = linear_loss(b.hidden_TH, b.weight_VH, b.targets_T, token_loss, vocab_size=b.vocab, entropy=True)
    loss.backward()
    return logprobs.logp


def ours_compacted(b: Batch, entropy: bool = True) -> Tensor:
    a = b.active_A
    hidden_AH = b.hidden_TH if len(a) == len(b.hidden_TH) else b.hidden_TH.index_select(0, a)
    return local_loss(b, hidden_AH, b.targets_T[a], b.slopes_T[a], entropy)


def ours_without_entropy(b: Batch) -> Tensor:
    return ours_compacted(b, entropy=False)


def ours_logprob(b: Batch) -> Tensor:
    return backward(linear_logprob(b.hidden_TH, b.weight_VH, b.targets_T, vocab_size=b.vocab).logp, b.slopes_T)


def liger_logprob(b: Batch) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    logp_1T = LigerFusedLinearPPOBase.chunk_forward(b.hidden_TH.unsqueeze(0), b.weight_VH, b.targets_T.unsqueeze(0))
    return backward(logp_1T.squeeze(0), b.slopes_T)


def liger_grpo(b: Batch) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # Only its arithmetic on log-probs would be compiled: no gain at these sizes.
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    hidden_BNH = b.hidden_TH.unflatten(0, (SEQUENCES, -1))
    targets_BN, mask_BN = b.targets_T.view(SEQUENCES, -1), b.active_T.view(SEQUENCES, -1).float()
    grpo(hidden_BNH, b.weight_VH, targets_BN, mask_BN, b.advantages_B)[0].backward()


def liger_scaled_ce(b: Batch) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll_T = LigerFusedLinearScaledCrossEntropyFunction.apply(b.hidden_TH, b.weight_VH, b.targets_or_ignored_T)
    return -backward(nll_T, -b.slopes_T)


def cut_cross_entropy(b: Batch, implementation: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll_T = linear_cross_entropy(
        b.hidden_TH, b.weight_VH, b.targets_or_ignored_T, reduction="none", impl=implementation
    )
    return -backward(nll_T, -b.slopes_T)


def cce(b: Batch) -> Tensor:
    return cut_cross_entropy(b, "cce")


def cce_torch_compile(b: Batch) -> Tensor:
    return cut_cross_entropy(b, "torch_compile")


def quack(b: Batch) -> None:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunked_linear_cross_entropy(b.hidden_TH, b.weight_VH, b.targets_or_ignored_T, ignore_index=IGNORED).backward()


def torch_lce(b: Batch, **chunks: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    nll_T = F.linear_cross_entropy(
        b.hidden_TH, b.weight_VH, b.targets_or_ignored_T, reduction="none", ignore_index=IGNORED, options=options
    )
    return -backward(nll_T, -b.slopes_T)


def torch_lce_512(b: Batch) -> Tensor:
    return torch_lce(b, batch_chunk_size=512)


@torch.no_grad()
def matmul(b: Batch) -> None:
    rows = min(8192, len(b.hidden_TH))
    out = b.weight_VH.new_empty(rows, len(b.weight_VH))
    for hidden_tH in b.hidden_TH.split(rows):
        torch.mm(hidden_tH, b.weight_VH.t(), out=out[: len(hidden_tH)])


@torch.no_grad()
def three_products(b: Batch) -> None:
    """Run the products of a head that keeps its logits (logits, dhidden, dweight), all in the inputs' precision."""
    rows = min(8192, len(b.hidden_TH))
    z_tV = b.weight_VH.new_empty(rows, len(b.weight_VH))
    dhidden_tH, dweight_VH = b.hidden_TH.new_empty(rows, b.hidden_TH.shape[1]), torch.empty_like(b.weight_VH)
    for hidden_tH in b.hidden_TH.split(rows):
        t = slice(0, len(hidden_tH))
        torch.mm(hidden_tH, b.weight_VH.t(), out=z_tV[t])
        torch.mm(z_tV[t], b.weight_VH, out=dhidden_tH[t])
        torch.mm(z_tV[t].t(), hidden_tH, out=dweight_VH)


@dataclass(frozen=True)
class Head:
    """One head; ``note`` says how it is called and how it treats inactive tokens."""

    label: str
    note: str
    step: Callable[[Batch], Tensor | None]  # leaves gradients; returns logp [T] or [A] if it has them
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    main_grad: bool = False  # on CUDA the weight is as in Megatron, and the gradient goes to its fp32 ``main_grad``
    where: Callable[[Setting], bool] = lambda setting: True
    cuda_package: str = "torch"  # needed on CUDA as well
    comparable: bool = True  # its gradients are those of the same loss
    products: int = 0  # for a head that only multiplies matrices

    def missing(self, device: str) -> str | None:
        """Return the package to install, by its name for pip, or None."""
        needed = {self.package, self.cuda_package} if device == "cuda" else {self.package}
        absent = [name for name in sorted(needed) if importlib.util.find_spec(name) is None]
        return ", ".join(DISTRIBUTIONS[name] for name in absent) or None


def some_inactive(setting: Setting) -> bool:
    return setting.active < 1


HEADS = {
    CEILING: Head("one matrix product", "hidden @ weight.T alone: the ceiling", matmul, devices=("cuda",), products=1),
    FLOOR: Head(
        "three matrix products",
        "of the logits and of both gradients, alone, in the inputs' precision: the floor of forward and backward",
        three_products,
        devices=("cuda",),
        products=3,
    ),
    NAIVE: Head("naive", "torch autograd through materialised fp32 logits; works on inactive tokens too", naive),
    "naive_compacted": Head(
        "naive, compacted", "inactive tokens dropped by `index_select` before it", naive_compacted, where=some_inactive
    ),
    "ours": Head(
        "**ours, slopes zero**",
        "`linear_loss` with entropy, as training runs it; all tokens go in, and inactive ones are found inside by "
        "their zero slope: their logits are formed, their gradients are not",
        ours,
        main_grad=True,
    ),
    "ours_compacted": Head(
        "**ours, compacted**",
        "the same after `index_select` of the active tokens, as the policy does for prompt, padding and Easy tokens",
        ours_compacted,
        main_grad=True,
        where=some_inactive,
    ),
    "ours_without_entropy": Head(
        "ours, no entropy",
        "compacted; computes just what the peers compute",
        ours_without_entropy,
        main_grad=True,
    ),
    "ours_logprob": Head(
        "ours, log-prob",
        "`linear_logprob` and its backward, for losses that are not local to a token; slopes zero",
        ours_logprob,
        main_grad=True,
    ),
    "ours_entropy_gradient": Head(
        "ours, entropy's gradient",
        f"*slopes zero* with an entropy bonus of {ENTROPY_COEF}, whose gradient is formed as well",
        ours_entropy_gradient,
        main_grad=True,
        comparable=False,
    ),
    "liger_logprob": Head(
        "Liger log-prob",
        "`LigerFusedLinearPPOBase.chunk_forward`; has no way to leave tokens out",
        liger_logprob,
        "liger_kernel",
    ),
    "liger_grpo": Head(
        "Liger GRPO",
        f"`LigerFusedLinearGRPOLoss`, {SEQUENCES} sequences, its default chunk of one; inactive tokens masked",
        liger_grpo,
        "liger_kernel",
    ),
    "liger_scaled_ce": Head(
        "Liger scaled CE",
        "`LigerFusedLinearScaledCrossEntropyFunction` (CuTe on Hopper, else its torch fallback); `ignore_index`",
        liger_scaled_ce,
        "liger_kernel",
        cuda_package="cutlass",
    ),
    "cce": Head(
        "cut-cross-entropy",
        "its Triton kernels, `ignore_index` drops tokens first",
        cce,
        "cut_cross_entropy",
        ("cuda",),
    ),
    "cce_torch_compile": Head(
        "cut-cross-entropy `torch_compile`",
        "a compiled materialised head; `ignore_index` drops tokens first",
        cce_torch_compile,
        "cut_cross_entropy",
    ),
    "quack": Head(
        "QuACK",
        "`chunked_linear_cross_entropy` (CuTe): the mean over the active tokens, no slopes, no tokens' log-probs",
        quack,
        "quack",
        ("cuda",),
        comparable=False,
    ),
    "torch_lce_512": Head(
        "torch `linear_cross_entropy`, 512",
        "`torch.nn.functional`, `batch_chunk_size=512`; `ignore_index` masks",
        torch_lce_512,
    ),
    "torch_lce": Head(
        "torch `linear_cross_entropy`",
        "the same with torch's own choice of chunks; not at V > 100 H, where it takes a token or two at a time",
        torch_lce,
        where=lambda setting: setting.vocab <= 100 * setting.hidden,
    ),
}
