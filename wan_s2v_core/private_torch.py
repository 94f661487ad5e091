"""All that is used of torch without being public, in one place. `PUBLIC` says what could be used instead.

The private calls stay while the oldest torch that is declared lacks the public ones, so that every version runs the
same kernels. tests/core/test_private_torch.py fails when one can go. Besides, `Linear8` overrides `nn.Module._apply`.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

PUBLIC: Mapping[str, tuple[str, str] | None] = {
    "_scaled_mm": ("torch.nn.functional.scaled_mm", "2.10"),
    "_grouped_mm": ("torch.nn.functional.grouped_mm", "2.10"),
    "_int_mm": None,
    "_addmm_activation": None,  # a compiler may make one kernel of both
    "_conv_forward": None,
    "_parameters": None,  # setattr, but that takes 3 us instead of 0.03, and layers that come and go need it often
    "_buffers": None,
    "_forward_hooks": None,
    "_forward_pre_hooks": None,
}
"""Private name -> the public one that does the same, and the first torch that has it; None: there is none that does."""
HAS_GROUPED_PRODUCT = hasattr(torch, "_grouped_mm")
"""torch 2.7 has none."""


def scaled_product(
    rows: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None = None, is_fast: bool = True
) -> Tensor:
    """rows @ weight.T in float8 with scales, and a bias, in bfloat16.

    Args:
        rows: M I, float8_e4m3fn; weight: O I.
        row_scale: M 1, or one number; scale: 1 O, or one number; float32.
        is_fast: sum in the tensor cores of Hopper, which keep fewer bits than float32.
    Returns:
        M O.
    Raises:
        RuntimeError: if the device has no such kernel.
    """
    scales = {"scale_a": row_scale, "scale_b": scale}
    return torch._scaled_mm(rows, weight.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=is_fast)


def integer_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, exact. rows: M I, int8, more than 16 of them on a GPU; weight: O I -> M O, int32."""
    return torch._int_mm(rows, weight.t())


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows with a matrix of its own, in one kernel. Only where `HAS_GROUPED_PRODUCT`.

    Args:
        rows: R I, bfloat16, group after group; weights: X O I.
        ends: X, int32: the row behind the last of each group.
    Returns:
        R O.
    """
    return torch._grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def product_with_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """The tanh-GELU of what a layer with a bias computes, in the product's kernel. x: R I -> R O."""
    return torch.ops.aten._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)


def set_convolution(layer: nn.Conv3d, function: Callable[[nn.Conv3d, Tensor, Tensor, Tensor | None], Tensor]) -> None:
    """Let a layer compute (layer, x, weight, bias) -> y another way, after padding of kinds other than zeros."""
    layer._conv_forward = MethodType(function, layer)


def tensor_dicts(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module itself holds parameters and buffers, name -> tensor or None; it uses what is put there."""
    return module._parameters, module._buffers


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
