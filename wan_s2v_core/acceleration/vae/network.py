"""The video VAE, faster: channels last, several frames a step, nothing copied, and in parts of the picture if wanted.

`speed_up` gives a VAE another network with the same weights that encodes and decodes the same. What attends over the
whole picture runs at latent size for the whole picture, which is cheap; what works at higher sizes sees only a few
latent pixels around, so it may run in tiles that overlap by that much, and the result is the same.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import FRAMES_PER_LATENT, frames_of
from ...geometry import PIXELS_PER_LATENT as PIXELS
from ...model.vae import VideoVAE
from ...model.vae_parts import (
    DECODER_REACH,
    DECODER_STEP,
    ENCODER_REACH,
    ENCODER_STEP,
    LATENT_STEP,
    VaeParts,
    latent_steps,
    steps,
    tiles,
)
from ..kernels.trial import kernels_work
from .packing import DOWN, FRAME, POINT, SPREAD, UP
from .places import MAIN_MEMORY, Canvas, bring
from .streams import ALIGNED, Convolution, KernelStream, LibraryStream, Stream, fixed

log = logging.getLogger(__name__)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, plain: nn.Module, make: Callable[..., Convolution]):
        super().__init__()
        self.first, self.second = make(plain.conv1, plain.norm1), make(plain.conv2, plain.norm2)
        is_same = isinstance(plain.conv_shortcut, nn.Identity)
        self.shortcut = None if is_same else make(plain.conv_shortcut, None, POINT)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        beside = x if self.shortcut is None else stream.mix(self.shortcut, x)
        return stream.convolve(self.second, stream.convolve(self.first, x), beside)  # `beside` is not used again


class FrameAttention(nn.Module):
    """Each frame attends to itself, with one head over all positions."""

    def __init__(self, plain: nn.Module, make: Callable[..., Convolution]):
        super().__init__()
        self.qkv, self.out = make(plain.to_qkv, None, POINT), make(plain.proj, None, POINT)
        self.gamma = fixed(plain.norm.gamma.detach().float().flatten())

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # T h w C
        out, width = x.clone(), x.shape[2] - stream.gap
        for i in range(len(x)):  # one at a time: a frame may be large
            shown = x[i, :, :width]
            tokens = F.normalize(shown.float(), dim=-1) * (len(self.gamma) ** 0.5 * self.gamma)
            tokens = stream.mix(self.qkv, tokens.to(x.dtype).flatten(0, 1))  # h*w 3C
            tokens = F.scaled_dot_product_attention(*tokens[None, None].chunk(3, -1))[0, 0]
            out[i, :, :width] += stream.mix(self.out, tokens).unflatten(0, shown.shape[:2])
        return out


class Head(nn.Module):
    """A convolution that comes alone, after its norm or without one."""

    def __init__(self, layer: Convolution):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return stream.convolve(self.layer, x)


class Show(Head):
    """The last convolution of the decoder; its result has left the layout of frames."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return stream.show(self.layer, x)


class Enlarge(Head):
    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return stream.enlarge(self.layer, x)


class Shrink(Head):
    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return stream.shrink(self.layer, x)


class DoubleTime(Head):
    """Two frames for each but the first of a video, which stays alone and is not remembered."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.layer in stream.begun:
            return stream.double_time(self.layer, x)
        stream.begun.add(self.layer)
        first, rest = x[:1], x[1:]
        return torch.cat([first, stream.double_time(self.layer, rest)]) if len(rest) else first


class HalveTime(Head):
    """One frame for each two but the first of a video, which stays alone."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.layer in stream.begun:
            return stream.halve_time(self.layer, x)
        stream.begun.add(self.layer)
        first, rest = x[:1], x[1:]
        stream.pasts[self.layer] = first.clone()
        return torch.cat([first, stream.halve_time(self.layer, rest)]) if len(rest) else first


class Stage(nn.ModuleList):
    """Layers that a stream of frames passes through."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for layer in self:
            x = layer(x, stream)
        return x


class Builder:
    """Makes the layers of one stage and counts which of them see frames of the same size."""

    def __init__(self, kind: type[Stream], dtype: torch.dtype, frames: int):
        self.kind, self.dtype, self.step, self.frames, self.level = kind, dtype, frames, frames, 0
        self.made: list[tuple[tuple[int, int], Convolution]] = []

    def make(self, plain: nn.Module, norm: nn.Module | None = None, mode: int = FRAME) -> Convolution:
        layer = Convolution(plain, norm, self.kind, self.dtype, mode)
        layer.frames, layer.step = self.frames, self.step
        if plain.kernel_size == (3, 3, 3):
            self.made.append(((self.level, -(-plain.in_channels // ALIGNED)), layer))
        return layer

    def block(self, plain: nn.Module) -> Iterator[nn.Module]:
        """The layers for one of the network's own residual or resampling blocks."""
        if hasattr(plain, "conv1"):
            yield ResidualBlock(plain, self.make)
            return
        assert hasattr(plain, "resample"), f"{type(plain).__name__} has no place in a tiled stage"
        if plain.mode == "upsample3d":
            yield DoubleTime(self.make(plain.time_conv))
            self.frames *= 2
        self.level += 1
        yield (Enlarge if plain.mode.startswith("up") else Shrink)(
            self.make(plain.resample[1], None, UP if plain.mode.startswith("up") else DOWN)
        )
        if plain.mode == "downsample3d":
            yield HalveTime(self.make(plain.time_conv))
            self.frames = max(1, self.frames // 2)

    def middle(self, plain: nn.Module) -> Iterator[nn.Module]:
        yield ResidualBlock(plain.resnets[0], self.make)
        for attention, block in zip(plain.attentions, plain.resnets[1:], strict=True):
            yield FrameAttention(attention, self.make)
            yield ResidualBlock(block, self.make)

    def stage(self, layers: list[nn.Module]) -> Stage:
        counts = Counter(size for size, _ in self.made)
        for size, layer in self.made:
            layer.sharers = counts[size]
        return Stage(layers)


def encoder_stages(plain: nn.Module, kind: type[Stream], dtype: torch.dtype) -> tuple[Stage, Stage]:
    """What runs from full to latent size, and what runs at latent size."""
    blocks = list(plain.down_blocks)
    last = max(i for i, block in enumerate(blocks) if hasattr(block, "resample"))
    builder = Builder(kind, dtype, ENCODER_STEP)
    local: list[nn.Module] = [Head(builder.make(plain.conv_in))]
    for block in blocks[: last + 1]:
        local += builder.block(block)
    local_stage = builder.stage(local)
    builder = Builder(kind, dtype, LATENT_STEP)
    whole = [layer for block in blocks[last + 1 :] for layer in builder.block(block)]
    whole += builder.middle(plain.mid_block)
    whole += [Head(builder.make(plain.conv_out, plain.norm_out))]
    return local_stage, builder.stage(whole)


def decoder_stages(plain: nn.Module, kind: type[Stream], dtype: torch.dtype) -> tuple[Stage, Stage]:
    """What runs at latent size, up to doubling time there, and what runs from latent to full size."""
    builder = Builder(kind, dtype, LATENT_STEP)
    whole: list[nn.Module] = [Head(builder.make(plain.conv_in)), *builder.middle(plain.mid_block)]
    first, *others = plain.up_blocks
    whole += [ResidualBlock(block, builder.make) for block in first.resnets]
    doubled, enlarged = builder.block(first.upsamplers[0])
    whole_stage = builder.stage([*whole, doubled])
    builder = Builder(kind, dtype, DECODER_STEP)
    builder.level += 1
    local = [enlarged]
    for block in others:
        for part in (*block.resnets, *(block.upsamplers or ())):
            local += builder.block(part)
    local += [Show(builder.make(plain.conv_out, plain.norm_out, SPREAD))]
    return whole_stage, builder.stage(local)


class FastNetwork(nn.Module):
    """Encodes and decodes as the AutoencoderKLWan it is made of, and takes its place in a VideoVAE.

    Args:
        plain: with weights; they are copied.
        kind: how layers compute.
        dtype: of weights and of what travels between layers. Sums, norms and residual additions are float32 within a
            step; input, result and the layers that mix latent channels are float32.
    """

    def __init__(self, plain: nn.Module, kind: type[Stream], dtype: torch.dtype):
        super().__init__()
        self.config, self.kind, self.compute_dtype = plain.config, kind, dtype
        self.encoder_local, self.encoder_whole = encoder_stages(plain.encoder, kind, dtype)
        self.decoder_whole, self.decoder_local = decoder_stages(plain.decoder, kind, dtype)
        for name in ("quant_conv", "post_quant_conv"):
            layer = getattr(plain, name)
            setattr(self, f"{name}_weight", fixed(layer.weight.detach().float().flatten(1)))
            setattr(self, f"{name}_bias", fixed(layer.bias.detach().float()))

    @property
    def dtype(self) -> torch.dtype:
        """Of videos and latents, not of what is between."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.quant_conv_weight.device

    def encode_means(self, video: Tensor, parts: VaeParts) -> Tensor:
        """B 3 T H W, in main memory or on the device -> the posterior's means B C F h w, float32, on the device."""
        with torch.cuda.device_of(self.quant_conv_weight):  # kernels are launched on the current card
            means = [self._encode(one, parts).chunk(2)[0] for one in video]
            return torch.stack(means)

    def decode_frames(self, latents: Tensor, parts: VaeParts, keep_frames: int | None = None) -> Tensor:
        """B C F h w -> the last frames of the video, B 3 T H W in [-1, 1], float32, where `parts` says.

        Args:
            keep_frames: how many; None for all. The others are stored nowhere.
        """
        frames = frames_of(latents.shape[2])
        kept = frames if keep_frames is None else min(frames, keep_frames)
        canvas = Canvas(self._place(parts))
        sides = (PIXELS * side for side in latents.shape[3:])
        canvas.begin((len(latents), 3, kept, *sides), torch.float32)
        with torch.cuda.device_of(self.quant_conv_weight):
            for i, one in enumerate(latents):
                self._decode(one, parts, canvas, i, frames - kept)
        return canvas.finished()

    def _place(self, parts: VaeParts) -> torch.device:
        return MAIN_MEMORY if parts.is_apart else self.device

    def _encode(self, video: Tensor, parts: VaeParts) -> Tensor:
        """3 T H W -> 2C F h w."""
        features = self._local_features(video, parts)
        spans = latent_steps(len(features), features.shape[1], features.shape[2] - self.kind.gap)
        stream, mixed = self.kind(spans[0].stop), []
        for span in spans:
            stream.ends = span.stop == len(features)
            x = self.encoder_whole(bring(features[span], self.device), stream)
            mixed.append(self._mix_latents(self.kind.leave(x), "quant_conv"))
        return torch.cat(mixed, 1)

    def _local_features(self, video: Tensor, parts: VaeParts) -> Tensor:
        """3 T H W -> F h w+G C, what the part of the encoder that may be tiled makes of it."""
        kind, (height, width) = self.kind, video.shape[2:]
        h, w = height // PIXELS, width // PIXELS
        frames = 1 + (video.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        features = Canvas(self._place(parts))
        for rows, columns in picture_tiles(h, w, parts.tile, ENCODER_REACH):
            stream, at = kind(min(frames, ENCODER_STEP)), 0
            part = video[:, :frames, in_pixels(rows[0], h, height), in_pixels(columns[0], w, width)]
            for step in steps(frames, ENCODER_STEP):
                stream.ends = step.stop == frames
                x = self.encoder_local(kind.enter(bring(part[:, step], self.device), self.compute_dtype), stream)
                if features.is_new:
                    count = 1 + (frames - 1) // FRAMES_PER_LATENT
                    features.begin((count, h, w + kind.gap, x.shape[3]), x.dtype)
                end = at + len(x)
                features.put((slice(at, end), rows[1], columns[1]), x[:, inside(*rows), inside(*columns)])
                at = end
                del x
        return features.finished()

    def _decode(self, latents: Tensor, parts: VaeParts, canvas: Canvas, index: int, dropped: int) -> None:
        """C F h w -> the frames behind the first `dropped`, in place `index` of B 3 T H W."""
        features = self._whole_features(latents, parts)
        for rows, columns in picture_tiles(*latents.shape[2:], parts.tile, DECODER_REACH):
            stream, at = self.kind(min(len(features), DECODER_STEP)), -dropped
            shown = tuple(slice(PIXELS * s.start, PIXELS * s.stop) for s in (inside(*rows), inside(*columns)))
            places = tuple(slice(PIXELS * s.start, PIXELS * s.stop) for s in (rows[1], columns[1]))
            for step in steps(len(features), DECODER_STEP):
                stream.ends = step.stop == len(features)
                x = self.kind.crop(features[step], rows[0], columns[0])
                pixels = self.decoder_local(bring(x, self.device), stream)
                end = at + pixels.shape[1]
                if end > 0:
                    first = max(0, at)
                    place = (index, slice(None), slice(first, end), *places)
                    canvas.put(place, pixels[:, first - at :, shown[0], shown[1]])
                at = end
                del x, pixels

    def _whole_features(self, latents: Tensor, parts: VaeParts) -> Tensor:
        """C F h w -> T h w+G C, what runs at latent size makes of them, at double time."""
        spans = latent_steps(*latents.shape[1:])
        stream, features, at = self.kind(spans[0].stop), Canvas(self._place(parts)), 0
        for span in spans:
            stream.ends = span.stop == latents.shape[1]
            x = self._mix_latents(bring(latents[:, span], self.device), "post_quant_conv")
            x = self.decoder_whole(self.kind.enter(x, self.compute_dtype), stream)
            if features.is_new:
                features.begin((2 * latents.shape[1] - 1, *x.shape[1:]), x.dtype)
            features.put((slice(at, at + len(x)),), x)
            at += len(x)
            del x
        return features.finished()

    def _mix_latents(self, x: Tensor, name: str) -> Tensor:
        """The convolution with one tap beside the latents, C F h w in float32."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return torch.einsum("nc,cfhw->nfhw", weight, x.float()) + bias.view(-1, 1, 1, 1)


Part = tuple[slice, slice]
"""Latent pixels along a side: with what surrounds them, and alone."""


def picture_tiles(height: int, width: int, tile: int | None, reach: int) -> Iterator[tuple[Part, Part]]:
    """Rows and columns of each tile of a picture; see `tiles`."""
    for rows in tiles(height, tile, reach):
        for columns in tiles(width, tile, reach):
            yield rows, columns


def in_pixels(part: slice, length: int, pixels: int) -> slice:
    """Latent pixels as pixels; the last latent takes what is left over at the end."""
    return slice(PIXELS * part.start, pixels if part.stop == length else PIXELS * part.stop)


def inside(around: slice, alone: slice) -> slice:
    """Where a tile lies in itself with its surroundings."""
    return slice(alone.start - around.start, alone.stop - around.start)


def has_kernels(device: torch.device) -> bool:
    """Whether a device runs our kernels: a Hopper card, whose tensor memory accelerator and large shared memory their
    tiles need, and a Triton that can drive it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError as error:
        log.warning("the VAE runs without kernels of its own: %s. Install Triton 3.4 or newer for them.", error)
        return False
    return kernels_work(device)


def speed_up(vae: VideoVAE, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Give a VAE with weights a network that encodes and decodes the same, faster, and in parts if its `parts` say so.

    Args:
        device: where it will compute; the network stays where it is.
        dtype: bfloat16, or float32 for the same structure in full precision.
    """
    plain = vae.network
    low = dtype in (torch.bfloat16, torch.float16)
    suits = all(size % 8 == 0 for size in (plain.config.base_dim, plain.config.z_dim))
    kind = KernelStream if low and suits and has_kernels(device) else LibraryStream
    vae.network = FastNetwork(plain, kind, dtype)
    log.info("VAE in %s, %s", dtype, "with kernels of its own" if kind is KernelStream else "with PyTorch's")
