"""The Triton kernel for products in 8 bits as Python on the CPU, against the plain product. Run by test_interpreted.py
in a process in which TRITON_INTERPRET is set before Triton is imported."""

import pytest
import torch
from torch import nn

from wan_s2v_core.acceleration.quantization import Float8Product, Int8Product, fp8, int8
from wan_s2v_core.acceleration.quantization.kernel import TILINGS, Tiling, multiply_rows
from wan_s2v_core.acceleration.rows8 import quantize_rows

PLAIN = {Int8Product: int8.multiply_in_parts, Float8Product: fp8.multiply_emulated}
ODD, LARGE, TINY = (37, 48, 80, None), (70, 144, 272, Tiling(32, 64, 64, 4, 2, 2)), (1, 16, 16, TILINGS[-1])
"""Rows, channels, outputs and blocks: smaller and larger than the product."""
CASES = [  # any two of kind, size, bias and type meet
    (Int8Product, ODD, True, torch.float32),
    (Float8Product, ODD, False, torch.bfloat16),
    (Int8Product, LARGE, False, torch.bfloat16),
    (Float8Product, LARGE, True, torch.float32),
    (Int8Product, TINY, True, torch.bfloat16),
    (Float8Product, TINY, False, torch.float32),
]


@pytest.mark.parametrize(("kind", "size", "bias", "dtype"), CASES)
def test_our_kernel_equals_the_plain_product(kind, size, bias, dtype, fresh_seed):
    torch.manual_seed(fresh_seed)
    m, k, n, tiling = size
    layer = kind(nn.Linear(k, n, bias=bias))
    rows = quantize_rows(torch.randn(m, k).to(dtype), layer.rows_dtype)
    out = multiply_rows(rows.values, rows.scale, layer.weight, layer.scale, layer.bias, dtype, tiling)
    assert out.dtype == dtype
    close = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out, PLAIN[kind](rows, layer), atol=1e-5, rtol=close)
