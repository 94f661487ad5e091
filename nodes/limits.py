"""What memory a run may use: what Wan S2V Memory says, for every stage of a prompt, and ComfyUI's own flags."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management as manager
from comfy.cli_args import args as comfy_arguments
from comfy_execution.progress import get_progress_state

from ..wan_s2v_core.config import AUTO, MEMORY_PROFILES, MemoryLimits, check_choice
from ..wan_s2v_core.errors import ConfigError
from ..wan_s2v_core.memory.budget import SLICES

MEMORY_NODE = "WanS2VMemory"
CUSTOM = "custom"
PROFILES = (AUTO, *MEMORY_PROFILES, CUSTOM)
DECIDED = -1
"""In widgets: decided by what is free."""
FEWEST_TOKENS = SLICES[-1]
SMALL_STATES = (manager.VRAMState.LOW_VRAM, manager.VRAMState.NO_VRAM)
"""Of ComfyUI started with --lowvram or --novram: little of a network is to be on the GPU."""


def limits_of(
    profile: str, vram_limit_gb: float, resident_blocks: int, slice_tokens: int, vae_tile: int, weights: str
) -> MemoryLimits:
    """What the widgets say.

    Raises:
        ConfigError: if one says what cannot be.
    """
    check_choice("profile", profile, PROFILES)
    limit = vram_limit_gb if profile == CUSTOM else MEMORY_PROFILES.get(profile)
    by_hand = (None if value == DECIDED else value for value in (resident_blocks, slice_tokens, vae_tile))
    return MemoryLimits(limit, *by_hand, weights)


def of_other_stages(limits: MemoryLimits) -> MemoryLimits:
    """What of the limits of a DiT holds for encoders."""
    return MemoryLimits(limits.vram_limit_gb, weights=limits.weights)


def limits_in_prompt() -> MemoryLimits:
    """The tightest limits that Memory nodes of the running prompt set, for stages before the model that they change."""
    prompt = get_progress_state().dynprompt
    nodes = [prompt.get_node(node_id) for node_id in prompt.all_node_ids()]
    said = [limits_of_inputs(node["inputs"]) for node in nodes if node.get("class_type") == MEMORY_NODE]
    limited = [limits for limits in said if limits.vram_limit_gb is not None]
    return of_other_stages(min(limited or said or [MemoryLimits()], key=lambda limits: limits.vram_limit_gb or 0))


def limits_of_inputs(inputs: Mapping[str, Any]) -> MemoryLimits:
    """Limits of a Memory node in a prompt; what is linked, and what it refuses itself, sets none."""
    values = {name: value for name, value in inputs.items() if not isinstance(value, list)}
    try:
        return limits_of(
            values.get("profile", AUTO), values.get("vram_limit_gb", 8.0), *[DECIDED] * 3, values.get("weights", AUTO)
        )
    except (ConfigError, TypeError):
        return MemoryLimits()


def started_limits(limits: MemoryLimits) -> MemoryLimits:
    """Limits of a run, and those that ComfyUI's own flags stand for where a run says nothing.

    --lowvram keeps no blocks on the GPU, --novram also computes few tokens at once.
    """
    if manager.vram_state not in SMALL_STATES:
        return limits
    tokens = FEWEST_TOKENS if manager.vram_state == manager.VRAMState.NO_VRAM else None
    return replace(
        limits,
        resident_blocks=0 if limits.resident_blocks is None else limits.resident_blocks,
        slice_tokens=tokens if limits.slice_tokens is None else limits.slice_tokens,
    )


def reserved_bytes() -> int:
    """VRAM that ComfyUI was told to leave to others (--reserve-vram, --vram-headroom), or leaves by itself."""
    return round(manager.extra_reserved_memory() + getattr(comfy_arguments, "vram_headroom", 0) * 1024**3)
