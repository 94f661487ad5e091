"""Linked into the custom nodes of a measured server: counts weights that cross to the GPU, makes the GPU smaller, and
has another model of the size that is asked for.

Lines of gpu_watch.jsonl in the output folder: {"at": seconds since 1970, "bytes": of one tensor that crossed}.
Of the variables GPU_GB is how much this process may take of the GPU. With GPU_LOOKS_SMALL the whole GPU has no more, as
far as torch says.
"""

import json
import os
import time
from pathlib import Path

import comfy.model_management as manager
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch

FEWEST_BYTES = 1 << 20
EVENTS = Path(folder_paths.get_output_directory()) / "gpu_watch.jsonl"
WIDTH = 8192

plain_to, plain_copy, plain_cuda = torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cuda


def is_weight(tensor: torch.Tensor) -> bool:
    """By its shape: pictures, latents and embeddings have two sides of some length behind others, and a rotary table
    ends in pairs of cosine and sine."""
    has_sides = tensor.ndim > 2 and min(tensor.shape[-2:]) >= 16
    is_table = tensor.ndim == 3 and tensor.shape[-1] == 2
    return tensor.nbytes >= FEWEST_BYTES and not has_sides and not is_table


def note(source: torch.Tensor, result: torch.Tensor) -> None:
    if result.is_cuda and not source.is_cuda and is_weight(source):
        with EVENTS.open("a") as file:
            file.write(json.dumps({"at": time.time(), "bytes": source.nbytes}) + "\n")


def to(self, *args, **options):
    result = plain_to(self, *args, **options)
    note(self, result)
    return result


def cuda(self, *args, **options):
    result = plain_cuda(self, *args, **options)
    note(self, result)
    return result


def copy(self, source, *args, **options):
    result = plain_copy(self, source, *args, **options)
    if isinstance(source, torch.Tensor):
        note(source, self)
    return result


BESIDE_BYTES = 1.7e9
"""What CUDA, its libraries and kernels come to take of an H200 in a ComfyUI, beside torch's allocator."""


def cap(size: float) -> None:
    """Let the process take so many bytes, as the driver counts them."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(max(0.001, (size - BESIDE_BYTES) / total))


def look_small(size: float) -> None:
    """Say that the GPU has so many bytes."""
    plain_info = torch.cuda.mem_get_info

    def mem_get_info(device=None):
        free, total = plain_info(device)
        return max(0, min(free, int(size) - (total - free))), int(size)

    torch.cuda.mem_get_info = mem_get_info
    torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0
    manager.total_vram = size / (1 << 20)


if torch.cuda.is_available():
    torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cuda = to, copy, cuda
    if os.environ.get("GPU_GB"):
        cap(bytes_there := float(os.environ["GPU_GB"]) * 1e9)
        if os.environ.get("GPU_LOOKS_SMALL"):
            look_small(bytes_there)


class CoreModel:
    """A model as ComfyUI's own nodes have it, of random weights: loaded through its memory manager, and used once.

    The picture goes through, so that a graph can say what comes before and what after.
    """

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "tests"
    OUTPUT_NODE = True
    kept: dict = {}  # noqa: RUF012  (one for all of its nodes, as one loader would give)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "gigabytes": ("FLOAT", {"default": 10.0}), "name": ("STRING",)}}

    def run(self, image, gigabytes, name):
        began, device = time.time(), manager.get_torch_device()
        if gigabytes not in self.kept:
            self.kept[gigabytes] = make_patcher(gigabytes, device)
        patcher = self.kept[gigabytes]
        manager.load_models_gpu([patcher], memory_required=1 << 30)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        x = torch.randn(64, WIDTH if device.type == "cuda" else 64, device=device, dtype=dtype)
        with torch.inference_mode():
            for layer in patcher.model:
                x = torch.nn.functional.normalize(layer(x))
        total = float(x.float().sum())
        facts = {"name": name, "began": began, "ended": time.time(), "sum": total, "on_gpu": patcher.loaded_size()}
        with EVENTS.with_name("core_model.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
        return {"ui": {"text": [json.dumps(facts)]}, "result": (image,)}


def make_patcher(gigabytes: float, device: torch.device):
    """ComfyUI's patcher, the one that it takes for its own models."""
    width, dtype = (WIDTH, torch.bfloat16) if device.type == "cuda" else (64, torch.float32)
    layers = max(1, round(gigabytes * 1e9 / (width * width * dtype.itemsize)))
    linears = (comfy.ops.manual_cast.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers))
    network = torch.nn.Sequential(*linears)
    # With dynamic VRAM layers have no weights before they are loaded.
    weights = {f"{i}.weight": torch.randn(width, 1).to(dtype).expand(width, width).contiguous() for i in range(layers)}
    network.load_state_dict(weights, assign=True)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(network, load_device=device, offload_device=torch.device("cpu"))


NODE_CLASS_MAPPINGS = {"GpuWatchCoreModel": CoreModel}
