"""A weight's gradient is added to ``main_grad`` by the product that forms it, without Apex.

Megatron-Core's ``gradient_accumulation_fusion`` calls a module of Apex by its name; this one has the function that it
calls. A gradient in half precision, and a pass over memory that adds it up, are then formed nowhere. Legend: T tokens,
H inputs and V outputs of a linear layer.
"""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def install() -> None:
    """Let mcore's linear layers call this module."""
    layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
    layers._grad_accum_fusion_available = True


def wgrad_gemm_accum_fp32(input_TH: Tensor, grad_output_TV: Tensor, main_grad_VH: Tensor) -> None:
    """main_grad += slope^T @ input, summed and kept in fp32 whatever the type of the two."""
    if not len(input_TH):  # an expert that no token went to
        return
    if input_TH.dtype == main_grad_VH.dtype:
        main_grad_VH.addmm_(grad_output_TV.t(), input_TH)
    elif input_TH.is_cuda:
        torch.addmm(main_grad_VH, grad_output_TV.t(), input_TH, out_dtype=main_grad_VH.dtype, out=main_grad_VH)
    else:  # CPU products have no other type for their sum
        main_grad_VH.addmm_(grad_output_TV.t().float(), input_TH.float())
