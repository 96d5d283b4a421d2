"""Add a weight's gradient to ``main_grad`` in the product that forms it, without Apex.

Megatron-Core's ``gradient_accumulation_fusion`` calls an Apex module by name; this module provides the function. It
avoids a separate gradient in half precision and a pass over memory to add it. Legend: T tokens, H inputs and V outputs
of a linear layer.
"""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def install() -> None:
    """Make mcore's linear layers call this module."""
    layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
    layers._grad_accum_fusion_available = True


def wgrad_gemm_accum_fp32(input_TH: Tensor, grad_output_TV: Tensor, main_grad_VH: Tensor) -> None:
    """Add slope^T @ input to main_grad, summed and kept in fp32 whatever the type of the two."""
    if not len(input_TH):  # an expert without tokens
        return
    if input_TH.dtype == main_grad_VH.dtype:
        main_grad_VH.addmm_(grad_output_TV.t(), input_TH)
    elif input_TH.is_cuda:
        torch.addmm(main_grad_VH, grad_output_TV.t(), input_TH, out_dtype=main_grad_VH.dtype, out=main_grad_VH)
    else:  # CPU products have no separate type for their sum
        main_grad_VH.addmm_(grad_output_TV.t().float(), input_TH.float())
