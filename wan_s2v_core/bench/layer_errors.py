"""How much each kind of product costs in accuracy when it alone is computed in 8 bits: what decides which are kept."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..acceleration.quantization import LINEARS, swap_linears
from ..model.dit import S2VTransformer

EXPERT = re.compile(r"experts\.\d+\.")
ALL, CHOSEN = "all", "all but those kept"


def kind_of_product(name: str) -> str:
    """What a product of a block is for: `stack.blocks.3.feed_forward.experts.1.up` -> `feed_forward.up`."""
    return EXPERT.sub("", name.split(".", 3)[3])


def products_of(model: S2VTransformer) -> dict[str, nn.Linear]:
    """The plain products inside the blocks, by name."""
    layers = {name: layer for name, layer in model.named_modules() if name.startswith("stack.blocks.")}
    return {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}


def groups_of(model: S2VTransformer) -> dict[str, list[str]]:
    """Names of products by what they are for, by block, and all of them."""
    groups: dict[str, list[str]] = {}
    names = list(products_of(model))
    for name in names:
        groups.setdefault(kind_of_product(name), []).append(name)
    for name in names:
        groups.setdefault(f"block {name.split('.')[2]}", []).append(name)
    return groups | {ALL: names}


@contextmanager
def in_place(model: S2VTransformer, swap: Callable[[], None]) -> Iterator[None]:
    """Within, what `swap` did to the products of the blocks; they are back afterwards."""
    plain = products_of(model)
    try:
        swap()
        yield
    finally:
        for name, layer in plain.items():
            model.set_submodule(name, layer)


def swap_all(model: S2VTransformer, names: list[str], linears: str) -> None:
    """8-bit layers in the places of these products, kept or not."""
    for name in names:
        model.set_submodule(name, LINEARS[linears](model.get_submodule(name)))


@torch.inference_mode()
def layer_errors(model: S2VTransformer, forward: Callable[[], Tensor], linears: str = "float8") -> dict[str, float]:
    """Relative L2 error of what a plain model gives when each group of its products alone is in 8 bits.

    Args:
        forward: runs the model on inputs of its own, the same ones at each call.
        linears: one of quantization.LINEARS.
    Returns:
        by what products are for, by block, of all, and of all but those that `swap_linears` keeps.
    """
    swaps = {group: partial(swap_all, model, names, linears) for group, names in groups_of(model).items()}
    swaps[CHOSEN] = partial(swap_linears, model, linears)
    exact, errors = forward().double(), {}
    for group, swap in swaps.items():
        with in_place(model, swap):
            errors[group] = float((forward().double() - exact).norm() / exact.norm())
    return errors
