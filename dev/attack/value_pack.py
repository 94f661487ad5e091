"""A pack of nodes for ComfyUI: values as other packs make them, and of no kind, on a link of any type."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

RATE, SAMPLES = 16000, 12800


class Anything(str):
    """A type that no other is unequal to: ComfyUI then allows every link."""

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = str.__hash__


class ReadOnly(Mapping):
    """A mapping that is no dict, which reads its values when they are asked for."""

    def __init__(self, values: dict[str, Any]):
        self.values_by_name = values

    def __getitem__(self, name: str) -> Any:
        return self.values_by_name[name]

    def __iter__(self):
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


def tone(channels: int = 1) -> torch.Tensor:
    """B C N."""
    return (0.3 * torch.sin(torch.arange(SAMPLES) * 2 * torch.pi * 440 / RATE)).expand(1, channels, SAMPLES).clone()


def picture() -> torch.Tensor:
    """B H W C: brighter from left to right."""
    return torch.linspace(0.05, 0.95, 96)[None, None, :, None].expand(1, 80, 96, 3).clone()


def audio(waveform: Any, rate: Any = RATE) -> dict[str, Any]:
    return {"waveform": waveform, "sample_rate": rate}


SOUNDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: audio(tone()),
    "mapping": lambda: ReadOnly(audio(tone())),
    "more keys": lambda: audio(tone()) | {"path": "x", 5: None},
    "float64": lambda: audio(tone().double()),
    "float16": lambda: audio(tone().half()),
    "bfloat16": lambda: audio(tone().bfloat16()),
    "int16": lambda: audio((tone() * 32767).to(torch.int16)),
    "int32": lambda: audio((tone() * (2**31 - 1)).to(torch.int32)),
    "uint8": lambda: audio((tone() * 127 + 128).to(torch.uint8)),
    "int64": lambda: audio((tone() * 32767).to(torch.int64)),
    "int16 as float": lambda: audio(tone() * 32767),
    "int32 as float": lambda: audio(tone() * 2**31),
    "too loud": lambda: audio(tone() * 9),
    "bool": lambda: audio(tone() > 0),
    "complex": lambda: audio(tone().to(torch.complex64)),
    "numpy": lambda: audio(tone().numpy()),
    "a list of numbers": lambda: audio([[[0.0, 0.1] * 6400]]),
    "one axis": lambda: audio(tone()[0, 0]),
    "two axes": lambda: audio(tone()[0]),
    "four axes": lambda: audio(tone()[None]),
    "channels last": lambda: audio(tone(2).mT),
    "a batch": lambda: audio(torch.cat([tone(), tone() * 0.1])),
    "a batch of none": lambda: audio(tone()[:0]),
    "no channel": lambda: audio(tone()[:, :0]),
    "no sample": lambda: audio(tone()[..., :0]),
    "twelve channels": lambda: audio(tone(12)),
    "a view": lambda: audio(tone()[..., :1].expand(1, 2, SAMPLES)),
    "with a gradient": lambda: audio(tone().requires_grad_()),
    "on meta": lambda: audio(tone().to("meta")),
    "sparse": lambda: audio(tone().to_sparse()),
    "no number": lambda: audio(tone() * float("nan")),
    "one infinity": lambda: audio(tone().index_fill_(2, torch.tensor([9]), float("inf"))),
    "rate of 0": lambda: audio(tone(), 0),
    "rate of -1": lambda: audio(tone(), -1),
    "rate of 1": lambda: audio(tone(), 1),
    "rate of 2**40": lambda: audio(tone(), 2**40),
    "rate as a float": lambda: audio(tone(), 16000.0),
    "rate of 22050.5": lambda: audio(tone(), 22050.5),
    "rate as a text": lambda: audio(tone(), "16000"),
    "rate as a tensor": lambda: audio(tone(), torch.tensor(16000)),
    "no rate": lambda: {"waveform": tone()},
    "rate of none": lambda: audio(tone(), None),
    "no waveform": lambda: {"sample_rate": RATE},
    "a list of sounds": lambda: [audio(tone())],
    "a tensor alone": lambda: tone(),
    "nothing": lambda: None,
}
PICTURES: dict[str, Callable[[], Any]] = {
    "plain": picture,
    "a batch": lambda: torch.cat([picture(), 1 - picture()]),
    "three axes": lambda: picture()[0],
    "two axes": lambda: picture()[0, ..., 0],
    "five axes": lambda: picture()[None],
    "channels first": lambda: picture().movedim(-1, 1),
    "float16": lambda: picture().half(),
    "bfloat16": lambda: picture().bfloat16(),
    "float64": lambda: picture().double(),
    "uint8": lambda: (picture() * 255).to(torch.uint8),
    "255 as float": lambda: picture() * 255,
    "-1 to 1": lambda: picture() * 2 - 1,
    "no number": lambda: picture() * float("nan"),
    "infinite": lambda: picture() / 0,
    "transparent": lambda: torch.cat([picture(), torch.full((1, 80, 96, 1), 0.5)], -1),
    "grey": lambda: picture()[..., :1],
    "two channels": lambda: picture()[..., :2],
    "seven channels": lambda: picture()[..., :1].expand(1, 80, 96, 7),
    "one pixel": lambda: picture()[:, :1, :1],
    "none of them": lambda: picture()[:0],
    "no pixel": lambda: picture()[:, :0],
    "on meta": lambda: picture().to("meta"),
    "numpy": lambda: picture().numpy(),
    "a list": lambda: [picture()[0]],
    "complex": lambda: picture().to(torch.complex64),
    "huge": lambda: picture()[:, :1, :1].expand(1, 30_000, 30_000, 3),
    "nothing": lambda: None,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "a text": lambda: "text",
    "a number": lambda: 5,
    "an object": object,
    "a class": lambda: dict,
    "a latent": lambda: {"samples": torch.zeros(1, 16, 1, 8, 8)},
    "an empty mapping": dict,
    "a linear layer": lambda: torch.nn.Linear(2, 2),
    "an encoder's output": lambda: {"encoded_audio_all_layers": torch.zeros(4, 1, 30, 32), "audio_samples": 9600},
    "an odd encoder's output": lambda: ReadOnly({"encoded_audio_all_layers": [], "audio_samples": "x"}),
}
VALUES = {
    f"{kind}: {name}": make
    for kind, of in (("sound", SOUNDS), ("picture", PICTURES), ("other", OTHERS))
    for name, make in of.items()
}


class AttackValue:
    """Gives one of the values by its name."""

    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "give"
    CATEGORY = "attack"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"what": ("STRING", {"default": ""})}}

    def give(self, what: str) -> tuple[Any]:
        return (VALUES[what](),)


class AttackPass:
    """Gives what it is given, whatever that is."""

    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "give"
    CATEGORY = "attack"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (Anything("*"), {})}}

    def give(self, value: Any) -> tuple[Any]:
        return (value,)


NODE_CLASS_MAPPINGS = {"AttackValue": AttackValue, "AttackPass": AttackPass}
