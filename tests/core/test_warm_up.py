"""What is made ready beside a first run."""

from functools import partial

import pytest
import torch

from wan_s2v_core import warm_up
from wan_s2v_core.model.checkpoint import DIT, VAE
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.warm_up import SmallFilm, WarmUp, kernels_of_dit, kernels_of_vae

CPU = torch.device("cpu")


def test_who_needs_a_step_waits_for_it():
    order = []

    def fails() -> None:
        order.append("fails")
        raise ImportError("not there")

    warm = WarmUp({"first": lambda: order.append("first"), "second": fails, "third": lambda: order.append("third")})
    for name in ("third", "second", "unknown"):
        warm.wait(name)
    assert order == ["first", "fails", "third"]
    again = WarmUp({"third": lambda: order.append("fourth")}, after=warm)
    again.wait("third")
    assert order[2:] == ["third", "fourth"]


@pytest.fixture
def films(monkeypatch):
    """Films through a small VAE on the CPU, as if it had kernels -> shapes of what was encoded and decoded."""
    seen = []

    class SmallVAE(VideoVAE):
        def encode(self, video):
            seen.append(tuple(video.shape))
            return super().encode(video)

        def decode(self, latents, keep_frames=None):
            seen.append(tuple(latents.shape))
            return super().decode(latents, keep_frames)

    monkeypatch.setattr(warm_up, "VideoVAE", partial(SmallVAE, width=8))
    monkeypatch.setattr(warm_up, "has_kernels", lambda device: True)
    return seen


@pytest.mark.parametrize("free, share, runs", [(20e9, 1.0, True), (10e9, 1.0, False), (20e9, 0.5, False)])
def test_a_small_film_compiles_the_kernels_of_the_vae_where_there_is_room(films, free, share, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 24e9))
    monkeypatch.setattr(warm_up, "process_share", lambda device: share)
    encode, decode = kernels_of_vae(CPU).values()
    encode()
    assert films == ([(1, 3, 9, 64, 64)] if runs else [])
    decode()
    assert films[1:] == ([(1, 16, 3, 8, 8)] if runs else [])


def test_nothing_is_compiled_where_there_are_no_kernels():
    """On a CPU: neither asks the GPU anything."""
    film = SmallFilm(CPU)
    film.encode()
    film.decode()
    assert film.vae is None
    assert list(kernels_of_dit(CPU)) == [DIT] and next(iter(kernels_of_vae(CPU))) == VAE
    kernels_of_dit(CPU)[DIT]()
