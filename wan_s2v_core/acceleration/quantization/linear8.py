"""What all layers with 8-bit weights have in common: values, one scale per output row, and how they are stored."""

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...seams import Rows8
from ..rows8 import quantize_rows

log = logging.getLogger(__name__)


def largest_of_rows(weight: Tensor) -> Tensor:
    """The largest absolute value of each row, rows columns -> rows 1 in float32.

    Raises:
        CheckpointError: if a value is NaN or infinite.
    """
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    check_rows(largest)
    return largest.clamp(min=Rows8.FAINTEST)


def check_rows(largest: Tensor) -> None:
    """Raises CheckpointError unless what stands for each row, rows 1, is finite."""
    if (bad := ~largest.isfinite()).any():
        row = int(bad.nonzero()[0, 0])
        raise CheckpointError(
            f"row {row} of {len(largest)} holds {largest[row].item()}, which has no place among 8-bit weights: all "
            "must be finite. The file is damaged: download it again or use another one."
        )


class Linear8(nn.Module):
    """An nn.Linear whose weight has 8 bits and one scale per output row. Same inputs, outputs and parameter names.

    `.to(dtype)` and its like cast the bias alone: weight and scales keep their types and only follow to devices.
    The scales are in no state_dict, so that its names stay those of nn.Linear; it is no checkpoint of its own.
    """

    stored: ClassVar[torch.dtype]
    """Type of the weight."""
    rows_dtype: ClassVar[torch.dtype | None] = None
    """The type of Rows8 that `forward` takes in place of a tensor; None: tensors alone."""

    def __init__(self, linear: nn.Linear):
        """Take the place of `linear`, and its weights if it has some; on the meta device they come later."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=self.stored), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", weight.new_empty(len(weight), 1, dtype=torch.float32), persistent=False)
        if not weight.is_meta:
            self.take_weight(weight)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """rows columns of any floating type -> values of the same shape, and scales rows 1."""
        raise NotImplementedError

    def take_weight(self, value: Tensor) -> None:
        """Store a weight of any floating type; loading calls this instead of setting the parameter.

        Raises:
            CheckpointError: if it holds NaN or infinity.
        """
        self._store(*self.quantize(value))

    def _store(self, values: Tensor, scale: Tensor) -> None:
        assert values.shape == self.weight.shape and scale.shape == self.scale.shape
        self.weight, self.scale = nn.Parameter(values, requires_grad=False), scale

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers of a wider type: exact in float32, rounded at most once in others."""
        return self.weight.to(dtype).mul_(self.scale)  # 8 bits fit into all of them; mul_ rounds after the product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear8":
        """What every `.to()`, `.half()` and `.cuda()` does to the tensors of a module."""
        fixed = (self.weight, self.scale)

        def keep_type(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            is_cast = changed.dtype != tensor.dtype and any(tensor is other for other in fixed)
            return tensor.to(changed.device) if is_cast else changed

        return super()._apply(keep_type, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether our own kernel can be compiled."""
    return _find_triton()


@lru_cache
def _find_triton() -> bool:
    if find_spec("triton"):
        return True
    log.warning("8-bit products are scaled in steps of their own, which is much slower: package triton is missing")
    return False


PRODUCT_SCHEMA = (
    "(Tensor values, Tensor row_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor"
)


@torch.library.custom_op("wan_s2v::product8", mutates_args=(), schema=PRODUCT_SCHEMA)  # a compiler does not look inside
def product8(values, row_scale, weight, scale, bias, dtype):
    from .kernel import multiply_rows

    return multiply_rows(values, row_scale, weight, scale, bias, dtype)


@product8.register_fake
def _(values, row_scale, weight, scale, bias, dtype):
    return values.new_empty(len(values), len(weight), dtype=dtype)


class Product8(Linear8):
    """One that multiplies in 8 bits: activations become 8-bit rows, each with a scale of its own, unless they already
    are. For inference: no gradients pass through the rounding."""

    SIZE_STEP = 16
    """Both sides of the weight must be a multiple of this: rows of 16 bytes, which the kernels load at once."""

    @classmethod
    def fits(cls, linear: nn.Linear) -> bool:
        """Whether a layer has sizes that can be multiplied in 8 bits."""
        return not (linear.in_features % cls.SIZE_STEP or linear.out_features % cls.SIZE_STEP)

    def multiply(self, rows: Rows8) -> Tensor:
        """Rows M in_features -> M out_features in `rows.dtype`, bias included."""
        raise NotImplementedError

    def multiply_in_kernel(self, rows: Rows8) -> Tensor:
        """`multiply` in our own kernel, for cards with Triton."""
        return product8(rows.values, rows.scale, self.weight, self.scale, self.bias, rows.dtype)

    @torch.no_grad()
    def forward(self, x: Tensor | Rows8) -> Tensor:  # B L in_features -> B L out_features
        rows = x if isinstance(x, Rows8) else quantize_rows(x, self.rows_dtype)
        assert rows.values.dtype == self.rows_dtype
        flat = Rows8(rows.values.flatten(0, -2), rows.scale.reshape(-1, 1), rows.dtype)
        return self.multiply(flat).view(*rows.values.shape[:-1], self.out_features)
