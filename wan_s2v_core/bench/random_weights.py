"""Random weights for any of our networks, from a seed, such that activations stay of order one.

For speed and memory at real size, and for tiny checkpoints. Every value is representable in bfloat16, so the same
weights serve float32 and bfloat16.
"""

import math
import zlib

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


def fill_random(
    network: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> None:
    """Give a network (on the meta device or not) random weights in place, one tensor at a time."""
    keeps = getattr(network, "keeps_full_precision", lambda name: False)
    depth = 3 * len(network.stack.blocks) if hasattr(network, "stack") else 1
    for name, old in list(network.named_parameters()):
        value = random_tensor(name, tuple(old.shape), seed, depth, device)
        place(network, name, value, torch.float32 if keeps(name) else dtype)
    network.eval()
