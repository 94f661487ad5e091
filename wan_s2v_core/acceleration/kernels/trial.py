"""Whether our kernels run here."""

import logging
from importlib.util import find_spec

import torch

from ..trials import tried_once

log = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Compute capability of the oldest cards that Triton's kernels are compiled for here (Ampere)."""


def are_expected(device: torch.device) -> bool:
    """Whether a device is one that our kernels are for, and Triton is there."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    return find_spec("triton") is not None


@tried_once(are_expected)
def kernels_work(device: torch.device) -> bool:
    """Whether our kernels run on a device. On a card this is tried once, since Triton may be there without working:
    it needs a C compiler and Python's headers."""
    if not are_expected(device):
        return False
    try:
        from .rows8 import quantize

        x = torch.eye(2, 32, device=device)
        if torch.equal(quantize(x, torch.int8).values.float(), 127 * x):
            return True
        log.warning("Triton computes wrongly on %s: steps between products run one by one", device)
    except Exception as error:  # a missing compiler shows as CalledProcessError, RuntimeError or OSError
        log.warning("Triton does not work on %s (%s): steps between products run one by one", device, error)
    return False
