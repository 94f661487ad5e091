"""Which layers get 8-bit weights, and which devices multiply them."""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import BackendUnavailable
from ...model.dit import S2VTransformer
from ...model.text_encoder import TextEncoder
from .fp8 import Float8Linear, Float8Product
from .int8 import Int8Product
from .linear8 import Linear8, Product8

log = logging.getLogger(__name__)

LINEARS: dict[str, type[Linear8]] = {
    "float8-weights": Float8Linear,
    "float8": Float8Product,
    "int8": Int8Product,
}
"""What takes the place of a plain product, by the name of the precision."""
KEPT: dict[str, tuple[str, ...]] = {"float8": (), "int8": ("cross_attention.q",)}
"""Products that stay what they are in these precisions, by measured error (benchmarks/README.md). In float8 none stands
out; keeping attention.out would lower the error of the embedded model by a quarter and cost 1.2 to 1.7 % of the time.
In int8, outliers hurt cross_attention.q for little gain. Names are those within a block."""


@dataclass(frozen=True)
class Card:
    """The oldest that multiplies in a type."""

    capability: tuple[int, int]
    name: str
    older: str
    """Precisions for cards before it."""


OLDEST_CARDS = {
    "float8": Card((8, 9), "NVIDIA's Ada, Hopper and later", "int8 or float8-weights"),
    "int8": Card((8, 0), "NVIDIA's Ampere and later", "float8-weights"),
}


def check_device(linears: str, device: torch.device) -> None:
    """Whether a device multiplies what `linears`, one of LINEARS, are made for. A CPU does, for checking: it is told.

    Raises:
        BackendUnavailable: if it does not.
    """
    if linears not in OLDEST_CARDS:
        return
    if device.type == "cpu":
        log.warning(
            "precision %s on a CPU saves no time: products of 8-bit numbers are emulated there, for checking what a "
            "card makes of them. Choose auto, which is float32 on a CPU, for speed",
            linears,
        )
        return
    card, what, instead = OLDEST_CARDS[linears], f"device {str(device)!r}", "float8-weights"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability >= card.capability:
            return
        what = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        instead = card.older if capability >= OLDEST_CARDS["int8"].capability else instead
    raise BackendUnavailable(
        f"precision {linears!r} cannot be used: {what} does not multiply in it; {card.name} do. Use {instead} here."
    )


def swap_linears(model: S2VTransformer, linears: str = "float8-weights") -> None:
    """Give every product inside the DiT's blocks 8-bit weights, in place, on the meta device or with its weights.

    Which ones is told by where they are: the blocks hold 14 of the 16 billion parameters, so the 14B model shrinks
    from 33.2 to 19.1 GB. Outside of them stay embeddings, time, head and audio encoder, which are small and mostly
    float32 in the reference too, and the audio injectors: 3.8 GB in bfloat16, but all that moves the lips, so nobody
    should round them before lip sync was measured. Modulation and norms inside the blocks are no products.

    Args:
        linears: one of LINEARS. Those that multiply in 8 bits leave KEPT as they are, and give way to float8 weights
            alone where sizes do not fit.
    """
    counts, misfits = Counter(), 0
    for block in model.stack.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                swapped = choose_linear(name, layer, linears)
                counts[swapped.__name__] += 1
                misfits += is_product(LINEARS[linears]) and not Product8.fits(layer)
                if swapped is not nn.Linear:
                    block.set_submodule(name, swapped(layer))
    log.info("%s in %d blocks: %s", linears, len(model.stack.blocks), dict(counts))
    if misfits:
        log.warning(
            "%d products have sizes that are no multiples of %d: their weights have 8 bits, but not their activations",
            misfits,
            Product8.SIZE_STEP,
        )


KEPT_IN_TEXT = "wo"
"""Of umT5: the feed-forward's second product. transformers keeps it apart because of its outliers, and casts what
enters it to the type of its weight."""


def swap_text_linears(encoder: TextEncoder) -> None:
    """Give the products of umT5's layers float8 weights, in place, on the meta device or with its weights: 11.4 GB
    become 7.8."""
    for layer in encoder.layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is nn.Linear and not name.endswith(KEPT_IN_TEXT):
                layer.set_submodule(name, Float8Linear(linear))


def is_product(kind: type[nn.Module]) -> bool:
    return issubclass(kind, Product8)


def choose_linear(name: str, layer: nn.Linear, linears: str) -> type[nn.Module]:
    """What takes the place of one product; nn.Linear if it stays. `name`: within its block."""
    wanted = LINEARS[linears]
    if name in KEPT.get(linears, ()):
        return nn.Linear
    return Float8Linear if is_product(wanted) and not wanted.fits(layer) else wanted
