"""wav2vec 2.0 over a long recording, window after window: the room it takes on a device does not grow with the length.

What it hears is that of the whole recording: convolutions are computed with all that they reach, and the attention of
a window, which reaches everywhere, has the keys of the whole recording too. Those outside the window and its context
are all there up to `most_keys` frames, so that windows change nothing but rounding: relative error 6e-8 on the embedded
encoder, 5e-7 on six random layers of real width. Of a longer recording it has every k-th of them, weighted as k: 7e-4
on the embedded encoder with 5,000 of them, 7e-2 if windows heard nothing but their context; see benchmarks/README.md.
Random weights that make each frame attend to a few arbitrary others are the worst case, of which no sample is good
(0.17 to 0.26).
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .audio_encoder import SPEECH_FEATURE_HZ, SpeechEncoder, normalize_waveform


@dataclass(frozen=True)
class Windows:
    """How a recording is cut for hearing, in feature frames."""

    window: int = 60 * SPEECH_FEATURE_HZ
    """The most that is heard at once. A recording that is no longer is heard whole, as the reference hears all."""
    context: int = 10 * SPEECH_FEATURE_HZ
    """What a window attends to on either side, every frame of it."""
    most_keys: int = 600 * SPEECH_FEATURE_HZ
    """Of the whole recording, so many frames at most are attended to besides."""

    def cut(self, frames: int) -> list[tuple[int, int]]:
        """First and end of each window, all about as long."""
        count = -(-frames // self.window)
        edges = [number * frames // count for number in range(count + 1)]
        return list(itertools.pairwise(edges))


WINDOWS = Windows()


def hear_in_windows(
    encoder: SpeechEncoder, waveform: Tensor, states: Tensor, windows: Windows
) -> Iterator[tuple[int, int, Tensor]]:
    """The hidden states of one recording, layer after layer and in each window after window.

    Args:
        waveform: samples at 16 kHz, mono, any scale.
        states: T E float32 in main memory, what one layer gave: room to work in.
    Yields:
        Layer, first frame and the hidden states T E of a window in float32, on the encoder's device.
    """
    samples, inner = normalize_waveform(waveform), encoder.network.encoder
    stretches = windows.cut(len(states))
    with norm_of_the_whole(encoder, samples, encoder.samples_of(windows.window)):
        for first, end in stretches:
            embedded = embed(encoder, samples, first, end)
            states[first:end] = embedded
            yield 0, first, embedded.float()
    is_normed_last = encoder.network.config.do_stable_layer_norm
    for number, layer in enumerate(inner.layers, 1):
        is_last = number == len(inner.layers)
        for first, heard in attend_in_windows(encoder, layer, states, stretches, windows):
            states[first : first + len(heard)] = heard
            yield number, first, (inner.layer_norm(heard) if is_last and is_normed_last else heard).float()


def embed(encoder: SpeechEncoder, samples: Tensor, first: int, end: int) -> Tensor:
    """What the first layer reads, T E, of the frames from `first` to before `end`: the same as within the whole."""
    network, stride = encoder.network, math.prod(stride for _, stride in encoder.steps)
    reach = network.config.num_conv_pos_embeddings // 2
    start, frames = max(0, first - reach), encoder.frames_of(len(samples))
    stop = min(frames, end + reach)
    heard = samples[start * stride :][: encoder.samples_of(stop - start)]
    hidden, _ = network.feature_projection(network.feature_extractor(encoder.at_work(heard[None])).transpose(1, 2))
    hidden = (hidden + network.encoder.pos_conv_embed(hidden))[0, first - start : end - start]
    return hidden if network.config.do_stable_layer_norm else network.encoder.layer_norm(hidden)


def attend_in_windows(
    encoder: SpeechEncoder, layer: nn.Module, states: Tensor, stretches: list[tuple[int, int]], windows: Windows
) -> Iterator[tuple[int, Tensor]]:
    """One layer of all frames: first frame and T E of each window. `states` may be overwritten with what is given."""
    before = layer.layer_norm if encoder.network.config.do_stable_layer_norm else nn.Identity()
    spacing = -(-len(states) // windows.most_keys)
    places = torch.arange(0, len(states), spacing)
    sample = before(encoder.at_work(states[::spacing].clone()))  # `states` itself will not stay as it is
    past = states[:0]  # frames before the window as they were before this layer
    for first, end in stretches:
        own, after = (encoder.at_work(part) for part in (states[first:end], states[end : end + windows.context]))
        near = before(torch.cat([encoder.at_work(past), after]))
        is_far = (places < first - len(past)) | (places >= end + len(after))
        past = torch.cat([past, states[first:end]])[-windows.context :] if windows.context else past
        with other_keys(layer.attention, near, sample[is_far.to(sample.device)], spacing):
            heard = layer(own[None])
        yield first, (heard if isinstance(heard, Tensor) else heard[0])[0]  # a tuple before transformers 5


@contextmanager
def other_keys(attention: nn.Module, near: Tensor, far: Tensor, spacing: int) -> Iterator[None]:
    """Let an attention see more than the frames that it answers for.

    Args:
        near, far: T E, more frames; each of `far` stands for `spacing` of them.
    """

    def add(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = arguments[0]
        keys = torch.cat([own, near[None], far[None]], dim=1)
        mask = None
        if spacing > 1:
            weights = torch.zeros(keys.shape[1], dtype=own.dtype, device=own.device)
            weights[keys.shape[1] - len(far) :] = math.log(spacing)
            mask = weights.expand(1, 1, own.shape[1], -1)
        return arguments, {**named, "key_value_states": keys, "attention_mask": mask}

    hook = attention.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def norm_of_the_whole(encoder: SpeechEncoder, samples: Tensor, at_once: int) -> Iterator[None]:
    """Let windows be normed as the whole is, in models whose first convolution is normed over time."""
    norm = getattr(encoder.network.feature_extractor.conv_layers[0], "layer_norm", None)
    if not isinstance(norm, nn.GroupNorm):
        yield
        return
    mean, variance = (value.to(norm.weight.device)[:, None] for value in moments(encoder, samples, at_once))

    def as_in_the_whole(_: nn.Module, arguments: tuple[Tensor], __: Tensor) -> Tensor:
        normed = (arguments[0].float() - mean) * torch.rsqrt(variance + norm.eps)
        return (normed * norm.weight[:, None] + norm.bias[:, None]).to(arguments[0].dtype)

    hook = norm.register_forward_hook(as_in_the_whole)
    try:
        yield
    finally:
        hook.remove()


def moments(encoder: SpeechEncoder, samples: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over time of each channel of the first convolution, from pieces of `at_once` samples."""
    convolution, (kernel, stride) = encoder.network.feature_extractor.conv_layers[0].conv, encoder.steps[0]
    piece, count, total, squares = at_once // stride * stride, 0, 0.0, 0.0
    for start in range(0, len(samples) - kernel + 1, piece):
        values = convolution(encoder.at_work(samples[start : start + piece + kernel - stride][None, None]))[0].float()
        mean, variance = values.mean(1).cpu().double(), values.var(1, unbiased=False).cpu().double()
        count += values.shape[1]
        total, squares = total + values.shape[1] * mean, squares + values.shape[1] * (variance + mean.square())
    mean = total / count
    return mean.float(), (squares / count - mean.square()).float()
