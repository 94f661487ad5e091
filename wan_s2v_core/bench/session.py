"""What the cases of one run share: the device, its ceilings, and the network that is being measured."""

from contextlib import ExitStack

import torch
from torch import nn

from ..attach import accelerated
from ..model.checkpoint import DIT
from ..model.dit import S2VTransformer
from . import engine
from .cases import GROWTH, BenchRequest, Case
from .ceilings import Ceilings, Rates
from .measure import now, release


class Session:
    """Holds one network at a time, so that cases of one way share it and the next one has room."""

    def __init__(self, request: BenchRequest, device: torch.device):
        self.request, self.source, self.device = request, request.source, device
        self.ceilings = Ceilings(device)
        self.build_seconds = 0.0
        """How long the network at hand took to make."""
        self._held: nn.Module | None = None
        self._attached = ExitStack()
        self._key: tuple = ()

    def dit(self, case: Case) -> S2VTransformer:
        """The DiT of a case, with what its plan says attached; a short one with random weights for growth."""
        model = self.plain_dit(case)
        self._attached.enter_context(accelerated(model, case.plan))
        return model

    def plain_dit(self, case: Case) -> S2VTransformer:
        """The same with nothing attached, for a pipeline, which attaches the plan itself."""
        self._attached.close()
        key = (case.precision, case.plan, case.group == GROWTH)
        if key != self._key:
            self.drop()
            began = now(self.device)
            if case.group == GROWTH:
                config = engine.with_blocks(self.source.config(DIT), self.request.growth_blocks)
                self._held = engine.build_short_dit(config, case.precision, self.device)
            else:
                self._held = engine.build_dit(self.source, case.precision, self.device)
            self._key, self.build_seconds = key, now(self.device) - began
        return self._held

    def network(self, kind: str, precision: str, home: torch.device | None = None) -> nn.Module:
        """Another network, which the caller holds."""
        return engine.build_network(kind, self.source, engine.loading_of(precision, self.device), home)

    def drop(self) -> None:
        """Let go of the network at hand."""
        self._attached.close()
        self._held, self._key = None, ()
        release(self.device)

    def rates(self, case: Case, tokens: int) -> Rates:
        """The ceilings for the DiT of a case."""
        bits = engine.attention_bits(case.plan)
        return self.ceilings.rates(self.source.config(DIT), tokens, case.precision, bits)
