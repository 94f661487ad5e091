"""Plain versions of what kernels compute over lists of tiles, for CPUs and for tests."""

from torch import Tensor


def attend_listed(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, counts: Tensor) -> Tensor:
    raise NotImplementedError
