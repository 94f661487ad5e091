"""Activations as 8-bit rows, each with a scale of its own that makes its largest value the largest 8-bit number."""

import torch
from torch import Tensor

from ..seams import Rows8
from .kernels.trial import kernels_work


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Rows8:
    """The rows of x in 8 bits. No gradients pass.

    values * scale is off by at most amax / 254 in int8, and in float8 by |x| / 16 or amax / 450 000, the larger.
    A row of zeros stays zeros; a row with NaN or infinity comes back with NaN.

    Args:
        x: B L E, or any number of leading dimensions.
        dtype: float8_e4m3fn or int8.
    """
    assert dtype in Rows8.LARGEST
    if kernels_work(x.device) and x.shape[-1] > 1:
        from .kernels.rows8 import quantize

        return quantize(x.detach(), dtype)
    return quantize_plain(x.detach(), dtype)


def quantize_plain(x: Tensor, dtype: torch.dtype) -> Rows8:
    """`quantize_rows` in torch's own steps."""
    limit, wide = Rows8.LARGEST[dtype], x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest < Rows8.FAINTEST, Rows8.FAINTEST, largest)
    values = wide * (limit / largest)
    values = values.nan_to_num().round() if dtype == torch.int8 else values
    return Rows8(values.to(dtype), largest / limit, x.dtype)
