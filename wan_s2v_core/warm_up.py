"""What the first run of a process needs besides weights, made ready beside it: libraries that are slow to import, and
kernels, which are compiled and tried once."""

import logging
import threading
from collections.abc import Callable, Mapping
from importlib import import_module

import torch

from .acceleration.attention.registry import AUTO, Setting, choose
from .acceleration.kernels.trial import kernels_work
from .config import S2VModelConfig
from .model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE

log = logging.getLogger(__name__)

Steps = Mapping[str, Callable[[], object]]


class WarmUp:
    """Does steps one after the other in a thread of its own.

    Two threads that import parts of one library at once can each meet half of it: `wait` before using what a step
    makes ready.
    """

    def __init__(self, steps: Steps):
        self.steps = dict(steps)
        self.ended = {name: threading.Event() for name in self.steps}
        threading.Thread(target=self._run, name="wan_s2v_warm_up", daemon=True).start()

    def wait(self, name: str) -> None:
        """Until a step has ended, whatever came of it: who needs it meets its error again."""
        if name in self.ended:
            self.ended[name].wait()

    def _run(self) -> None:
        for name, step in self.steps.items():
            try:
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


def kernels(device: torch.device) -> Steps:
    """What the DiT computes with."""
    return {DIT: lambda: try_kernels(device)}


def try_kernels(device: torch.device) -> None:
    if device.type == "cuda" and kernels_work(device):
        choose(AUTO, Setting(device, torch.bfloat16, S2VModelConfig().head_width))
