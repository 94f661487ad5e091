"""Random weights for any of our networks, from a seed, such that activations stay of order one.

For speed and memory at real size, and for tiny checkpoints. Every value is representable in bfloat16, so the same
weights serve float32 and bfloat16.
"""

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..model.loading import place

RESIDUAL_OUTPUTS = ("attention.out.weight", "feed_forward.down.weight")
NEAR_ONE = ("layer_weights", "original0", "gamma")
"""Parameters that scale others, whatever their shape."""


def random_tensor(name: str, shape: tuple[int, ...], seed: int, depth: int, device: torch.device | str) -> Tensor:
    """One parameter in float32. Depends on its name, shape and the seed, and on the kind of device, on nothing else.

    Products keep the variance of their input; those that write to the stream share it among `depth` of them.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    noise = torch.randn(shape, generator=generator, device=device)
    fan_in = math.prod(shape[1:])
    if name.endswith(NEAR_ONE) or (len(shape) == 1 and name.endswith("weight")):
        value = 1 + 0.1 * noise
    elif len(shape) == 1:
        value = 0.02 * noise
    elif any(part in name for part in ("segment_embedding", "shared", "relative_attention_bias")):
        value = noise
    else:
        value = noise / math.sqrt(fan_in * (depth if name.endswith(RESIDUAL_OUTPUTS) else 1))
    return value.bfloat16().float()


def shapes_of(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter by name, in the shape that a file has it: a layer that stores its weight in a way of its own
    (`take_weight`, see `model.loading.place`) may keep it in another shape, or not as a parameter.
    """
    own = {
        f"{name}.weight" if name else "weight": (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if hasattr(module, "take_weight") and hasattr(module, "in_features")
    }
    yield from own.items()
    for name, parameter in network.named_parameters():
        if name not in own:
            yield name, tuple(parameter.shape)


def fill_random(
    network: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> None:
    """Give a network (on the meta device or not) random weights in place, one tensor at a time."""
    keeps = getattr(network, "keeps_full_precision", lambda name: False)
    depth = 3 * len(network.stack.blocks) if hasattr(network, "stack") else 1
    for name, shape in list(shapes_of(network)):
        value = random_tensor(name, shape, seed, depth, device)
        place(network, name, value, torch.float32 if keeps(name) else dtype)
    network.eval()
