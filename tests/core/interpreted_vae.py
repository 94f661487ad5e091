"""The VAE's Triton kernels as Python on the CPU, in float32: the interpreter's products know no bfloat16. Run by
test_interpreted.py in a process in which TRITON_INTERPRET is set before Triton is imported."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wan_s2v_core.acceleration.vae.network import FastNetwork
from wan_s2v_core.acceleration.vae.packing import DOWN, FRAME, UP
from wan_s2v_core.acceleration.vae.streams import Convolution, KernelStream, LibraryStream
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.model.vae import VideoVAE


@pytest.fixture(autouse=True)
def no_gradients(fresh_seed):
    torch.manual_seed(fresh_seed)
    with torch.inference_mode():
        yield


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def made(layer, mode=FRAME):
    layer = Convolution(layer, None, KernelStream, torch.float32, mode)
    layer.frames = 3
    return layer


@pytest.mark.parametrize(("channels", "outputs"), [(24, 88), (40, 8)])
def test_convolutions(channels, outputs):
    """In one piece and in two; taps one by one, and three together."""
    plain, stream = nn.Conv3d(channels, outputs, 3), KernelStream()
    video, added = torch.randn(channels, 4, 5, 19), torch.randn(outputs, 4, 5, 19)
    layer, beside = made(plain), stream.enter(added, torch.float32)
    parts = (slice(0, 1), slice(1, 4))
    found = [stream.convolve(layer, stream.enter(video[:, part], torch.float32), beside[part]) for part in parts]
    found = torch.cat(found)
    assert found[:, :, 19].eq(0).all()
    close(stream.leave(found) - added, plain(F.pad(video[None], (1, 1, 1, 1, 2, 0)))[0])


@pytest.mark.parametrize(("height", "width"), [(6, 10), (7, 9)])
def test_pictures_grow_and_shrink(height, width):
    x = torch.randn(2, 24, height, width)
    plain, stream = nn.Conv2d(24, 16, 3, padding=1), KernelStream()
    entered = stream.enter(x.transpose(0, 1), torch.float32)
    found = stream.enlarge(made(plain, UP), entered)
    assert found[:, :, -1].eq(0).all()
    close(stream.leave(found).transpose(0, 1), plain(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    plain = nn.Conv2d(24, 16, 3, 2)
    found = stream.shrink(made(plain, DOWN), entered)
    assert found[:, :, -1].eq(0).all()
    close(stream.leave(found).transpose(0, 1), plain(F.pad(x, (0, 1, 0, 1))))


@pytest.mark.parametrize(("outputs", "way"), [(48, "double_time"), (24, "halve_time")])
def test_time_is_doubled_and_halved(outputs, way, fresh_seed):
    plain = nn.Conv3d(24, outputs, (3, 1, 1))
    results = []
    for kind in (KernelStream, LibraryStream):
        torch.manual_seed(fresh_seed)
        stream, layer = kind(), Convolution(plain, None, kind, torch.float32)
        parts = [stream.enter(torch.randn(24, frames, 3, 7), torch.float32) for frames in (2, 4)]
        stream.pasts[layer] = parts[0][: 2 if outputs == 48 else 1]
        results.append(torch.cat([stream.leave(getattr(stream, way)(layer, part)) for part in parts], 1))
    assert results[0].shape[1] == (12 if outputs == 48 else 3)
    close(*results)


def test_the_network(fresh_seed):
    vae = VideoVAE(width=8)
    fill_random(vae, fresh_seed)
    latents, video = torch.randn(1, 16, 1, 1, 2), torch.rand(1, 3, 1, 8, 17) * 2 - 1
    wanted = vae.encode(video), vae.decode(latents)
    vae.network = FastNetwork(vae.network, KernelStream, torch.float32)
    close(vae.encode(video), wanted[0])
    close(vae.decode(latents), wanted[1])
