"""Whether what networks give can be a film: damaged weights and overflows are told, never filmed."""

import logging

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..seams import Denoiser

log = logging.getLogger(__name__)

LARGEST_VALUE = 1e6
"""Of anything that a network gives. Latents and embeddings lie below 1000, half precision ends at 65504."""
PLAIN = 2 / 255
"""Pixels in [-1, 1] that are no further apart are of one colour."""
CURE = (
    "Its weights are damaged, or this precision cannot hold its values: check the file with inspect, download it "
    "again, or use bfloat16 or float32."
)


def check_numbers(values: Tensor, network: str, where: str) -> Tensor:
    """`values`, if one can go on with them.

    Args:
        values: any shape with at least two axes; looked at one part of the second axis after another.
        network: which gave them, for people.
        where: the stage, for people.
    Raises:
        CheckpointError: if some are NaN, infinite or far too large.
    """
    largest = torch.stack([part.abs().amax() for part in values.detach().unbind(1)]).amax().item()
    check_largest(largest, network, where)
    return values


def check_largest(largest: float, network: str, where: str) -> None:
    """Raises CheckpointError if the largest of some values is none to go on with."""
    if largest <= LARGEST_VALUE:
        return
    found = f"values up to {largest:.2g}" if largest < float("inf") else "NaN or infinite values"
    raise CheckpointError(f"{where}: the {network} gives {found}. {CURE}")


def check_embeddings(values: Tensor, network: str, where: str) -> Tensor:
    """As `check_numbers`, for embeddings B parts ..., which must also differ from each other within each part.

    Raises:
        CheckpointError: so it is where weights overflow before a normalisation.
    """
    check_numbers(values, network, where)
    for part in values.detach().unbind(1):
        if part.numel() > 1 and part.amin() == part.amax():
            raise CheckpointError(f"{where}: the {network} gives nothing but {part.amax():.3g}. {CURE}")
    return values


class WatchedSteps:
    """Notes how large the velocities of a clip's steps are, without waiting for the device.

    Args:
        steps: of the whole clip.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.largest: dict[int, Tensor] = {}
        """By step, from 0."""

    def watch(self, denoiser: Denoiser, step: int) -> Denoiser:
        """The same denoiser, of which the velocity in that step is noted."""

        def watched(latents: Tensor, timestep: float) -> Tensor:
            velocity = denoiser(latents, timestep)
            self.largest[step] = velocity.detach().abs().amax().float()
            return velocity

        return watched

    def check(self, network: str, where: str) -> None:
        """Raises CheckpointError if those of a step are none to go on with."""
        values = torch.stack([*self.largest.values()]).tolist() if self.largest else ()
        for step, largest in zip(self.largest, values, strict=True):
            check_largest(largest, network, f"{where}, step {step + 1} of {self.steps}")


def check_pixels(video: Tensor, picture: Tensor, network: str, where: str) -> None:
    """Whether decoded pixels can be a film.

    Args:
        video: B 3 T H W in [-1, 1].
        picture: B 3 1 H W, what the film is of; of a plain picture a plain film may come.
    Raises:
        CheckpointError: if some are NaN, or nothing is to be seen: one plain colour, or extremes alone.
    """
    facts = [
        torch.stack([frame.amin((0, 2, 3)), frame.amax((0, 2, 3)), frame.abs().amin((0, 2, 3))]).float()
        for frame in video.detach().unbind(2)
    ]
    lowest, highest, faintest = torch.stack(facts, dim=1).cpu()  # T 3 each
    check_largest(torch.stack([lowest.abs().amax(), highest.abs().amax()]).amax().item(), network, where)
    if plain_channels(picture.amin((0, 2, 3, 4)), picture.amax((0, 2, 3, 4))).all():
        return
    is_plain = plain_channels(lowest, highest).all(1)
    if bool(plain_channels(lowest.amin(0), highest.amax(0)).all()) or bool((faintest >= 1).all()):
        raise CheckpointError(f"{where}: the {network} gives a film in which nothing is to be seen. {CURE}")
    if bool(is_plain.any()):
        log.warning("%s: %d of %d frames are of one plain colour", where, is_plain.sum().item(), len(is_plain))


def plain_channels(lowest: Tensor, highest: Tensor) -> Tensor:
    return highest - lowest <= PLAIN
