"""Lets ComfyUI on a CPU run its prompts on a pretended GPU that refuses what CUDA does: tests/core/pretended_cuda.py.

Linked into the custom nodes of a test's server; it has no nodes.
"""

import functools
import importlib.util
from pathlib import Path

import comfy.model_management as manager
import execution

FILE = Path(__file__).resolve().parents[1] / "core" / "pretended_cuda.py"
spec = importlib.util.spec_from_file_location("pretended_cuda", FILE)
pretended = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretended)

plain_total, plain_free = manager.get_total_memory, manager.get_free_memory
plain_execute = execution.PromptExecutor.execute


def figure(bytes_there, plain):
    """A figure of ComfyUI's about memory, for the pretended GPU as well."""

    def read(device=None, *with_torch, **also_with_torch):
        if device not in (None, pretended.GPU):
            return plain(device, *with_torch, **also_with_torch)
        return (bytes_there, bytes_there) if any((*with_torch, *also_with_torch.values())) else bytes_there

    return read


@functools.wraps(plain_execute)
def execute(*args, **options):
    """A prompt runs in one thread, whose modes these are."""
    with pretended.pretended_cuda():
        return plain_execute(*args, **options)


manager.get_torch_device = lambda: pretended.GPU
manager.get_torch_device_name = str
manager.get_total_memory = figure(pretended.TOTAL_BYTES, plain_total)
manager.get_free_memory = figure(pretended.FREE_BYTES, plain_free)
execution.PromptExecutor.execute = execute

NODE_CLASS_MAPPINGS = {}
