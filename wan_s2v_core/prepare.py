"""What is done to plain networks before they run, in the one order that composes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .acceleration.convolution import flatten_convolutions
from .acceleration.quantization import swap_linears
from .config import check_choice
from .model.checkpoint import DIT, TEXT_ENCODER, VAE

AUTO = "auto"


@dataclass(frozen=True)
class Precision:
    """How weights are stored and products computed in the DiT; the text encoder shares the type of its products."""

    dtype: torch.dtype
    has_float8_weights: bool = False


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float32": Precision(torch.float32),
    "float8-weights": Precision(torch.bfloat16, has_float8_weights=True),
}


@dataclass(frozen=True)
class LoadPlan:
    """How the networks of a run are loaded: types, and what is changed before there are weights."""

    precision: Precision
    device: torch.device
    """Where they compute."""

    def dtype(self, kind: str) -> torch.dtype:
        """VAE and audio encoder stay in full precision, as in the reference."""
        return self.precision.dtype if kind in (DIT, TEXT_ENCODER) else torch.float32

    def prepare(self, kind: str) -> Callable[[nn.Module], None]:
        """To be called on the network of that kind."""
        return partial(self._prepare, kind)

    def _prepare(self, kind: str, network: nn.Module) -> None:
        if kind == DIT and self.precision.has_float8_weights:
            swap_linears(network)
        if kind == VAE and self.device.type == "cpu":
            flatten_convolutions(network)


def plan_loading(precision: str, device: torch.device) -> LoadPlan:
    """The plan for a precision of that name; auto is bfloat16, and float32 on a CPU.

    Raises:
        ConfigError: if there is none of that name.
    """
    check_choice("precision", precision, (AUTO, *PRECISIONS))
    if precision == AUTO:
        precision = "float32" if device.type == "cpu" else "bfloat16"
    return LoadPlan(PRECISIONS[precision], device)
