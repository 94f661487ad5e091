"""Activations as 8-bit rows, each with a scale of its own that makes its largest value the largest 8-bit number."""

import torch
from torch import Tensor

from ..seams import Rows8
from .kernels import kernels_work

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""8-bit types for activations and their largest number."""
FAINTEST = 2.0**-100
"""A row whose values are all below this, such as one of zeros, is scaled as if this were its largest."""


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Rows8:
    """The rows of x in 8 bits. No gradients pass.

    values * scale is off by at most amax / 254 in int8, and in float8 by |x| / 16 or amax / 450 000, the larger.
    A row of zeros stays zeros; a row with NaN or infinity comes back with NaN.

    Args:
        x: B L E, or any number of leading dimensions.
        dtype: float8_e4m3fn or int8.
    """
    assert dtype in LARGEST
    if kernels_work(x.device) and x.shape[-1] > 1:
        from .kernels.rows8 import quantize

        return quantize(x.detach(), dtype)
    return quantize_plain(x.detach(), dtype)


def quantize_plain(x: Tensor, dtype: torch.dtype) -> Rows8:
    """`quantize_rows` in torch's own steps."""
    limit, wide = LARGEST[dtype], x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest < FAINTEST, FAINTEST, largest)
    values = wide * (limit / largest)
    values = values.nan_to_num().round() if dtype == torch.int8 else values
    return Rows8(values.to(dtype), largest / limit, x.dtype)
