"""What the first run of a process needs besides weights, made ready beside it: libraries that are slow to import, and
kernels, which are compiled and tried once."""

import logging
import threading
from collections.abc import Callable, Mapping
from importlib import import_module

import torch

from .acceleration.attention.registry import AUTO, Setting, choose
from .acceleration.kernels.trial import kernels_work
from .acceleration.vae.network import has_kernels, speed_up
from .config import S2VModelConfig
from .geometry import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT
from .memory.networks import process_share
from .model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .model.vae import VideoVAE

log = logging.getLogger(__name__)

Steps = Mapping[str, Callable[[], object]]


class WarmUp:
    """Does steps one after the other in a thread of its own.

    Two threads that import parts of one library at once can each meet half of it: `wait` before using what a step
    makes ready.

    Args:
        after: another one, whose step of the same name a step waits for.
    """

    def __init__(self, steps: Steps, after: "WarmUp | None" = None):
        self.steps, self.after = dict(steps), after
        self.ended = {name: threading.Event() for name in self.steps}
        threading.Thread(target=self._run, name="wan_s2v_warm_up", daemon=True).start()

    def wait(self, name: str) -> None:
        """Until a step has ended, whatever came of it: who needs it meets its error again."""
        if name in self.ended:
            self.ended[name].wait()

    def _run(self) -> None:
        for name, step in self.steps.items():
            try:
                if self.after:
                    self.after.wait(name)
                step()
            except Exception as error:
                log.debug("%s cannot be made ready: %s", name, error)
            finally:
                self.ended[name].set()


LIBRARIES: Steps = {
    TEXT_ENCODER: lambda: import_module("transformers.models.umt5.modeling_umt5"),
    SPEECH_ENCODER: lambda: import_module("transformers.models.wav2vec2.modeling_wav2vec2"),
    VAE: lambda: import_module("diffusers.models.autoencoders.autoencoder_kl_wan"),
}
"""What each kind of network is built with, in the order in which a run uses them."""


def kernels_of_dit(device: torch.device) -> Steps:
    """What the DiT computes with."""
    return {DIT: lambda: try_kernels(device)}


def kernels_of_vae(device: torch.device) -> Steps:
    """What the VAE computes with. Nobody waits for the decoder: it is used when a clip has been sampled."""
    film = SmallFilm(device)
    return {VAE: film.encode, "the VAE's decoder": film.decode}


class SmallFilm:
    """A film of few pixels through a VAE of the released size, whose weights are whatever lies in memory.

    It compiles the kernels that any size needs; only where the VAE has such kernels, and VRAM to spare: this takes
    0.8 GB for a while.
    """

    FRAMES, SIDE_PX, ROOM_BYTES = 9, 64, 16e9

    def __init__(self, device: torch.device):
        self.device = device
        self.vae: VideoVAE | None = None

    @torch.inference_mode()
    def encode(self) -> None:
        if not has_kernels(self.device) or not self._has_room():
            return
        with torch.device("meta"):
            vae = VideoVAE()
        vae.to_empty(device=self.device)
        speed_up(vae, self.device)
        vae.encode(torch.zeros(1, 3, self.FRAMES, self.SIDE_PX, self.SIDE_PX, device=self.device))
        self.vae = vae

    def _has_room(self) -> bool:
        free = torch.cuda.mem_get_info(self.device)[0]
        return free >= self.ROOM_BYTES and process_share(self.device) == 1

    @torch.inference_mode()
    def decode(self) -> None:
        vae, self.vae = self.vae, None
        if vae:
            latents = (1 + (self.FRAMES - 1) // FRAMES_PER_LATENT, *2 * (self.SIDE_PX // PIXELS_PER_LATENT,))
            vae.decode(torch.zeros(1, LATENT_CHANNELS, *latents, device=self.device))


def try_kernels(device: torch.device) -> None:
    if device.type == "cuda" and kernels_work(device):
        choose(AUTO, Setting(device, torch.bfloat16, S2VModelConfig().head_width))
