"""Makes ComfyUI on a CPU believe in an NVIDIA card, for forecasts: figures are replaced, nothing can run on it."""

import os

import comfy.model_management as manager
import torch

CARD, NAME = torch.device("cuda", 0), "Pretended card"
TOTAL_BYTES, FREE_BYTES = 24_000_000_000, 22_000_000_000
AMPERE = (8, 6)

plain_total, plain_name = manager.get_total_memory, manager.get_torch_device_name


def total_memory(device=None, torch_total_too=False):
    if device not in (None, CARD):
        return plain_total(device, torch_total_too)
    return (TOTAL_BYTES, TOTAL_BYTES) if torch_total_too else TOTAL_BYTES


def free_memory(device=None, torch_free_too=False):
    return (FREE_BYTES, FREE_BYTES) if torch_free_too else FREE_BYTES


manager.get_torch_device = lambda: CARD
manager.get_torch_device_name = lambda device: NAME if device == CARD else plain_name(device)
manager.get_total_memory, manager.get_free_memory = total_memory, free_memory
torch.cuda.mem_get_info = lambda device=None: (FREE_BYTES, TOTAL_BYTES)
torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda device=None: 0
torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0
torch.cuda.get_device_capability = lambda device=None: AMPERE

if state := os.environ.get("PRETENDED_STATE"):  # a server on a CPU cannot be started with --novram or --lowvram
    manager.vram_state = manager.VRAMState[state]

NODE_CLASS_MAPPINGS = {}
