"""What this very card can do at most, measured: products at the shapes of a block, attention at a number of tokens,
and copies. The shares of these ceilings are what carries over from card to card.
"""

import logging
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..acceleration.attention.registry import Setting
from ..acceleration.quantization.linear8 import has_triton, product8
from ..config import S2VModelConfig
from ..private_torch import integer_product, scaled_product
from .engine import attention_kernels
from .flops import ForwardFlop
from .measure import Call, interleaved, now, release

log = logging.getLogger(__name__)

Choose = Callable[[list[float]], float]
"""Seconds of some runs -> those that count."""
RUNS = 5
SUSTAINED_SECONDS = 1.0
"""A card is kept busy for so long before its rate is taken: at its limit of power it is faster for a moment than for
the seconds that a forward takes."""
PRODUCTS = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8-weights": "bf16", "float8": "fp8", "int8": "int8",
}  # fmt: skip
"""In what the products of the blocks are computed, by precision."""
OUTSIDE = {"fp32": "fp32", "fp16": "fp16"}
"""In what those outside of the blocks are, where that is not bf16."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TF32 = "tf32"
LARGE = ((32_768, 4096, 4096), (16_384, 8192, 8192))
"""Rows, inner and outer width of products that keep any card busy. Which one is faster depends on the card."""
LONGEST = 80_000
"""Tokens beyond which rates are taken as they are here: no kernel becomes faster, and attention over 300,000 takes
seconds a call."""
COPIED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}


@dataclass(frozen=True)
class Rates:
    """Ceilings for one number of tokens and one precision. TFLOP/s; None where this device has no such product."""

    products: str
    square: float | None
    """Width to width."""
    up: float | None
    down: float | None
    outside: float | None
    """Width to width in the precision of what is outside of the blocks."""
    attention: float | None
    attention_kernel: str | None
    attention_bits: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Allowed:
    """Seconds that the ceilings allow for a forward: nothing but its products, each at its ceiling."""

    attention: float
    linears: float

    @property
    def total(self) -> float:
        return self.attention + self.linears


def allowed_seconds(flop: ForwardFlop, rates: Rates) -> Allowed | None:
    """None where a ceiling could not be measured."""
    pairs = ((flop.square, rates.square), (flop.up, rates.up), (flop.down, rates.down), (flop.outside, rates.outside))
    if rates.attention is None or any(rate is None for _, rate in pairs):
        return None
    linears = sum(work / rate for work, rate in pairs) / 1e12
    return Allowed(flop.attentions / rates.attention / 1e12, linears)


class Ceilings:
    """Measures each ceiling when it is first asked for, and keeps it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: dict[tuple, Any] = {}

    def rates(self, config: S2VModelConfig, tokens: int, precision: str, bits: int) -> Rates:
        products, tokens = PRODUCTS.get(precision, "bf16"), min(tokens, LONGEST)
        e, hidden = config.width, config.feed_forward_width
        shapes = {"square": (e, e), "up": (e, hidden), "down": (hidden, e)}
        found = {name: self.product(products, tokens, *sides) for name, sides in shapes.items()}
        outside = self.product(OUTSIDE.get(products, "bf16"), tokens, e, e)
        attention, kernel = self.attention(config, tokens, bits, products)
        return Rates(products, **found, outside=outside, attention=attention, attention_kernel=kernel,
                     attention_bits=bits)  # fmt: skip

    def product(self, products: str, tokens: int, inner: int, outer: int) -> float | None:
        """TFLOP/s of tokens x inner times inner x outer."""
        key = ("product", products, tokens, inner, outer)
        if key not in self._kept:
            seconds = self._seconds(lambda: product_call(products, tokens, inner, outer, self.device), key)
            self._kept[key] = None if seconds is None else 2 * tokens * inner * outer / seconds / 1e12
        return self._kept[key]

    def large(self, dtype: torch.dtype) -> float | None:
        """TFLOP/s that no network exceeds whose products are of that type: the fastest run of a large product.

        A card that was idle is faster for a moment than for seconds, and so may a short network be. float32 counts as
        TF32 where convolutions may use that.
        """
        name = next((name for name, known in TYPES.items() if known == dtype), "fp32")
        names = [name]
        if name == "fp32" and self.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            names.append(TF32)
        part = 1 if self.device.type == "cuda" else 16
        sizes = [tuple(side // part for side in sides) for sides in LARGE]
        rates = [self.fastest_product(name, *sides) for name in names for sides in sizes]
        return max((rate for rate in rates if rate), default=None)

    def fastest_product(self, products: str, tokens: int, inner: int, outer: int) -> float | None:
        """TFLOP/s of the fastest of some runs, sustained or not."""
        key = ("fastest", products, tokens, inner, outer)
        if key not in self._kept:
            seconds = self._seconds(lambda: product_call(products, tokens, inner, outer, self.device), key, min)
            self._kept[key] = None if seconds is None else 2 * tokens * inner * outer / seconds / 1e12
        return self._kept[key]

    def attention(
        self, config: S2VModelConfig, tokens: int, bits: int, products: str
    ) -> tuple[float | None, str | None]:
        """TFLOP/s of the fastest exact kernel, and its name."""
        dtype = TYPES.get(products, torch.bfloat16)
        key = ("attention", dtype, tokens, config.heads, config.head_width, bits)
        if key not in self._kept:
            sizes = (1, tokens, config.heads, config.head_width)
            kernels = attention_kernels(bits, Setting(self.device, dtype, config.head_width))
            calls = {
                name: partial(attention_call, attend, sizes, dtype, self.device) for name, attend in kernels.items()
            }
            glances = {name: self._seconds(make, (name, tokens), is_glance=True) for name, make in calls.items()}
            fastest = min((name for name, seconds in glances.items() if seconds), key=glances.get, default=None)
            seconds = fastest and self._seconds(calls[fastest], (fastest, tokens))
            self._kept[key] = (4 * tokens**2 * config.width / seconds / 1e12 if seconds else None), fastest
            release(self.device)
        return self._kept[key]

    def copies(self) -> dict[str, float]:
        """GB/s inside the device's memory (read and written), and to it from page-locked main memory."""
        if "copies" not in self._kept:
            count = COPIED_BYTES[self.device.type]
            calls = {"device_gbs": (2 * count, partial(copy_call, self.device, self.device, count))}
            if self.device.type == "cuda":
                calls["to_device_gbs"] = (count, partial(copy_call, torch.device("cpu"), self.device, count))
            times = {name: (moved, self._seconds(make, (name,))) for name, (moved, make) in calls.items()}
            self._kept["copies"] = {name: moved / took / 1e9 for name, (moved, took) in times.items() if took}
        return self._kept["copies"]

    def _seconds(
        self, make: Callable[[], Call], what: tuple, choose: Choose = statistics.median, is_glance: bool = False
    ) -> float | None:
        try:
            call = make()
            before = [] if choose is statistics.median else self._runs(call, RUNS, 0.0)
            return choose(before + self._runs(call, 1 if is_glance else RUNS, 0.0 if is_glance else SUSTAINED_SECONDS))
        except (RuntimeError, ImportError, AttributeError) as error:  # no such kernel here, or no room for it
            log.warning("no ceiling of %s: %s", what, str(error).partition("\n")[0])
            return None

    def _runs(self, call: Call, runs: int, seconds_before: float) -> list[float]:
        began = now(self.device)
        while self.device.type == "cuda" and now(self.device) - began < seconds_before:
            call()
        return list(interleaved({"": call}, runs, self.device)[""])


def attention_call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Call:
    """Attention over random tokens. sizes: B L N D."""
    q, k, v = (torch.randn(sizes, device=device, dtype=dtype) for _ in range(3))
    return lambda: attend(q, k, v)


def copy_call(source: torch.device, target: torch.device, count: int) -> Call:
    """A copy of that many bytes; from main memory, of page-locked ones."""
    given = torch.ones(count, dtype=torch.uint8, device=source)
    if source.type == "cpu" and target.type == "cuda":
        given = given.pin_memory()
    taken = torch.empty(count, dtype=torch.uint8, device=target)
    return lambda: taken.copy_(given, non_blocking=True)


def product_call(products: str, tokens: int, inner: int, outer: int, device: torch.device) -> Call:
    """A product of random matrices with the kernel that torch has for it."""
    rows, weight = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (tokens, outer))
    if products == TF32:
        rows, weight = rows.float(), weight.float()
        return lambda: tf32_product(rows, weight)
    if products in TYPES:
        rows, weight = rows.to(TYPES[products]), weight.to(TYPES[products])
        return lambda: F.linear(rows, weight)
    if products == "int8":
        rows, weight = (torch.randint(-127, 128, t.shape, device=device, dtype=torch.int8) for t in (rows, weight))
        if device.type != "cuda" or not has_triton():
            return lambda: integer_product(rows, weight)
        row_scale, scale = (torch.ones(n, 1, device=device) for n in (tokens, outer))
        return lambda: product8(rows, row_scale, weight, scale, None, torch.bfloat16)  # faster than torch's
    scales = [torch.ones(n, device=device) for n in (tokens, outer)]
    rows, weight = rows.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    return lambda: scaled_product(rows, weight, scales[0][:, None], scales[1][None])  # summed up fast


def tf32_product(rows: Tensor, weight: Tensor) -> Tensor:
    """float32 rounded to TF32, as convolutions are by default."""
    flags = torch.backends.cuda.matmul
    before, flags.allow_tf32 = flags.allow_tf32, True
    try:
        return F.linear(rows, weight)
    finally:
        flags.allow_tf32 = before
