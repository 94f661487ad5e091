"""One forward of the DiT: its time, where that goes, and what the ceilings of the same card would allow."""

from dataclasses import asdict
from typing import Any

from ..config import S2VModelConfig
from ..model.dit import S2VTransformer
from .cases import Case, Result
from .ceilings import Allowed, allowed_seconds
from .engine import make_inputs
from .flops import ForwardFlop, forward_flop
from .measure import Call, Profile, Timing, profile, time_call, time_runs
from .session import Session

TIMESTEP = 723.0


def forward_call(model: S2VTransformer, session: Session, case: Case, has_motion: bool = True) -> tuple[Call, float]:
    """A forward on random inputs, and the seconds that embedding the clip took before it."""
    inputs, noise = make_inputs(model.config, case.shape(has_motion), session.device)
    condition = model.condition(inputs)
    condition_seconds = time_call(lambda: model.condition(inputs), session.device)
    return lambda: model(noise, TIMESTEP, condition), condition_seconds


def measure_forward(session: Session, case: Case) -> Result:
    """Median of some forwards, with a profile of one more."""
    model = session.dit(case)
    call, condition_seconds = forward_call(model, session, case)
    timing = time_runs(call, session.request.runs, session.device)
    seen = profile(call, session.device)
    config, tokens = model.config, case.shape().tokens(model.config.packs_motion)
    flop = forward_flop(config, case.shape(), case.plan.kept(config.blocks))
    del call
    rates = session.rates(case, tokens)
    allowed = allowed_seconds(flop, rates)
    details = {
        "tokens": tokens,
        "blocks": config.blocks,
        **timing_facts(timing),
        "build_seconds": session.build_seconds,
        "condition_seconds": condition_seconds,
        **work_facts(flop, allowed, timing.median, seen),
        "ceilings": rates.to_dict() | session.ceilings.copies(),
        "kernels": seen.kernels,
    }
    return Result(
        seconds_total=timing.median,
        seconds_per_forward=timing.median,
        peak_bytes=timing.peak_bytes,
        tflops=flop.total / timing.median / 1e12,
        ceiling_share=allowed and allowed.total / timing.median,
        split=seen.within(timing.median),
        details=details,
    )


def timing_facts(timing: Timing) -> dict[str, Any]:
    """Single runs, and the first one, which is longer by what is compiled or read from a cache then."""
    return {
        "seconds": list(timing.seconds),
        "spread": timing.spread,
        "first_call_seconds": timing.first_seconds,
        "first_use_seconds": max(0.0, timing.first_seconds - timing.median),
    }


def work_facts(flop: ForwardFlop, allowed: Allowed | None, seconds: float, seen: Profile) -> dict[str, Any]:
    """The work, the time that the ceilings allow for it, and the time in which no kernel ran."""
    return {
        "flop": asdict(flop) | {"total": flop.total},
        "kept_attention": flop.attention / flop.dense_attention,
        "allowed_seconds": allowed and asdict(allowed) | {"total": allowed.total},
        "idle_seconds": max(0.0, seconds - sum(seen.split.values())),
    }


def profile_forward(session: Session, case: Case) -> Profile:
    """Where the time of a later clip's forward goes, measured apart."""
    call, _ = forward_call(session.dit(case), session, case)
    call()
    return profile(call, session.device)


def allowed_for(session: Session, case: Case, config: S2VModelConfig, has_motion: bool, kept: float) -> Allowed | None:
    """Seconds that the ceilings, at a later clip's tokens, allow for one forward."""
    tokens = case.shape().tokens(config.packs_motion)
    return allowed_seconds(forward_flop(config, case.shape(has_motion), kept), session.rates(case, tokens))
