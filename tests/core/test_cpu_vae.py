"""What makes the VAE fast on CPUs, 2D convolutions and lean norms: the same numbers for any layer and a whole VAE."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wan_s2v_core.acceleration.convolution import flatten_convolutions
from wan_s2v_core.acceleration.normalization import ChannelNorm, swap_channel_norms
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.model.vae import VideoVAE

ROUNDING = 1e-5
"""Sums of some thousand products of order one, in another order, relative to the largest."""


def is_flat(layer: nn.Module) -> bool:
    return "_conv_forward" in vars(layer)


def both_ways(layer: nn.Conv3d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    plain = copy.deepcopy(layer)
    flatten_convolutions(layer)
    with torch.inference_mode():
        return layer(x), plain(x)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.just(0), st.integers(0, 2), st.integers(0, 2)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_convolution_stays_the_same(kernel, stride, padding, channels, batch, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Conv3d(*channels, kernel, stride, padding, bias=bias)
    x = torch.randn(batch, channels[0], *(size + int(torch.randint(0, 5, ())) for size in kernel))
    flat, plain = both_ways(layer, x)
    assert is_flat(layer) and flat.shape == plain.shape
    torch.testing.assert_close(flat, plain, atol=ROUNDING * max(1.0, plain.abs().max().item()), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": (2, 1, 1)},
        {"dilation": (1, 2, 1)},
        {"groups": 2},
        {"padding": 1},
        {"padding": (1, 0, 0)},
        {"padding": "same"},
        {"padding": (0, 1, 1), "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_others_are_as_they_were(options, fresh_seed):
    torch.manual_seed(fresh_seed)
    layer = nn.Conv3d(4, 6, 3, **options)
    flat, plain = both_ways(layer, torch.randn(1, 4, 6, 7, 8))
    assert torch.equal(flat, plain) and not is_flat(layer)


def test_weights_given_later_are_used(fresh_seed):
    """Networks are prepared before they have weights."""
    torch.manual_seed(fresh_seed)
    layer = nn.Conv3d(3, 5, 3, padding=(0, 1, 1))
    flatten_convolutions(layer)
    weight, bias, x = torch.randn(5, 3, 3, 3, 3), torch.randn(5), torch.randn(1, 3, 5, 6, 7)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(layer(x), F.conv3d(x, weight, bias, padding=(0, 1, 1)), atol=1e-4, rtol=0)


def test_gradients_are_the_same(fresh_seed):
    torch.manual_seed(fresh_seed)
    layer, x = nn.Conv3d(3, 5, 3, padding=(0, 1, 1)), torch.randn(1, 3, 5, 6, 7)
    plain = copy.deepcopy(layer)
    flatten_convolutions(layer)
    for each in (layer, plain):
        each(x).square().sum().backward()
    scale = plain.weight.grad.abs().max()
    torch.testing.assert_close(layer.weight.grad / scale, plain.weight.grad / scale, atol=ROUNDING, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 20),
    images=st.booleans(),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_channel_norm_stays_the_same(channels, images, has_bias, dtype, seed):
    """Also where a position is zero in all channels, or tiny."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    torch.manual_seed(seed)
    plain = nn.Sequential(WanRMS_norm(channels, images=images, bias=has_bias))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    lean = copy.deepcopy(plain)
    swap_channel_norms(lean)
    assert isinstance(lean[0], ChannelNorm)
    x = torch.randn(2, channels, *((4, 5) if images else (3, 4, 5))).mul_(10.0 ** int(torch.randint(-4, 4, ())))
    x[:, :, 1] = 0
    x = x.to(dtype)
    with torch.inference_mode():
        wanted, given_ = plain.to(dtype)(x), lean.to(dtype)(x)
    scale = wanted.abs().max().item() + 1e-6
    limit = ROUNDING if dtype == torch.float32 else 2**-6  # rounded three times
    torch.testing.assert_close(given_, wanted, atol=limit * scale, rtol=0)


@pytest.mark.parametrize("frames", [1, 21])
def test_a_whole_vae_stays_the_same(frames, fresh_seed):
    """Encoded and decoded within 1e-4 of values of order one, after some 60 layers."""
    torch.manual_seed(fresh_seed)
    plain = VideoVAE(width=8)
    fill_random(plain, fresh_seed)
    flat = copy.deepcopy(plain)
    flatten_convolutions(flat)
    swap_channel_norms(flat)
    convolutions = [layer for layer in flat.modules() if isinstance(layer, nn.Conv3d)]
    assert len(convolutions) > 40 and all(map(is_flat, convolutions)), "all of them pad in time by hand"
    assert sum(isinstance(layer, ChannelNorm) for layer in flat.modules()) > 20
    assert flat.state_dict().keys() == plain.state_dict().keys(), "the names of the weights stay"
    video = torch.rand(1, 3, frames, 48, 64) * 2 - 1
    with torch.inference_mode():
        latents, other = (vae.encode(video) for vae in (plain, flat))
        torch.testing.assert_close(other, latents, atol=1e-4, rtol=0)
        shown, other_shown = (vae.decode(latents) for vae in (plain, flat))
    assert latents.shape[2] == (frames + 3) // 4 and shown.shape[2] == frames
    torch.testing.assert_close(other_shown, shown, atol=1e-4, rtol=0)
    assert latents.std() > 0.05 and shown.std() > 0.01, "no constant picture"
