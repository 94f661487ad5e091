"""int8 weights and activations: products at twice the speed of bfloat16 on cards that have no float8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...private_torch import integer_product
from ...seams import Rows8
from ..kernels.trial import kernels_work
from .linear8 import Linear8, Product8, has_triton, largest_of_rows

ROWS_AT_ONCE = 8192
"""Of which sums are held as int32 where they cannot be scaled in the product's own kernel: 0.45 GB at most in the 14B
model, not 4.4 GB."""
FEWEST_ROWS = 32
"""torch multiplies more than 16 rows on a card, or none."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and their float32 scales, rows columns and rows 1; off by at most half a scale = amax / 254.

    Raises:
        CheckpointError: if a value is NaN or infinite.
    """
    largest = Rows8.LARGEST[torch.int8]
    scale = largest_of_rows(weight) / largest
    return (weight / scale).round().clamp(-largest, largest).to(torch.int8), scale


def multiply_in_parts(rows: Rows8, layer: Linear8) -> Tensor:
    """torch's exact product of integers, scaled in steps of its own."""
    values, scale = rows.values, layer.scale.view(1, -1)
    out = values.new_empty(len(values), layer.out_features, dtype=rows.dtype)
    for start in range(0, len(values), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        few = values[part]
        missing = max(0, FEWEST_ROWS - len(few)) if values.is_cuda else 0
        sums = integer_product(F.pad(few, (0, 0, 0, missing)), layer.weight)[: len(few)]
        scaled = sums.float().mul_(rows.scale[part]).mul_(scale)
        out[part] = scaled if layer.bias is None else scaled.add_(layer.bias)
    return out


class Int8Product(Product8):
    """int8 weights and int8 activations; the sums are exact."""

    stored = rows_dtype = torch.int8
    quantize = staticmethod(quantize)

    def multiply(self, rows: Rows8) -> Tensor:
        if not (rows.values.is_cuda and has_triton() and kernels_work(rows.values.device)):
            return multiply_in_parts(rows, self)
        return self.multiply_in_kernel(rows)
