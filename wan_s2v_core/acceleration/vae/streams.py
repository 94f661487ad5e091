"""How the layers of the video VAE compute while a video passes through them, a few frames at a time.

A stream holds what causal convolutions remember of the frames before: the last two, as the network saw them, so that
any cut in time gives the same numbers. `LibraryStream` runs anywhere and in any type; `KernelStream` is for graphics
cards with a tensor memory accelerator (Hopper and later).

Frames travel as T H W+G C: channels last, and G columns of zeros at the end of each row.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import FRAME, POINT, SPREAD, UP, Packing, spread_taps

PAST = 2
"""Frames that a causal convolution with three taps in time looks back."""
OUTPUT_RANGE = (-1.0, 1.0)


class Convolution(nn.Module):
    """A convolution of the VAE, with the norm and SiLU before it if there are some. Weights as the stream's kind wants.

    Args:
        plain: nn.Conv3d, or nn.Conv2d, whose weights are copied.
        norm: its WanRMS_norm, or None.
        mode: one of those in `packing`.

    `frames` is how many its stream hands it at most when it gets `step`; `sharers`: layers of its stream that see
    frames of its size.
    """

    def __init__(self, plain: nn.Module, norm: nn.Module | None, kind: type["Stream"], dtype: torch.dtype, mode=FRAME):
        super().__init__()
        weight = plain.weight.detach().float()
        weight = weight.unsqueeze(2) if weight.ndim == 4 else weight  # N C kt kh kw
        self.outputs = len(weight)
        self.packing, weight = kind.arrange(weight, mode)
        self.weight, self.bias = fixed(weight.to(dtype)), fixed(plain.bias.detach().float())
        self.gamma = None if norm is None else fixed(norm.gamma.detach().float().flatten())
        self.frames = self.sharers = self.step = 1

    def frames_of(self, most: int) -> int:
        """Frames it is handed at most where its stream gets `most` at once, but never more than its step."""
        return max(1, self.frames * min(most, self.step) // self.step)


def fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def normalized(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the last axis and SiLU, in float32."""
    return F.silu(F.normalize(x.float(), dim=-1) * (len(gamma) ** 0.5 * gamma)).to(x.dtype)


def four_times(x: Tensor) -> Tensor:
    """T H W C -> T 2H 2W C, every pixel four times."""
    tall, wide = x.shape[1:3]
    return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(len(x), 2 * tall, 2 * wide, x.shape[3])


class Stream:
    """What the two kinds share: the layout of frames. One object per video, or per part of its picture."""

    gap = 0
    """Columns of zeros at the end of each row."""

    def __init__(self, most: int = 1_000_000):
        """most: frames that are handed in at once, where that is less than the step its layers were made for."""
        self.most = most
        self.ends = False
        """Whether no frames follow those that are handed in: then nothing is remembered."""
        self.begun: set[nn.Module] = set()
        """Layers whose first frame has passed."""
        self.pasts: dict[nn.Module, Any] = {}

    @classmethod
    def arrange(cls, weight: Tensor, mode: int) -> tuple[Packing | None, Tensor]:
        """N C kt kh kw -> weights as `convolve` and its like want them."""
        if mode == POINT:
            return None, weight.flatten(1)
        return None, weight.contiguous(memory_format=torch.channels_last_3d)

    @classmethod
    def enter(cls, video: Tensor, dtype: torch.dtype) -> Tensor:
        """C T H W -> T H W+G C."""
        frames = video.permute(1, 2, 3, 0).to(dtype)
        return (F.pad(frames, (0, 0, 0, cls.gap)) if cls.gap else frames).contiguous()

    @classmethod
    def leave(cls, x: Tensor) -> Tensor:
        """T H W+G C -> C T H W, a view."""
        return x[:, :, : x.shape[2] - cls.gap].permute(3, 0, 1, 2)

    @classmethod
    def crop(cls, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """A part of the picture, as frames of their own."""
        if (rows.start, rows.stop) == (0, x.shape[1]) and (columns.start, columns.stop) == (0, x.shape[2] - cls.gap):
            return x
        part = x[:, rows, columns]
        return (F.pad(part, (0, 0, 0, cls.gap)) if cls.gap else part).contiguous()

    def remember(self, layer: nn.Module, x: Tensor, frames: int = PAST, gamma: Tensor | None = None) -> Tensor:
        """The frames, normalised if there is a gamma, with those before them, zeros at the beginning. Keeps the last
        for the next time."""
        past = self.pasts.pop(layer, None)
        seen = x.new_empty(frames + len(x), *x.shape[1:])
        seen[:frames] = 0 if past is None else past
        del past
        if gamma is None:
            seen[frames:] = x
        else:
            for i, frame in enumerate(x, frames):  # one at a time: they are float32 on the way
                seen[i] = normalized(frame, gamma)
        if not self.ends:
            self.pasts[layer] = seen[-frames:].clone()
        return seen

    def mix(self, layer: Convolution, x: Tensor) -> Tensor:
        """One tap: the channels of each pixel. Columns of zeros get values, which the caller does not show."""
        return F.linear(x, layer.weight, layer.bias.to(x.dtype))


class LibraryStream(Stream):
    """With what PyTorch offers."""

    def _apply(self, layer: Convolution, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        """T H W C -> T' H' W' N, zeros around the picture, none in time."""
        tall, wide = (size // 2 if stride[1] == 1 else 0 for size in layer.weight.shape[3:])
        x = x.permute(3, 0, 1, 2)[None]  # 1 C T H W, channels last
        bias = layer.bias.to(x.dtype)
        if layer.weight.shape[2] == 1:
            frames = x[0].transpose(0, 1)  # T C H W
            y = F.conv2d(frames, layer.weight[:, :, 0], bias, stride[1:], (tall, wide))
            return y.permute(0, 2, 3, 1).contiguous()
        y = F.conv3d(x, layer.weight, bias, stride, (0, tall, wide))
        return y[0].permute(1, 2, 3, 0).contiguous()

    def convolve(self, layer: Convolution, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """A causal convolution, after its norm and SiLU, plus `residual`, which may become the result."""
        y = self._apply(layer, self.remember(layer, x, gamma=layer.gamma))
        return y if residual is None else y.add_(residual)

    def _each(self, layer: Convolution, x: Tensor, resized: Callable[[Tensor], Tensor], stride: int) -> Tensor:
        """A convolution within each frame, of what `resized` makes of it: one at a time, for those may be large."""
        out = None
        for i in range(len(x)):
            y = self._apply(layer, resized(x[i : i + 1]), (1, stride, stride))
            out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
            out[i] = y[0]
        return out

    def enlarge(self, layer: Convolution, x: Tensor) -> Tensor:
        """Every pixel four times, then a convolution within the frame."""
        return self._each(layer, x, four_times, 1)

    def shrink(self, layer: Convolution, x: Tensor) -> Tensor:
        """A convolution at every second pixel, zeros right of and below the picture."""
        return self._each(layer, x, lambda frame: F.pad(frame, (0, 0, 0, 1, 0, 1)), 2)

    def double_time(self, layer: Convolution, x: Tensor) -> Tensor:
        """Two frames for each; N = 2 C."""
        y = self._apply(layer, self.remember(layer, x))  # T H W 2C
        return y.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1).contiguous()

    def halve_time(self, layer: Convolution, x: Tensor) -> Tensor:
        """One frame for each two, with the one before them."""
        return self._apply(layer, self.remember(layer, x, 1), (2, 1, 1))

    def show(self, layer: Convolution, x: Tensor) -> Tensor:
        """The last convolution, to pixels within OUTPUT_RANGE. T H W C -> C T H W, float32."""
        return self.leave(self.convolve(layer, x).float().clamp_(*OUTPUT_RANGE))


class FramePool:
    """Frames of one size in one tensor, taken and returned by number. Frame 0 is zeros for good."""

    def __init__(self, frames: int, like: Tensor):
        """like: T H W+1 C, whose frames these are to resemble."""
        size = like[0].numel()
        pixel = -(-like.shape[3] // LINE) * LINE  # what is read left of the first and right of the last pixel
        memory = like.new_empty(frames * size + 2 * pixel)
        memory[:pixel].zero_(), memory[-pixel:].zero_()
        self.frames = memory[pixel:-pixel].view(frames, *like.shape[1:])
        self.frames[0].zero_()
        self.free = list(range(1, frames))
        self.tables: dict[tuple[int, ...], Tensor] = {}

    def table(self, numbers: tuple[int, ...]) -> Tensor:
        """The numbers on the device; the same ones come back every few steps."""
        if numbers not in self.tables:
            self.tables[numbers] = torch.tensor(numbers, dtype=torch.int32, device=self.frames.device)
        return self.tables[numbers]

    def take(self, count: int) -> tuple[int, ...]:
        taken, self.free = self.free[:count], self.free[count:]
        return tuple(taken)

    def give_back(self, numbers: tuple[int, ...]) -> None:
        self.free = sorted({*self.free, *numbers} - {0})


class KernelStream(Stream):
    """With kernels of our own. What a causal convolution sees lies in a pool that all layers of its size share: its
    norm writes new frames there, and the last two stay until next time, so none is copied, padded or joined."""

    gap = 1

    def __init__(self, most: int = 1_000_000):
        super().__init__(most)
        self.pools: dict[tuple[int, ...], FramePool] = {}

    @classmethod
    def arrange(cls, weight: Tensor, mode: int) -> tuple[Packing | None, Tensor]:
        if mode == POINT:
            return super().arrange(weight, mode)
        outputs = len(weight)
        if mode == SPREAD:
            weight = spread_taps(weight)
            outputs, mode = len(weight), FRAME
        kernel = (1, 2, 2) if mode == UP else tuple(weight.shape[2:])
        packing = Packing(mode, kernel, -(-weight.shape[1] // ALIGNED) * ALIGNED, outputs)
        return packing, packing.pack(weight)

    @classmethod
    def enter(cls, video: Tensor, dtype: torch.dtype) -> Tensor:
        missing = -len(video) % ALIGNED
        return F.pad(video.permute(1, 2, 3, 0).to(dtype), (0, missing, 0, cls.gap))

    def _convolved(self, layer: Convolution, x: Tensor, residual: Tensor | None, bias: Tensor, dtype=None) -> Tensor:
        from .kernels import convolve, normalize

        pool = self._pool(layer, x)
        past, new = self.pasts.get(layer, (0,) * PAST), pool.take(len(x))
        if layer.gamma is None:
            pool.frames[pool.table(new).long()] = x
        else:
            normalize(x, layer.gamma, pool.frames, pool.table(new))
        seen = past + new
        out = x.new_empty(*x.shape[:3], len(bias), dtype=dtype) if residual is None else residual
        convolve(pool.frames, pool.table(seen), layer.weight, bias, layer.packing, out, residual)
        kept = () if self.ends else seen[-PAST:]
        self.pasts[layer] = kept
        pool.give_back(seen[: len(seen) - len(kept)])
        return out

    def _pool(self, layer: Convolution, x: Tensor) -> FramePool:
        size = tuple(x.shape[1:])
        if size not in self.pools:
            remembered = 0 if self.ends else PAST * layer.sharers  # it begins with its end where one step is all
            self.pools[size] = FramePool(1 + remembered + layer.frames_of(self.most), x)
        return self.pools[size]

    def convolve(self, layer: Convolution, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._convolved(layer, x, residual, layer.bias)

    def _resized(self, layer: Convolution, x: Tensor, height: int, width: int) -> Tensor:
        from .kernels import convolve

        out = x.new_empty(len(x), height, width + self.gap, layer.outputs)
        convolve(x, self._count(x), layer.weight, layer.bias, layer.packing, out)
        return out

    def _count(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), dtype=torch.int32, device=x.device)

    def enlarge(self, layer: Convolution, x: Tensor) -> Tensor:
        return self._resized(layer, x, 2 * x.shape[1], 2 * (x.shape[2] - self.gap))

    def shrink(self, layer: Convolution, x: Tensor) -> Tensor:
        return self._resized(layer, x, x.shape[1] // 2, (x.shape[2] - self.gap) // 2)

    def double_time(self, layer: Convolution, x: Tensor) -> Tensor:
        from .kernels import convolve

        seen = self.remember(layer, x)
        width = layer.outputs // 2
        out = x.new_empty(2 * len(x), *x.shape[1:3], width)
        packing, table = replace(layer.packing, outputs=width), self._count(seen)
        for half in range(2):
            part = slice(half * width, (half + 1) * width)
            convolve(seen, table, layer.weight[part], layer.bias[part], packing, out[half::2])
        return out

    def halve_time(self, layer: Convolution, x: Tensor) -> Tensor:
        from .kernels import convolve

        seen = self.remember(layer, x, 1)
        out = x.new_empty(len(x) // 2, *x.shape[1:3], layer.outputs)
        convolve(seen, self._count(seen), layer.weight, layer.bias, layer.packing, out, step=2)
        return out

    def show(self, layer: Convolution, x: Tensor) -> Tensor:
        from .kernels import gather_taps

        nothing = layer.bias.new_zeros(layer.packing.outputs)
        spread = self._convolved(layer, x, None, nothing, torch.float32)
        return self.leave(gather_taps(spread, layer.bias))


ALIGNED = 8
"""Channels come in multiples of this: 16 bytes in bfloat16, which the tensor memory accelerator reads at least."""
LINE = 64
"""Values by which the frames of a pool are aligned in memory."""
