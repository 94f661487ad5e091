"""The video VAE, faster: channels last, several frames a step, nothing copied, and in parts of the picture if wanted.

`speed_up` gives a VAE another network with the same weights that encodes and decodes the same. What attends over the
whole picture runs at latent size for the whole picture, which is cheap; what works at higher sizes sees only a few
latent pixels around, so it may run in tiles that overlap by that much, and the result is the same.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...model.vae import VideoVAE
from ..kernels import kernels_work
from .packing import DOWN, FRAME, POINT, SPREAD, UP
from .streams import ALIGNED, Convolution, KernelStream, LibraryStream, Stream, fixed

log = logging.getLogger(__name__)

ENCODER_REACH, DECODER_REACH = 5, 7
"""Latent pixels around one that its features depend on, or that depend on it, in the part that may be tiled.

Encoder, pixels right of the 8 i that latent i begins at: 2 for the last halving and 4 for two residual blocks, twice
that plus 2 and 4, twice that plus 2, 4 and 1: 43, so 5 latents beyond i. Decoder, from full size: 1 + 6, halved and one
for each enlarging (4), plus 6, again (6), plus 6, again (7)."""
FRAMES_PER_LATENT = 4
ENCODER_STEP, DECODER_STEP, LATENT_STEP = 4, 2, 24
"""Frames of a step: of the video into the encoder, at latent size and double time into the part of the decoder that may
be tiled (each becomes two of the video), and of latent frames through what runs at latent size."""


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
        shown = x[:, :, : x.shape[2] - stream.gap]
        tokens = F.normalize(shown.float(), dim=-1) * (len(self.gamma) ** 0.5 * self.gamma)
        tokens = stream.mix(self.qkv, tokens.to(x.dtype).flatten(1, 2))  # T h*w 3C
        attended = [F.scaled_dot_product_attention(*frame[None, None].chunk(3, -1))[0, 0] for frame in tokens]
        added = stream.mix(self.out, torch.stack(attended)).unflatten(1, shown.shape[1:3])
        return x + F.pad(added, (0, 0, 0, stream.gap))


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
        self.kind, self.dtype, self.frames, self.level = kind, dtype, frames, 0
        self.made: list[tuple[tuple[int, int], Convolution]] = []

    def make(self, plain: nn.Module, norm: nn.Module | None = None, mode: int = FRAME) -> Convolution:
        layer = Convolution(plain, norm, self.kind, self.dtype, mode)
        layer.frames = self.frames
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


def steps(frames: int, step: int) -> Iterator[slice]:
    """The first frame of a video alone, then `step` at a time."""
    yield slice(0, 1)
    for start in range(1, frames, step):
        yield slice(start, min(start + step, frames))


def tiles(length: int, size: int | None, reach: int) -> list[tuple[slice, slice]]:
    """Cut latent pixels into parts of about equal length, at most `size`: each with what surrounds it, and alone."""
    count = -(-length // size) if size else 1
    edges = [length * i // count for i in range(count + 1)]
    return [(slice(max(0, a - reach), min(length, b + reach)), slice(a, b)) for a, b in pairwise(edges)]


class FastNetwork(nn.Module):
    """Encodes and decodes as the AutoencoderKLWan it is made of, and takes its place in a VideoVAE.

    Args:
        plain: with weights; they are copied.
        kind: how layers compute.
        dtype: of weights and of what travels between layers. Sums, norms and residual additions are float32 within a
            step; input, result and the layers that mix latent channels are float32.
        tile: latent pixels of a tile's side, or None to compute whole pictures.
    """

    def __init__(self, plain: nn.Module, kind: type[Stream], dtype: torch.dtype, tile: int | None = None):
        super().__init__()
        self.config, self.kind, self.compute_dtype, self.tile = plain.config, kind, dtype, tile
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

    def encode(self, video: Tensor):
        """B 3 T H W -> a posterior as diffusers gives it, over B C F h w in float32."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        with torch.cuda.device_of(video):  # kernels are launched on the current card
            means = torch.stack([self._encode(one) for one in video])
        return AutoencoderKLOutput(DiagonalGaussianDistribution(means))

    def decode(self, latents: Tensor):
        """B C F h w -> pixels as diffusers gives them, B 3 T H W in float32."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        made = None
        with torch.cuda.device_of(latents):
            for i, one in enumerate(latents):
                made = self._decode(one, made, i, len(latents))
        return DecoderOutput(made)

    def _tiles(self, height: int, width: int, reach: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        for rows in tiles(height, self.tile, reach):
            for columns in tiles(width, self.tile, reach):
                yield rows, columns

    def _encode(self, video: Tensor) -> Tensor:
        """3 T H W -> 2C F h w."""
        kind, (height, width) = self.kind, video.shape[2:]
        h, w = height // PIXELS, width // PIXELS
        frames = 1 + (video.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        features = None
        for rows, columns in self._tiles(h, w, ENCODER_REACH):
            stream = kind()
            part = video[:, :frames, in_pixels(rows[0], h, height), in_pixels(columns[0], w, width)]
            at = 0
            for step in steps(frames, ENCODER_STEP):
                x = self.encoder_local(kind.enter(part[:, step], self.compute_dtype), stream)
                if features is None:
                    count = 1 + (frames - 1) // FRAMES_PER_LATENT
                    features = x.new_zeros(count, h, w + kind.gap, x.shape[3])
                features[at : at + len(x), rows[1], columns[1]] = x[:, inside(*rows), inside(*columns)]
                at += len(x)
        stream = kind()
        whole = [kind.leave(self.encoder_whole(x, stream)) for x in features.split(LATENT_STEP)]
        return self._mix_latents(torch.cat(whole, 1), "quant_conv")

    def _decode(self, latents: Tensor, made: Tensor | None, index: int, count: int) -> Tensor:
        """C F h w -> B 3 T H W, of which it fills one video."""
        kind, (h, w) = self.kind, latents.shape[2:]
        frames = 1 + (latents.shape[1] - 1) * FRAMES_PER_LATENT
        stream = kind()
        x = kind.enter(self._mix_latents(latents, "post_quant_conv"), self.compute_dtype)
        features = torch.cat([self.decoder_whole(part, stream) for part in x.split(LATENT_STEP)])
        for rows, columns in self._tiles(h, w, DECODER_REACH):
            stream = kind()
            at = 0
            shown = tuple(slice(PIXELS * s.start, PIXELS * s.stop) for s in (inside(*rows), inside(*columns)))
            places = tuple(slice(PIXELS * s.start, PIXELS * s.stop) for s in (rows[1], columns[1]))
            for step in steps(len(features), DECODER_STEP):
                pixels = self.decoder_local(kind.crop(features[step], rows[0], columns[0]), stream)
                if made is None:
                    made = pixels.new_empty(count, len(pixels), frames, PIXELS * h, PIXELS * w)
                end = at + pixels.shape[1]
                made[index, :, at:end, places[0], places[1]] = pixels[:, :, shown[0], shown[1]]
                at = end
        return made

    def _mix_latents(self, x: Tensor, name: str) -> Tensor:
        """The convolution with one tap beside the latents, C F h w in float32."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return torch.einsum("nc,cfhw->nfhw", weight, x.float()) + bias.view(-1, 1, 1, 1)


PIXELS = 8
"""Of a latent pixel's side."""


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


def speed_up(vae: VideoVAE, device: torch.device, dtype: torch.dtype = torch.bfloat16, tile_px: int | None = None):
    """Give a VAE with weights a network that encodes and decodes the same, faster.

    Args:
        device: where it will compute; the network stays where it is.
        dtype: bfloat16, or float32 for the same structure in full precision.
        tile_px: side of the tiles that pictures are computed in, a multiple of 8; None for whole pictures.
    Raises:
        ConfigError: if `tile_px` is none of those.
    """
    if tile_px is not None and (tile_px < PIXELS or tile_px % PIXELS):
        raise ConfigError(f"tile_px={tile_px} is not a multiple of {PIXELS}. Use such as 256, or None for no tiles.")
    plain = vae.network
    low = dtype in (torch.bfloat16, torch.float16)
    suits = all(size % 8 == 0 for size in (plain.config.base_dim, plain.config.z_dim))
    kind = KernelStream if low and suits and has_kernels(device) else LibraryStream
    vae.network = FastNetwork(plain, kind, dtype, tile_px and tile_px // PIXELS)
    log.info("VAE in %s, %s", dtype, "with kernels of its own" if kind is KernelStream else "with PyTorch's")
