"""Nodes for tests alone, which make ComfyUI on a CPU believe in a card with little memory.

The card is cpu:0: torch computes there as on cpu, ComfyUI takes it for another device and manages it as it does a real
one. Only the figures are replaced: what is free is the card's size less what ComfyUI has placed there. A network that
does not fit raises what torch raises. What comes and leaves is written to small_card.jsonl in the output folder.
"""

import json
from pathlib import Path

import comfy.model_management as manager
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.ops import manual_cast

CARD = torch.device("cpu:0")
MB = 1 << 20
ROOM_MB = 33
"""For weights: enough for each network that the test uses, and for no two of the larger ones."""
OTHER_WIDTH, OTHER_LAYERS = 1400, 4
SIZE = manager.minimum_inference_memory() + ROOM_MB * MB
EVENTS = Path(folder_paths.get_output_directory()) / "small_card.jsonl"

plain_free, plain_total = manager.get_free_memory, manager.get_total_memory
plain_load = manager.LoadedModel.model_load


def placed_bytes(*more: ModelPatcher) -> float:
    """On the card: networks that ComfyUI lists as loaded, and one that it is about to list."""
    listed = [entry.model for entry in manager.current_loaded_models if entry.model is not None]
    return sum({id(patcher): patcher.loaded_size() for patcher in (*listed, *more)}.values())


def free_memory(device=None, torch_free_too=False):
    if device not in (None, CARD):
        return plain_free(device, torch_free_too)
    free = SIZE - placed_bytes()
    return (free, free) if torch_free_too else free


def total_memory(device=None, torch_total_too=False):
    if device not in (None, CARD):
        return plain_total(device, torch_total_too)
    return (SIZE, SIZE) if torch_total_too else SIZE


def watched(method):
    """Write down when ComfyUI changes how much of a network is on the card."""

    def watch(self, *args, **options):
        patcher = self.model
        before = patcher.loaded_size()
        result = method(self, *args, **options)
        if patcher.loaded_size() != before:
            network = getattr(patcher.model, "network", patcher.model)
            sizes = {
                "size": patcher.model_size(),
                "before": before,
                "after": patcher.loaded_size(),
                "placed": placed_bytes(patcher),
            }
            with EVENTS.open("a") as file:
                file.write(json.dumps({"network": type(network).__name__, **sizes}) + "\n")
        return result

    return watch


def load(self, *args, **options):
    patcher = self.model
    needed = placed_bytes(patcher) - patcher.loaded_size() + patcher.model_size()
    if needed > ROOM_MB * MB:
        raise torch.OutOfMemoryError(f"{needed / MB:.0f} MB of weights on a card with room for {ROOM_MB} MB")
    return plain_load(self, *args, **options)


manager.get_torch_device = lambda: CARD
manager.get_free_memory, manager.get_total_memory = free_memory, total_memory
manager.LoadedModel.model_load = watched(load)
manager.LoadedModel.model_unload = watched(manager.LoadedModel.model_unload)


class OtherNetwork(torch.nn.Sequential):
    pass


class OtherModel:
    """A model of somebody else's, which is wanted on the card after something else."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def __init__(self):
        layers = (manual_cast.Linear(OTHER_WIDTH, OTHER_WIDTH) for _ in range(OTHER_LAYERS))
        self.patcher = ModelPatcher(OtherNetwork(*layers), CARD, torch.device("cpu"))

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "after": ("IMAGE",)}}

    def run(self, image, after):
        manager.load_models_gpu([self.patcher])
        with torch.inference_mode():
            self.patcher.model(torch.ones(1, OTHER_WIDTH))
        return (image,)


NODE_CLASS_MAPPINGS = {"OtherModel": OtherModel}
