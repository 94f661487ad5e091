"""One stage of a run: its network, placed as planned, and stopped between two layers when the run is cancelled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from .budget import WHOLE, Planned
from .networks import Networks


@contextmanager
def checked_before_layers(network: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every layer of a network; what it raises stops the network there."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    hooks = [layer.register_forward_pre_hook(lambda *_: check()) for layers in lists for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def placed(
    networks: Networks, name: str, planned: Planned = WHOLE, check: Callable[[], None] = lambda: None
) -> Iterator[nn.Module]:
    """One network for one stage, as planned. `name`: as for `Networks.use`.

    Args:
        check: called before it is placed and before each of its layers; may raise to stop.
    """
    check()
    with networks.use(name, planned) as network, checked_before_layers(network, check):
        yield network
