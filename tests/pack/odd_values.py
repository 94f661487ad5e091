"""A pack of nodes that give AUDIO and IMAGE as other packs do, for tests: no tensors of the usual kind."""

from collections.abc import Mapping

import torch

RATE = 22050


class OnDemand(Mapping):
    """A mapping that is no dict, which reads a file when it is asked."""

    def __init__(self, values: dict):
        self.values = values

    def __getitem__(self, key):
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def tone() -> torch.Tensor:
    """N."""
    times = torch.arange(RATE) / RATE
    return 0.3 * torch.sin(2 * torch.pi * 220 * times) * (torch.sin(2 * torch.pi * 3 * times) > 0)


SOUNDS = {
    "mapping": lambda: OnDemand({"waveform": tone()[None, None], "sample_rate": RATE}),
    "int16": lambda: {"waveform": (tone()[None, None] * 32767).to(torch.int16), "sample_rate": RATE},
    "two sides": lambda: {"waveform": tone()[None], "sample_rate": float(RATE)},
    "loud": lambda: {"waveform": tone()[None, None] * 20, "sample_rate": RATE},
    "32-bit floats": lambda: {"waveform": tone()[None, None] * 2**31, "sample_rate": RATE},
    "no rate": lambda: {"waveform": tone()[None, None]},
    "many channels": lambda: {"waveform": tone()[None, :, None], "sample_rate": RATE},
}
PICTURE = torch.linspace(0, 1, 96)[None, :, None, None].expand(1, 96, 64, 3)
PICTURES = {
    "bytes": lambda: (PICTURE * 255).to(torch.uint8),
    "one": lambda: PICTURE[0],
    "list": lambda: [PICTURE[0]],
    "no channels": lambda: PICTURE[..., 0],
    "no values": lambda: PICTURE.to("meta"),
}


class OddSound:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "give"
    CATEGORY = "test"

    def give(self, kind):
        return (SOUNDS[kind](),)


class OddPicture(OddSound):
    RETURN_TYPES = ("IMAGE",)

    def give(self, kind):
        return (PICTURES[kind](),)


NODE_CLASS_MAPPINGS = {"OddSound": OddSound, "OddPicture": OddPicture}
