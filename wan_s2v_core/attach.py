"""The techniques that a DiT runs with, in the one order that composes; attached for a stage and taken off behind it.

A new technique is a function `model -> context manager` that sets things through `seams.replaced`, and one line here.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from .acceleration.attention.registry import Chosen
from .acceleration.attention.sparse import SparsePlan, sparse_attend, strips
from .acceleration.experts.router import routed
from .acceleration.keys_values import kept_keys_values
from .acceleration.pointwise import fused_steps
from .config import AccelerationPlan, ExpertRouting, OffloadPlan
from .memory.slices import in_slices
from .model.dit import S2VTransformer
from .prepare import choose_attention
from .seams import Attend, Technique, replaced

log = logging.getLogger(__name__)

EVERYTHING = OffloadPlan()
"""Everything is computed at once and kept."""
NO_ROUTING = ExpertRouting()


@contextmanager
def attached(model: nn.Module, techniques: Iterable[Technique]) -> Iterator[None]:
    """Within, a model runs with techniques, of which the first is the innermost; afterwards it is as it was."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique(model))
        yield


def techniques(
    model: S2VTransformer,
    plan: AccelerationPlan,
    memory: OffloadPlan = EVERYTHING,
    timesteps: Sequence[float] = (),
    routing: ExpertRouting = NO_ROUTING,
) -> tuple[Technique, ...]:
    """What plans say, for models such as this one, which they do not hold. They serve all clips of a run.

    Args:
        memory: of it, what says how much is computed at once and kept.
        timesteps: of a clip; where attention is sparse, the plan's first steps of these look at everything.
    Raises:
        BackendUnavailable, ConfigError: as for `choose_attention`.
    """
    chosen = choose_attention(plan, model.config, model.dtype, model.device)
    log.info(attention_line(chosen, plan))
    return (
        *attention(chosen, plan, timesteps),
        *((fused_steps(),) if plan.fused else ()),
        in_slices(memory.slice_tokens),
        *((kept_keys_values,) if memory.keeps_keys_values else ()),
        routed(routing),
    )


class KeptTechniques:
    """What was made for the last plan, so that the same objects serve all clips of a run."""

    def __init__(self):
        self._made: dict[tuple, tuple[Technique, ...]] = {}

    def of(
        self,
        model: S2VTransformer,
        plan: AccelerationPlan,
        memory: OffloadPlan,
        timesteps: tuple[float, ...],
        routing: ExpertRouting | None,
    ) -> tuple[Technique, ...]:
        """As `techniques`. `routing`: None for models without experts."""
        routing = routing or NO_ROUTING
        key = plan, memory, timesteps, routing, model.dtype, model.device
        if key not in self._made:
            self._made = {key: techniques(model, plan, memory, timesteps, routing)}
        return self._made[key]


def accelerated(
    model: S2VTransformer, plan: AccelerationPlan, memory: OffloadPlan = EVERYTHING
) -> AbstractContextManager[None]:
    """Within, a model runs as plans say, with the routing of its checkpoint. Raises as `techniques`."""
    return attached(model, techniques(model, plan, memory))


def attention(chosen: Chosen, plan: AccelerationPlan, timesteps: Sequence[float]) -> tuple[Technique, ...]:
    """The self-attention of all blocks: exact, or sparse behind the blocks and steps that look at everything."""
    if plan.sparse_keep == 1:
        return (attending(chosen.attend),)
    sparse = SparsePlan(plan.sparse_keep, plan.sparse_by, dense_from(timesteps, plan.sparse_dense_steps))
    attend = sparse_attend(chosen.attend, chosen.attend_listed, sparse)
    return attending(attend, chosen.attend, plan.sparse_dense_blocks), strips


def attending(attend: Attend, first: Attend | None = None, count: int = 0) -> Technique:
    """Every block attends so, but for the first `count`, which attend as `first`."""

    @contextmanager
    def attached(model: S2VTransformer) -> Iterator[None]:
        blocks = enumerate(model.stack.blocks)
        with replaced((block.attention, "attend", first if number < count else attend) for number, block in blocks):
            yield

    return attached


def dense_from(timesteps: Sequence[float], dense_steps: int) -> float:
    """The timestep from which on attention is dense, so that the first steps of these look at everything."""
    dense = timesteps[:dense_steps]
    return dense[-1] if dense else float("inf")


def attention_line(chosen: Chosen, plan: AccelerationPlan) -> str:
    """The attention that runs, as a person reads it."""
    is_sparse = plan.sparse_keep < 1
    share = f", {plan.sparse_keep:.0%} of it" if is_sparse else ""
    return f"attention: {chosen.name}{share} ({'exact' if chosen.is_exact and not is_sparse else 'lossy'})"
