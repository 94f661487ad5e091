"""8-bit weights for the products of the DiT's blocks and of umT5, and products that are computed in 8 bits.

`swap` says which layers, `fp8` and `int8` say how. Swap the layers while the network is on the meta device, and loading
turns each tensor into 8 bits as it is read; the whole model in bfloat16 never has to fit.
"""

from .fp8 import FLOAT8, Float8Linear, Float8Product
from .int8 import Int8Product
from .linear8 import Linear8
from .swap import LINEARS, check_device, is_product, swap_linears, swap_text_linears

__all__ = [
    "FLOAT8",
    "LINEARS",
    "Float8Linear",
    "Float8Product",
    "Int8Product",
    "Linear8",
    "check_device",
    "is_product",
    "swap_linears",
    "swap_text_linears",
]
