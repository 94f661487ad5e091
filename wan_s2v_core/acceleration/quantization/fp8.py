"""float8 weights, with products in the compute precision or in float8 as well."""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...private_torch import scaled_product
from ...seams import Rows8
from ..kernels.trial import kernels_work
from .linear8 import Linear8, Product8, check_rows, has_triton, largest_of_rows

log = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
"""One sign, four exponent and three mantissa bits, no infinity; relative steps of 1/8, and even ones below 2^-6."""
LARGEST = torch.finfo(FLOAT8).max
NAN_BITS = 0x7F
"""All bits but the sign: the only thing in float8 that is no number."""
FAST_ACCUMULATION = True
"""Sums stay in the tensor cores of Hopper, which keep fewer bits of them than float32. On an H200 that adds 0.0014 to
0.0027 (5,120 to 13,824 inner numbers) of error beside the 0.036 to 0.038 of rounding to float8, and takes 11 % less
time."""


def row_scales(weight: Tensor) -> Tensor:
    """The smallest power of two for each row with which its values, divided by it, fit into float8.

    Powers of two, not amax / 448: float8 is as exact at any scale, so this loses nothing (2.65 % of bell-shaped
    weights either way, and within 0.05 % of each other with tails as long as Student's t of 3), while dividing and
    multiplying by them never rounds. Hence float8 weights become the same numbers in bfloat16 as in float32.

    Args:
        weight: rows columns.
    Returns:
        rows 1, float32; the largest of a row becomes more than 224 and at most 448.
    Raises:
        CheckpointError: if a value is NaN or infinite.
    """
    room = LARGEST / largest_of_rows(weight)
    mantissa = torch.frexp(room)[0]  # room / (2 * mantissa) is the largest power of two up to room
    return 2 * mantissa / room


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 values and their float32 scales, rows columns and rows 1.

    values * scale differs from `weight` by at most the larger of |weight| / 17 (half a step, where steps are widest
    beside the value) and scale / 1024 (half of the even steps near zero), which is below amax / 229 000.
    """
    scale = row_scales(weight)
    return (weight / scale).to(FLOAT8), scale


class Float8Linear(Linear8):
    """float8 weights alone: a layer multiplies them out when it runs and drops them again, so activations and products
    stay in the compute precision."""

    stored = FLOAT8
    quantize = staticmethod(quantize)

    def take_scaled_weight(self, values: Tensor, scale: Tensor) -> None:
        """Store the float8 values of a file, rows columns, with its scales, rows 1, as they are.

        Raises:
            CheckpointError: if a value or a scale is NaN or infinite.
        """
        is_number = (values.view(torch.uint8) & NAN_BITS).amax(dim=1, keepdim=True) != NAN_BITS
        check_rows(torch.where(is_number, scale.float(), torch.nan))
        self._store(values, scale.float().contiguous())

    def forward(self, x: Tensor) -> Tensor:  # B L in_features -> B L out_features
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)


def multiply_emulated(rows: Rows8, layer: Linear8) -> Tensor:
    """What a card computes, in float32: products of two float8 numbers are exact there, sums as exact as float32."""
    out = F.linear(rows.values.float(), layer.weight.float()).mul_(rows.scale).mul_(layer.scale.view(1, -1))
    return (out if layer.bias is None else out.add_(layer.bias)).to(rows.dtype)


def multiply_scaled(rows: Rows8, layer: Linear8, fast: bool = FAST_ACCUMULATION) -> Tensor:
    """torch's product of rows with scales, all in one kernel; it writes bfloat16 alone."""
    bias = None if layer.bias is None else layer.bias.bfloat16()
    out = scaled_product(rows.values, layer.weight, rows.scale, layer.scale.view(1, -1), bias, fast)
    return out.to(rows.dtype)


def multiply_then_scale(rows: Rows8, layer: Linear8, fast: bool = FAST_ACCUMULATION) -> Tensor:
    """The same where torch scales whole tensors only, as on Windows, and Triton is missing: its product, and the scales
    afterwards, which takes longer than a product in bfloat16."""
    one = rows.scale.new_ones(())
    out = scaled_product(rows.values, layer.weight, one, one, is_fast=fast)
    out.mul_(rows.scale).mul_(layer.scale.view(1, -1))
    return (out if layer.bias is None else out.add_(layer.bias)).to(rows.dtype)


@torch.compiler.assume_constant_result
def scales_rows(device: torch.device) -> bool:
    """Whether torch has its kernel for rows with scales on this card: builds for Windows have none."""
    return _try_rows(device)


@lru_cache
def _try_rows(device: torch.device) -> bool:
    layer = Float8Linear(nn.Linear(16, 16, bias=False, device=device))
    rows = Rows8(torch.zeros(16, 16, dtype=FLOAT8, device=device), torch.ones(16, 1, device=device), torch.bfloat16)
    try:
        multiply_scaled(rows, layer)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("torch has no float8 products of rows on %s (%s): ours are used, which are slower", device, reason)
        return False
    return True


class Float8Product(Float8Linear, Product8):
    """float8 weights and float8 activations: twice the products in a second that bfloat16 has, on cards with them."""

    rows_dtype = FLOAT8
    forward = Product8.forward

    def multiply(self, rows: Rows8) -> Tensor:
        if not rows.values.is_cuda:
            return multiply_emulated(rows, self)
        if scales_rows(rows.values.device):
            return multiply_scaled(rows, self)
        has_kernel = has_triton() and kernels_work(rows.values.device)
        return self.multiply_in_kernel(rows) if has_kernel else multiply_then_scale(rows, self)
