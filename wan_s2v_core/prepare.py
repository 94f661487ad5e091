"""What is done to a plain model before it runs, in the one order that composes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .acceleration.quantization import swap_linears
from .config import check_choice


@dataclass(frozen=True)
class Precision:
    """How the DiT's weights are stored and its products computed; the text encoder shares the type of the products."""

    dtype: torch.dtype
    prepare: Callable[[nn.Module], None] | None = None
    """Applied to the DiT before its weights are read."""


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float32": Precision(torch.float32),
    "float8-weights": Precision(torch.bfloat16, swap_linears),
}
AUTO = "auto"


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; auto is bfloat16, and float32 on a CPU.

    Raises:
        ConfigError: if there is none of that name.
    """
    check_choice("precision", name, (AUTO, *PRECISIONS))
    if name == AUTO:
        name = "float32" if device.type == "cpu" else "bfloat16"
    return PRECISIONS[name]
