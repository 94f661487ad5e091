"""8-bit weights: the products of the DiT's blocks keep their weights as float8, half the memory of bfloat16.

Weight-only: a layer multiplies its weights out when it runs and drops them again, so activations and products stay
in the compute precision. Swap the layers while the network is on the meta device, and loading turns each tensor
into float8 as it is read; the whole model in bfloat16 never has to fit.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.dit import S2VTransformer

log = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
"""One sign, four exponent and three mantissa bits, no infinity; relative steps of 1/8, and even ones below 2^-6."""
LARGEST = torch.finfo(FLOAT8).max
FAINTEST = 2.0**-100
"""A row whose values are all below this, such as one of zeros, is scaled as if this were its largest."""


def row_scales(weight: Tensor) -> Tensor:
    """The smallest power of two for each row with which its values, divided by it, fit into float8.

    Powers of two, not amax / 448: float8 is as exact at any scale, so this loses nothing, while dividing and
    multiplying by them never rounds. Hence float8 weights become the same numbers in bfloat16 as in float32, and
    weights that were float8 numbers times a power of two before stay exactly what they are. Those of a file with
    another scale are rounded a second time: 2.7 to 4.9 % off (relative L2, by the scale) instead of 2.6 %.

    Args:
        weight: rows columns.
    Returns:
        rows 1, float32; the largest of a row becomes more than 224 and at most 448.
    Raises:
        CheckpointError: if a value is NaN or infinite.
    """
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    if (bad := ~largest.isfinite()).any():
        row = int(bad.nonzero()[0, 0])
        raise CheckpointError(
            f"row {row} of {len(weight)} holds {largest[row].item()}, which has no place among 8-bit weights: all must "
            "be finite. The file is damaged: download it again or use another one."
        )
    room = LARGEST / largest.clamp(min=FAINTEST)
    mantissa = torch.frexp(room)[0]  # room / (2 * mantissa) is the largest power of two up to room
    return 2 * mantissa / room


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 values and their float32 scales, rows columns and rows 1.

    values * scale differs from `weight` by at most the larger of |weight| / 17 (half a step, where steps are widest
    beside the value) and scale / 1024 (half of the even steps near zero), which is below amax / 229 000.
    """
    scale = row_scales(weight)
    return (weight / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """An nn.Linear whose weight is float8 with one scale per output row. Same inputs, outputs and parameter names.

    `.to(dtype)` and its like cast the bias alone: weight and scales keep their types and only follow to devices.
    The scales are in no state_dict, so that its names stay those of nn.Linear; it is no checkpoint of its own.
    """

    def __init__(self, linear: nn.Linear):
        """Take the place of `linear`, and its weights if it has some; on the meta device they come later."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=FLOAT8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", weight.new_empty(len(weight), 1, dtype=torch.float32), persistent=False)
        if not weight.is_meta:
            self.take_weight(weight)

    def take_weight(self, value: Tensor) -> None:
        """Store a weight of any floating type; loading calls this instead of setting the parameter.

        Raises:
            CheckpointError: if it holds NaN or infinity.
        """
        assert value.shape == self.weight.shape
        weight, self.scale = quantize(value)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is multiplied with: exact in float32 and bfloat16, rounded once in float16."""
        return self.weight.to(dtype).mul_(self.scale)  # float8 fits into all of them; mul_ rounds after the product

    def forward(self, x: Tensor) -> Tensor:  # B L in_features -> B L out_features
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)  # a kernel that multiplies float8 itself belongs here

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        """What every `.to()`, `.half()` and `.cuda()` does to the tensors of a module."""
        fixed = (self.weight, self.scale)

        def keep_type(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            is_cast = changed.dtype != tensor.dtype and any(tensor is other for other in fixed)
            return tensor.to(changed.device) if is_cast else changed

        return super()._apply(keep_type, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def swap_linears(model: S2VTransformer) -> None:
    """Give every product inside the DiT's blocks 8-bit weights, in place, on the meta device or with its weights.

    Which ones is told by where they are: the blocks hold 14 of the 16 billion parameters, so the 14B model shrinks
    from 33.2 to 19.1 GB. Outside of them stay embeddings, time, head and audio encoder, which are small and mostly
    float32 in the reference too, and the audio injectors: 3.8 GB in bfloat16, but all that moves the lips, so nobody
    should round them before lip sync was measured. Modulation and norms inside the blocks are no products.
    """
    swapped = 0
    for block in model.stack.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                block.set_submodule(name, Float8Linear(layer))
                swapped += 1
    log.info("8-bit weights: %d products in %d blocks are kept as float8", swapped, len(model.stack.blocks))
