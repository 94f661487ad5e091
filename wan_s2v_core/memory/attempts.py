"""Out of memory is an event, not an end: a stage that does not fit is tried again under the next tighter plan."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import OutOfMemory
from ..model.checkpoint import DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE, kind_of
from .budget import WHOLE, Choose, NoPlanFits, Planned, Sizes, tighter
from .networks import Networks

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEDIES = {
    DIT: "Choose a smaller size, fewer frames per clip or precision float8",
    VAE: "Choose a smaller size or fewer frames per clip",
    TEXT_ENCODER: "Let the text encoder run on the CPU",
    SPEECH_ENCODER: "Use a recording of less than a minute; of a longer one as much is heard at a time",
}
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory")
"""What torch says where it has no class for it: of main memory, and of memory that is locked for a card."""


def is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, OutOfMemory):
        return False  # ours, which has been dealt with
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(one in words for one in OUT_OF_MEMORY_WORDS)


class Attempts:
    """The plans of one stage, each tighter than the one before, which did not fit.

    Args:
        networks: that it uses one of.
        name: which.
        choose: its plans. Where none is predicted to fit, the tightest is tried all the same: predictions have margins.
    """

    def __init__(self, networks: Networks, name: str, choose: Choose):
        self.networks, self.name, self.choose = networks, name, choose
        self.room = networks.room(name)
        self.sizes = Sizes() if self.room.device_bytes is None else networks.sizes(name)
        self.doubt: str | None = None
        """Why the plan, which is the tightest one, may not fit."""
        self.planned = self._choose()
        if self.doubt:
            log.warning("%s: %s. It is tried with %s", self.label, self.doubt, self.planned.line(self.sizes))
        elif self.planned != WHOLE:
            log.info("%s: %s", self.label, self.planned.line(self.sizes))

    def _choose(self) -> Planned:
        try:
            return self.choose(self.room, self.sizes)
        except NoPlanFits as error:
            self.doubt = str(error)
            return error.tightest

    @property
    def label(self) -> str:
        return PART_LABELS[kind_of(self.name)]

    def end(self, reason: str) -> OutOfMemory:
        """The error of a stage for which there is no room."""
        return OutOfMemory(
            f"{self.networks.device} has not enough memory for the {self.label} ({reason}) "
            f"{REMEDIES[kind_of(self.name)]}, or close what else uses it."
        )

    def tighten(self, reason: str) -> None:
        """Go on to the next plan. Called when nothing holds any more what the failed attempt had made.

        Args:
            reason: what was said when memory ran out.
        Raises:
            OutOfMemory: if there is none.
        """
        self.networks.recover()
        if self.doubt:
            raise self.end(f"{reason}, with {self.planned.line(self.sizes)} and nothing tighter")
        before, self.room = self.planned, tighter(self.room, self.planned)
        self.planned = self._choose()
        log.warning(
            "%s: memory ran out (%s) with %s. It goes on with %s%s",
            self.label,
            reason.rstrip("."),
            before.line(self.sizes),
            self.planned.line(self.sizes),
            " again, now that others have left" if self.planned == before else ", slower. A lower limit avoids this",
        )

    def run(self, work: Callable[[Planned], T]) -> T:
        """Do the stage's work under the first plan with which it fits. Results under all of them are the same."""
        while True:
            try:
                return work(self.planned)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
                if self.room.device_bytes is None:
                    raise self.end(reason) from error
            self.tighten(reason)  # here nothing is held by the error any more


def first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0] or "no reason given"
