"""The article's case: a whole video through the real pipeline, from start to end or put together from a part of it."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..conditioning.bundle import S2VConditioning, make_conditioning
from ..config import ALWAYS, AUTO, DEFAULT_NEGATIVE_PROMPT, S2VModelConfig, SamplingConfig, VideoConfig
from ..errors import ConfigError
from ..io.audio import SPEECH_HZ, Recording
from ..model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ..model.parts import Checkpoint
from ..networks import CheckpointNetworks
from ..sampling.clips import ClipTask
from .cases import Case, Result, article_flop
from .engine import MOTION_FRAMES, SEED, loading_of
from .forwards import allowed_for, profile_forward
from .measure import OTHER, TRANSFERS, Profile, now
from .other_networks import FPS, PROMPT
from .session import Session
from .stages import MeasuredNetworks, MeasuredPipeline, Stage


@dataclass
class Run:
    """What was measured of a video: its stages, and when each step of each clip was done."""

    stages: list[Stage] = field(default_factory=list)
    first_clip_stages: int = 0
    """Stages up to the end of the first clip."""
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Clip and time."""
    seconds: float = 0.0

    def step_seconds(self, clip: int, first: int) -> list[float]:
        """How long the steps of a clip took, from step `first` on (from 1; the first has no beginning)."""
        times = [time for number, time in self.steps if number == clip]
        return [after - before for before, after in pairwise(times)][max(0, first - 2) :]


@dataclass(frozen=True)
class Part:
    """A stage, and how long it takes in the whole video."""

    name: str
    seconds: float
    times: int
    moving_seconds: float


def measure_article(session: Session, case: Case) -> Result:
    """A video of `case.frames`; unless it is run in full, of its later clips only one, and of each clip a few steps."""
    full = session.request.full
    steps = case.steps if full else min(case.steps, session.request.measured_steps)
    dense = case.plan.sparse_dense_steps if case.plan.sparse_keep < 1 else 0
    if not full and steps < case.steps and steps <= dense:
        raise ConfigError(
            f"--measured_steps {steps} with {dense} steps that leave nothing out tells nothing of the others. "
            f"Use {dense + 1} or more, or --full."
        )
    model = session.dit(case)
    config, build_seconds = model.config, session.build_seconds
    seen = profile_forward(session, case)
    with resident_networks(session, case) as networks:
        run = run_video(session, case, networks, case.clips if full else min(2, case.clips), steps)
    parts = parts_of(run, case, steps, dense)
    moving = sum(part.times * part.moving_seconds for part in parts)
    dit_seconds = sum(part.times * part.seconds for part in parts if part.name == DIT)
    total = run.seconds if full else sum(part.times * (part.seconds + part.moving_seconds) for part in parts)
    flop = article_flop(config, case)
    allowed = article_allowed(session, case, config, dense)
    peaks = [stage.peak_bytes for stage in run.stages if stage.peak_bytes is not None]
    forwards = case.branches * case.steps * case.clips
    details = {
        "tokens": case.shape().tokens(config.packs_motion),
        "clips": case.clips,
        "forwards": forwards,
        "measured_forwards": case.branches * len(run.steps),
        "measured_clips": len({clip for clip, _ in run.steps}),
        "frames_per_second": case.frames / total,
        "dit_seconds": dit_seconds,
        "moving_seconds": moving,
        "build_seconds": build_seconds,
        "flop": {"total": flop},
        "allowed_seconds": allowed and {"total": allowed},
        "ceilings": session.rates(case, case.shape().tokens(config.packs_motion)).to_dict() | session.ceilings.copies(),
        "spread": 0.0,
        "parts": [asdict(part) for part in parts],
        "stages": [asdict(stage) for stage in run.stages],
        "kernels": seen.kernels,
    }
    return Result(
        seconds_total=total,
        seconds_per_forward=dit_seconds / forwards,
        peak_bytes=max(peaks, default=None),
        tflops=flop / total / 1e12,
        ceiling_share=allowed and allowed / total,
        split=article_split(seen, dit_seconds, moving, total),
        estimated=not full,
        details=details,
    )


@contextmanager
def resident_networks(session: Session, case: Case) -> Iterator[CheckpointNetworks]:
    """All four, resting on the device or, with offload, in main memory."""
    loading = loading_of(case.precision, session.device, case.plan)
    offload = session.request.offload
    networks = CheckpointNetworks(Checkpoint({}), loading, ALWAYS if offload else AUTO)
    home = torch.device("cpu") if offload else session.device
    networks.put(DIT, session.plain_dit(case).to(home))
    try:
        for kind in (TEXT_ENCODER, SPEECH_ENCODER, VAE):
            networks.put(kind, session.network(kind, case.precision, home))
        yield networks
    finally:
        networks.forget()
        if offload:
            session.drop()  # it has moved


def run_video(session: Session, case: Case, networks: CheckpointNetworks, clips: int, steps: int) -> Run:
    """Make clips, of which nothing is kept."""
    measured, run = MeasuredNetworks(networks), Run()
    run.stages = measured.stages
    pipeline = MeasuredPipeline(measured)

    def tell(task: ClipTask, step: int, clean: Tensor) -> None:
        run.steps.append((task.index, now(session.device)))

    sampling = SamplingConfig(steps=steps, guidance_scale=case.guidance, seed=SEED)
    began = now(session.device)
    job = make_job(pipeline, measured, case, clips)
    for clip in pipeline.generate(job, sampling, tell):
        if clip.index == 0:
            run.first_clip_stages = len(run.stages)
        del clip
    run.seconds = now(session.device) - began
    return run


def make_job(pipeline: MeasuredPipeline, measured: MeasuredNetworks, case: Case, clips: int) -> S2VConditioning:
    """A voice as long as the whole video, a prompt and a picture, encoded; all of them random."""
    generator = torch.Generator().manual_seed(SEED)
    sound = torch.randn(1, SPEECH_HZ * case.frames // FPS, generator=generator).mul_(0.1)
    voice = pipeline.encode_voice(Recording(sound, SPEECH_HZ))
    prompts = (PROMPT, DEFAULT_NEGATIVE_PROMPT)[: case.branches]
    texts = pipeline.encode_prompts(*prompts)
    picture = torch.randint(0, 256, (case.height, case.width, 3), dtype=torch.uint8, generator=generator)
    video = VideoConfig(
        fps=FPS, exact_size=(case.height, case.width), clip_frames=case.clip_frames, motion_frames=MOTION_FRAMES,
        clips=clips,
    )  # fmt: skip
    with measured.without_network("plan and fit"):
        return make_conditioning(picture, voice, texts[0], texts[-1], video)


def parts_of(run: Run, case: Case, steps: int, dense: int) -> list[Part]:
    """How often each stage comes in the whole video, and its time with all of its steps."""
    later_clips = len({clip for clip, _ in run.steps}) - 1
    parts = []
    for number, stage in enumerate(run.stages):
        is_later = number >= run.first_clip_stages
        seconds, times = stage.seconds, 1
        if is_later and later_clips:
            times = (case.clips - 1) // later_clips  # all were run, or one stands for them
        if stage.name == DIT and steps < case.steps:
            seconds += (case.steps - steps) * statistics.median(run.step_seconds(int(is_later), dense + 1))
        parts.append(Part(stage.name, seconds, times, stage.moving_seconds))
    return parts


def article_allowed(session: Session, case: Case, config: S2VModelConfig, dense: int) -> float | None:
    """Seconds that the ceilings allow for all forwards."""
    dense = min(dense, case.steps)
    total = 0.0
    for clips, has_motion in ((1, False), (case.clips - 1, True)):
        for steps, kept in ((dense, 1.0), (case.steps - dense, case.plan.kept(config.blocks))):
            allowed = allowed_for(session, case, config, has_motion, kept)
            if allowed is None:
                return None
            total += case.branches * clips * steps * allowed.total
    return total


def article_split(seen: Profile, dit_seconds: float, moving_seconds: float, total: float) -> dict[str, float]:
    """The DiT's time as a forward of it is split; what the other networks take is other, moving them transfers."""
    split = seen.scaled_to(dit_seconds)
    split[OTHER] += max(0.0, total - dit_seconds - moving_seconds)
    split[TRANSFERS] += moving_seconds
    return split
