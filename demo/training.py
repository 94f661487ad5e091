"""What both trainers need: an end in time, a learning rate that knows it, averaged weights, records and pictures."""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

BULKY = ("losses", "resumed")
"""Parts of a log that are not for the screen."""


class TimeBox:
    """Training ends after `minutes`, or when someone asks the process to end (SIGTERM, SIGINT)."""

    def __init__(self, minutes: float):
        self.began, self.seconds, self.stopped = time.monotonic(), 60 * minutes, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_) -> None:
        self.stopped = True

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def share(self) -> float:
        """0 at the beginning, 1 at the end."""
        return 1.0 if self.stopped else min(1.0, self.elapsed / self.seconds)

    @property
    def is_over(self) -> bool:
        return self.share == 1.0


class Ranks:
    """The processes that train one model side by side, a card each, as torchrun starts them; without it, this one."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        return torch.device(wanted, int(os.environ["LOCAL_RANK"])) if self.count > 1 else torch.device(wanted)

    def agreed(self, share: float) -> float:
        """The mean over all: every rank ends, and lowers its learning rate, in the same step."""
        if self.count == 1:
            return share
        mean = torch.tensor(share / self.count, dtype=torch.float64)
        distributed.all_reduce(mean)
        return mean.item()

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give all ranks the mean; where a rank had no use for a parameter, it counts as 0."""
        if self.count == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten() for part in parts]) / self.count
        distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([part.numel() for part in parts]), strict=True):
            parameter.grad = part.view_as(parameter)

    def close(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


def learning_rate(highest: float, share: float, step: int, warm_up_steps: int, lowest: float = 0.02) -> float:
    """A linear warm-up by steps, then half a cosine over the time that there is, down to `lowest` of the highest."""
    cosine = lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * share))
    return highest * cosine * min(1.0, (step + 1) / warm_up_steps)


class AveragedWeights:
    """An exponential moving average of a network's parameters, in float32; its memory grows with the steps made."""

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.names = [name for name, _ in network.named_parameters()]
        self.values = [value.detach().clone().float() for value in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [value.detach() for value in network.parameters()], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))


class Muon:
    """Momentum with an orthogonalised update for matrices (Jordan et al. 2024; scaled as in arXiv 2502.16982).

    Matrices of one shape go through the iteration together: torch.optim.Muon takes one after the other, and the many
    small ones of a tiny model then cost more to launch than a training step.

    Args:
        parameters: matrices. The learning rate comes with each step, of the size that suits AdamW.
    """

    MOMENTUM = 0.95
    ITERATIONS = 5
    QUINTIC = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.01):
        self.weight_decay, self.groups = weight_decay, {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group])
            momentum = self.momenta[shape].lerp_(gradient, 1 - self.MOMENTUM)
            update = self.orthogonal(gradient.lerp(momentum, self.MOMENTUM)) * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            torch._foreach_add_(group, list(update), alpha=-rate)

    def orthogonal(self, matrices: Tensor) -> Tensor:
        """N a b -> the same with singular values near 1, by Newton-Schulz iterations."""
        a, b, c = self.QUINTIC
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if is_tall else matrices
        x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(self.ITERATIONS):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return (x.mT if is_tall else x).float()


def save_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Whole or not at all, so that a run that is killed leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, part, metadata)
    part.replace(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def record_of(options: argparse.Namespace) -> dict:
    """What a trainer was told, but for where it writes, and what the one before it left that this one goes on from."""
    told = {name: value for name, value in vars(options).items() if name != "out"}
    record = {"options": {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}}
    before = options.resume and options.resume.with_suffix(".json")
    if before and before.is_file():
        record["resumed"] = json.loads(before.read_text(encoding="utf-8"))
    return record


def profiled(train: Callable[[argparse.Namespace], dict], options: argparse.Namespace) -> None:
    """Train for a few steps and tell where the time goes, on the card and on its way there."""
    with torch.profiler.profile() as profile:
        train(options)
    for order in ("self_device_time_total", "self_cpu_time_total"):
        print(profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))


def save_log(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 values that bfloat16 holds too: what is packed later is exactly what was trained with and measured."""
    return {name: value.bfloat16().float() for name, value in weights.items()}


def to_video(pixels: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """T H W 3 uint8 -> 1 3 T H W in [-1, 1] on a device; it travels as bytes."""
    frames = torch.as_tensor(np.ascontiguousarray(pixels) if isinstance(pixels, np.ndarray) else pixels)
    return (frames.to(device).movedim(-1, 0).float() / 127.5 - 1)[None]


def to_bytes(video: Tensor) -> Tensor:
    """3 T H W in [-1, 1] -> T H W 3 uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu()


def contact_sheet(rows: Iterable[Iterable[np.ndarray]], path: Path) -> None:
    """Rows of pictures H W 3 uint8 of one size, as one PNG."""
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(path)


def spread(count: int, number: int) -> list[int]:
    """`number` indices evenly over `count`, both ends among them."""
    return np.linspace(0, count - 1, number).round().astype(int).tolist()


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """... 4 (left, top, right, bottom) -> ... height width: 1 inside of the box, 0 outside."""
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    left, top, right, bottom = (boxes[..., i, None, None] for i in range(4))
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)).float()
