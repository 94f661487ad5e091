"""How much room the video VAE needs, from the sizes of what it holds at each layer.

A walk through the layers in their order, with sizes in place of tensors: what a layer of `acceleration.vae` allocates,
it holds here for as long. The largest sum is the peak.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT, latent_frames_of
from ..model.vae_parts import (
    DECODER_REACH,
    DECODER_STEP,
    ENCODER_REACH,
    ENCODER_STEP,
    VaeParts,
    latent_steps,
    steps,
    tiles,
)

PAST = 2
"""Frames that a causal convolution looks back."""
FLOAT = 4
ALIGNED = 8
"""Channels of the input come in multiples of this for the kernels."""
MULTIPLES = (1, 2, 4, 4)
"""Channels of each level, in widths of the VAE, from full size to latent size."""


@dataclass(frozen=True)
class VaeWay:
    """How a VAE computes: with kernels of our own or the library's convolutions, and bytes of a value.

    `copies` is for libraries that give the results of a convolution in time in another layout, which are then copied:
    PyTorch's on CPUs; cuDNN's does not.
    """

    itemsize: int = 2
    has_kernels: bool = True
    copies: bool = False
    width: int = 96

    def margin(self, room_bytes: int) -> int:
        """What a card needs on top: workspaces of cuDNN, and gaps between tensors of different sizes."""
        share, least = KERNEL_MARGIN if self.has_kernels else LIBRARY_MARGIN
        return round(share * room_bytes) + least


KERNEL_MARGIN = (0.2, 64 << 20)
"""Share of the predicted peak, and bytes. Our kernels need no workspace; attention's float32 sums are in here. Tiles of
3840x2160, of several sizes, leave up to a quarter between tensors, see `tests/core/test_gaps.py`."""
LIBRARY_MARGIN = (0.25, 256 << 20)
"""cuDNN takes the fastest way whose workspace it gets, and a slower one with less if there is none."""
KERNELS = VaeWay()
LIBRARY_16 = VaeWay(2, has_kernels=False)
LIBRARY_32 = VaeWay(4, has_kernels=False)
PLAIN = None
"""diffusers' own network, whose peak is measured."""


@dataclass(frozen=True)
class VaeWork:
    """A video to be encoded or decoded, and how.

    Args:
        height_px, width_px: of the picture. frames: of the video, all that are decoded.
        decodes: or encodes.
        keep_frames: of the decoded ones, those that are stored; None for all.
    """

    height_px: int
    width_px: int
    frames: int
    decodes: bool
    keep_frames: int | None = None
    way: VaeWay = KERNELS
    parts: VaeParts = VaeParts()  # noqa: RUF009  (frozen)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        frames = latent_frames_of(self.frames if self.decodes else self.used_frames)
        return frames, self.height_px // PIXELS_PER_LATENT, self.width_px // PIXELS_PER_LATENT

    @property
    def used_frames(self) -> int:
        """Frames that the encoder sees."""
        return 1 + (self.frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT

    @property
    def kept(self) -> int:
        return min(self.frames, self.frames if self.keep_frames is None else self.keep_frames)


@dataclass(frozen=True)
class Layer:
    """kind: first (a causal convolution without norm), block, attention, enlarge, shrink, double, halve, last (a causal
    convolution after a norm), or show (the same, to pixels)."""

    kind: str
    inputs: int
    outputs: int


def encoder_layers(width: int, latent_channels: int) -> tuple[list[Layer], list[Layer]]:
    """From full to latent size, and at latent size."""
    sizes = [width * multiple for multiple in MULTIPLES]
    local, at = [Layer("first", 3, width)], width
    for level, size in enumerate(sizes[:-1]):
        local += [Layer("block", at, size), Layer("block", size, size), Layer("shrink", size, size)]
        local += [Layer("halve", size, size)] if level else []
        at = size
    end = sizes[-1]
    block = Layer("block", end, end)
    middle = [Layer("block", at, end), block, block, Layer("attention", end, end), block]
    return local, [*middle, Layer("last", end, 2 * latent_channels)]


def decoder_layers(width: int, latent_channels: int) -> tuple[list[Layer], list[Layer]]:
    """At latent size, and from latent to full size."""
    sizes = [width * multiple for multiple in reversed(MULTIPLES)]
    end = sizes[0]
    block = Layer("block", end, end)
    whole = [Layer("first", latent_channels, end), block, Layer("attention", end, end), *[block] * 4]
    whole.append(Layer("double", end, end))
    local, at = [Layer("enlarge", end, end // 2)], end // 2
    for level, size in enumerate(sizes[1:], 1):
        local += [Layer("block", at, size), *[Layer("block", size, size)] * 2]
        if level < len(sizes) - 1:
            local += [Layer("double", size, size)] if level == 1 else []
            local.append(Layer("enlarge", size, size // 2))
            at = size // 2
    return whole, [*local, Layer("show", sizes[-1], 3)]


@dataclass
class Ledger:
    """Bytes that are held now, and the most that were."""

    now: int = 0
    peak: int = 0

    def hold(self, size: int) -> int:
        self.now += size
        self.peak = max(self.peak, self.now)
        return size

    def drop(self, size: int) -> None:
        self.now -= size


@dataclass
class Walk:
    """One stream through the layers of a stage.

    Args:
        layers, way: what it passes through, and how.
        step: frames of the longest step.
    """

    layers: list[Layer]
    way: VaeWay
    step: int
    ledger: Ledger
    pasts: dict[tuple, int] = field(default_factory=dict)
    pools: dict[tuple, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    ends: bool = False

    def frame(self, height: int, width: int, channels: int) -> int:
        """Values of a frame."""
        return height * (width + self.way.has_kernels) * channels

    def leave(self) -> None:
        """The stream is done: what it remembers is freed."""
        self.ledger.drop(sum(self.pasts.values()) + sum(self.pools.values()))
        self.pasts.clear(), self.pools.clear()

    def sharers(self) -> dict[tuple, tuple[int, int]]:
        """For each size of frame that causal convolutions see: how many of them, and the frames they get at once."""
        found: dict[tuple, tuple[int, int]] = {}
        level, frames = 0, self.step
        for layer in self.layers:
            if layer.kind in ("enlarge", "shrink"):
                level += 1
            frames = 2 * frames if layer.kind == "double" else max(1, frames // 2) if layer.kind == "halve" else frames
            seen = [layer.inputs, layer.outputs] if layer.kind == "block" else [layer.inputs]
            for channels in seen if layer.kind in ("block", "first", "last", "show") else []:
                key = (level, -(-channels // ALIGNED))
                count, most = found.get(key, (0, 0))
                found[key] = count + 1, most or frames
        return found

    def run(self, frames: int, height: int, width: int, ends: bool) -> int:
        """One step. Keeps what is remembered and the result, whose bytes it gives; the input is its caller's."""
        self.ends, held, level = ends, 0, 0
        self.counts = self.sharers()
        for number, layer in enumerate(self.layers):
            level += layer.kind in ("enlarge", "shrink")
            result = getattr(self, f"_{layer.kind}")((number, level), layer, frames, height, width)
            height, width = (_sized(layer.kind, side) for side in (height, width))
            if layer.kind in ("double", "halve"):
                frames = self._frames_after(layer.kind, number, frames)
            if result is not None:
                self.ledger.drop(held)
                held = result
        return held

    def _frames_after(self, kind: str, number: int, frames: int) -> int:
        first = number not in self.begun
        self.begun.add(number)
        rest = frames - first
        return first + (2 * rest if kind == "double" else rest // 2)

    def _seen(self, key: tuple, past: int, frames: int, frame: int, on_the_way: int = 0) -> int:
        """Frames with those before them, of `frame` values each; the last of them are remembered."""
        ledger, item = self.ledger, self.way.itemsize
        seen = ledger.hold((past + frames) * frame * item)
        ledger.drop(self.pasts.pop(key, 0))
        ledger.drop(ledger.hold(on_the_way))
        if not self.ends:
            self.pasts[key] = ledger.hold(past * frame * item)
        return seen

    def _causal(self, key: tuple, frames: int, height: int, width: int, inputs: int, out: int, has_norm: bool) -> int:
        """A causal convolution; bytes of its result, of which there may be none."""
        ledger, way = self.ledger, self.way
        if way.has_kernels:
            self._pool(key[1], height, width, inputs)
            return ledger.hold(out)
        frame = self.frame(height, width, inputs)
        seen = self._seen(key, PAST, frames, frame, 2 * FLOAT * frame if has_norm else 0)
        ledger.drop(ledger.hold(out * (1 + way.copies)))
        ledger.hold(out)
        ledger.drop(seen)
        return out

    def _pool(self, level: int, height: int, width: int, channels: int) -> None:
        size = (height, width, channels)
        if size not in self.pools:
            count, frames = self.counts[level, -(-channels // ALIGNED)]
            remembered = 0 if self.ends else PAST * count
            self.pools[size] = self.ledger.hold((1 + remembered + frames) * self.frame(*size) * self.way.itemsize)

    def _first(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        inputs = -(-layer.inputs // ALIGNED) * ALIGNED if self.way.has_kernels else layer.inputs
        out = frames * self.frame(height, width, layer.outputs) * self.way.itemsize
        return self._causal(key, frames, height, width, inputs, out, False)

    def _last(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        out = frames * self.frame(height, width, layer.outputs) * self.way.itemsize
        return self._causal(key, frames, height, width, layer.inputs, out, True)

    def _block(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        out = frames * self.frame(height, width, layer.outputs) * self.way.itemsize
        beside = self.ledger.hold(out) if layer.inputs != layer.outputs else 0
        middle = self._causal((*key, 0), frames, height, width, layer.inputs, out, True)
        if self.way.has_kernels:  # the second convolution writes over what is beside it
            self._causal((*key, 1), frames, height, width, layer.outputs, 0, True)
            result = beside or out
            self.ledger.drop(middle)
            if not beside:  # that is the input, which its holder drops
                self.ledger.hold(out)
            return result
        result = self._causal((*key, 1), frames, height, width, layer.outputs, out, True)
        self.ledger.drop(beside + middle)
        return result

    def _attention(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        ledger, item = self.ledger, self.way.itemsize
        frame = self.frame(height, width, layer.inputs)
        out = ledger.hold(frames * frame * item)
        values = height * width * layer.inputs
        ledger.drop(ledger.hold(max(2 * FLOAT, item * (3 + 1 + 1)) * values))
        return out

    def _enlarge(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        ledger, item = self.ledger, self.way.itemsize
        one = self.frame(2 * height, 2 * width, layer.outputs) * item
        if not self.way.has_kernels:
            larger = self.frame(2 * height, 2 * width, layer.inputs) * item
            out = ledger.hold(frames * one)
            ledger.drop(ledger.hold(larger + one))
            return out
        return ledger.hold(frames * one)

    def _shrink(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        ledger, item = self.ledger, self.way.itemsize
        one = self.frame(height // 2, width // 2, layer.outputs) * item
        if not self.way.has_kernels:
            padded = self.frame(height + 1, width + 1, layer.inputs) * item
            out = ledger.hold(frames * one)
            ledger.drop(ledger.hold(padded + one))
            return out
        return ledger.hold(frames * one)

    def _show(self, key, layer: Layer, frames: int, height: int, width: int) -> int:
        values = frames * self.frame(height, width, layer.outputs)
        if self.way.has_kernels:  # taps as channels, which are then gathered
            spread = self._causal(key, frames, height, width, layer.inputs, 9 * FLOAT * values, True)
        else:
            spread = self._causal(key, frames, height, width, layer.inputs, self.way.itemsize * values, True)
            if self.way.itemsize == FLOAT:
                return spread
        out = self.ledger.hold(FLOAT * values)
        self.ledger.drop(spread)
        return out

    def _double(self, key, layer: Layer, frames: int, height: int, width: int) -> int | None:
        """None where the first frame passes through."""
        first, ledger = key[0] not in self.begun, self.ledger
        if first and frames == 1:
            return None
        rest, frame = frames - first, self.frame(height, width, layer.inputs)
        out = self._timed(key, rest, 2 * rest, frame, PAST)
        if not self.way.has_kernels:  # put into another order
            ledger.drop(ledger.hold(out))
        if first:  # and joined to the first
            joined = ledger.hold((1 + 2 * rest) * frame * self.way.itemsize)
            ledger.drop(out)
            return joined
        return out

    def _halve(self, key, layer: Layer, frames: int, height: int, width: int) -> int | None:
        """None where the first frame passes through, and is remembered."""
        frame = self.frame(height, width, layer.inputs)
        if key[0] not in self.begun:
            self.pasts[key] = self.ledger.hold(frame * self.way.itemsize)
            return None
        return self._timed(key, frames, frames // 2, frame, 1)

    def _timed(self, key: tuple, frames: int, made: int, frame: int, past: int) -> int:
        """A convolution along time alone."""
        ledger, item = self.ledger, self.way.itemsize
        seen = self._seen(key, past, frames, frame)
        out = ledger.hold(made * frame * item)
        if self.way.copies and not self.way.has_kernels:
            ledger.drop(ledger.hold(out))
        ledger.drop(seen)
        return out


def _sized(kind: str, side: int) -> int:
    return {"enlarge": 2 * side, "shrink": side // 2}.get(kind, side)


def peak_bytes(work: VaeWork) -> int:
    """Peak bytes on the device besides weights and besides what the caller gives: a video, or latents."""
    ledger = Ledger()
    (_decode if work.decodes else _encode)(work, ledger)
    return ledger.peak


def _largest(length: int, work: VaeWork, reach: int) -> int:
    """Latent pixels of the longest tile along a side, with what surrounds it."""
    return max(around.stop - around.start for around, _ in tiles(length, work.parts.tile, reach))


def _distinct(spans: list[slice]) -> Iterator[tuple[int, bool]]:
    """Frames of steps whose peaks can differ, and whether they are the last: all behind the third are like it."""
    for number, span in enumerate(spans):
        ends = number == len(spans) - 1
        if number < 3 or ends:
            yield span.stop - span.start, ends


def _decode(work: VaeWork, ledger: Ledger) -> None:
    way, (frames, h, w) = work.way, work.latent_size
    whole, local = decoder_layers(way.width, LATENT_CHANNELS)
    latent = FLOAT * LATENT_CHANNELS * h * w
    ledger.drop(ledger.hold(2 * frames * latent))
    ledger.hold(frames * latent)
    if not work.parts.is_apart:
        ledger.hold(work.kept * 3 * FLOAT * h * w * PIXELS_PER_LATENT**2)
    gap = way.has_kernels
    feature = h * (w + gap) * whole[-1].outputs * way.itemsize
    walk = Walk(whole, way, latent_steps(frames, h, w)[0].stop, ledger)
    is_first = True
    for count, ends in _distinct(latent_steps(frames, h, w)):
        entered = count * h * (w + gap) * LATENT_CHANNELS * way.itemsize
        ledger.drop(ledger.hold(3 * count * latent))
        ledger.hold(entered)
        result = walk.run(count, h, w, ends)
        if is_first and not work.parts.is_apart:
            ledger.hold((2 * frames - 1) * feature)
        is_first = False
        ledger.drop(result + entered)
    walk.leave()
    tall, wide = (_largest(side, work, DECODER_REACH) for side in (h, w))
    is_whole = (tall, wide) == (h, w) and not work.parts.is_apart
    walk = Walk(local, way, min(2 * frames - 1, DECODER_STEP), ledger)
    for count, ends in _distinct(list(steps(2 * frames - 1, DECODER_STEP))):
        given = 0 if is_whole else ledger.hold(count * tall * (wide + gap) * local[0].inputs * way.itemsize)
        result = walk.run(count, tall, wide, ends)
        if work.parts.is_apart:  # what is shown of it, on its way
            ledger.drop(ledger.hold(result))
        ledger.drop(result + given)
    walk.leave()


def _encode(work: VaeWork, ledger: Ledger) -> None:
    way, (frames, h, w) = work.way, work.latent_size
    local, whole = encoder_layers(way.width, LATENT_CHANNELS)
    gap = way.has_kernels
    feature = h * (w + gap) * local[-1].outputs * way.itemsize
    rest = [side - PIXELS_PER_LATENT * latent for side, latent in ((work.height_px, h), (work.width_px, w))]
    tall, wide = (_largest(side, work, ENCODER_REACH) * PIXELS_PER_LATENT for side in (h, w))
    tall, wide = tall + rest[0], wide + rest[1]
    walk = Walk(local, way, min(work.used_frames, ENCODER_STEP), ledger)
    is_first = True
    for count, ends in _distinct(list(steps(work.used_frames, ENCODER_STEP))):
        brought = ledger.hold(count * tall * wide * 3 * FLOAT if work.parts.is_apart else 0)
        channels = ALIGNED if gap else 3
        entered = ledger.hold(count * tall * (wide + gap) * channels * way.itemsize)
        ledger.drop(ledger.hold(count * tall * wide * 3 * way.itemsize if way.itemsize != FLOAT else 0))
        result = walk.run(count, tall, wide, ends)
        if is_first and not work.parts.is_apart:
            ledger.hold(frames * feature)
        is_first = False
        ledger.drop(result + brought + entered)
    walk.leave()
    mixed = 2 * LATENT_CHANNELS * h * w * FLOAT
    walk = Walk(whole, way, latent_steps(frames, h, w)[0].stop, ledger)
    for count, ends in _distinct(latent_steps(frames, h, w)):
        given = ledger.hold(count * feature if work.parts.is_apart else 0)
        result = walk.run(count, h, w, ends)
        ledger.drop(ledger.hold(3 * count * mixed))
        ledger.drop(result + given)
        ledger.hold(count * mixed)
    walk.leave()
    ledger.hold(2 * frames * mixed)


SMALLEST_TILE = 8
"""Latent pixels of a tile's side below which nearly all work is overlap."""


def tile_sizes(height: int, width: int) -> list[int | None]:
    """Sides in latent pixels that cut a picture differently, the largest first; None for the whole."""
    sides = {-(-side // count) for side in (height, width) for count in range(1, side // SMALLEST_TILE + 1)}
    return [None, *sorted((side for side in sides if SMALLEST_TILE <= side < max(height, width)), reverse=True)]
