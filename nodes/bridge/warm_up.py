"""What a run needs besides weights is made ready before it is asked for."""

from typing import Any

import comfy.model_management as manager

from ...wan_s2v_core.model.checkpoint import DIT, VAE
from ...wan_s2v_core.warm_up import LIBRARIES, WarmUp, kernels_of_dit, kernels_of_vae
from ..limits import limits_in_prompt

WARMED: dict[str, WarmUp] = {}


def import_libraries() -> None:
    """Begin to import what networks are built with; once in a process."""
    if "libraries" not in WARMED:
        WARMED["libraries"] = WarmUp(LIBRARIES)


async def import_when_idle(_: Any) -> None:
    """Called when the server has started: until a prompt comes, there is time for what takes seconds."""
    import_libraries()


def warm_up() -> None:
    """Begin to make ready what a run needs besides weights; called when it begins."""
    import_libraries()
    device = manager.get_torch_device()
    if DIT not in WARMED:
        WARMED[DIT] = WarmUp(kernels_of_dit(device))
    if VAE not in WARMED and limits_in_prompt().vram_limit_gb is None:
        WARMED[VAE] = WarmUp(kernels_of_vae(device), after=WARMED["libraries"])


def wait_until_warm(kind: str) -> None:
    """Until what a kind of network needs is ready, where that has begun."""
    for warmed in tuple(WARMED.values()):  # another thread may add one meanwhile
        warmed.wait(kind)
