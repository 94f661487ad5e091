"""Triton kernels for the steps between products. The modules in here import Triton; this one does only when asked."""

import logging
from functools import lru_cache

import torch

log = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Compute capability of the oldest cards that Triton's kernels are compiled for here (Ampere)."""


@lru_cache(maxsize=16)
def kernels_work(device: torch.device) -> bool:
    """Whether our kernels run on a device. On a card this is tried once, since Triton may be there without working:
    it needs a C compiler and Python's headers."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        from .rows8 import quantize

        x = torch.eye(2, 32, device=device)
        if torch.equal(quantize(x, torch.int8).values.float(), 127 * x):
            return True
        log.warning("Triton computes wrongly on %s: steps between products run one by one", device)
    except ImportError:
        log.info("Triton is not installed: steps between products run one by one")
    except Exception as error:  # a missing compiler shows as CalledProcessError, RuntimeError or OSError
        log.warning("Triton does not work on %s (%s): steps between products run one by one", device, error)
    return False
