"""Stages that run out of memory: they go on under a tighter plan, with the same result, or end with one clear error."""

import gc
import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan_s2v_core import networks
from wan_s2v_core.assets import CHECKPOINT, embedded
from wan_s2v_core.clip_sampler import LocalSampler
from wan_s2v_core.conditioning.bundle import make_conditioning
from wan_s2v_core.config import SOLVERS, MemoryLimits, SamplingConfig, VideoConfig
from wan_s2v_core.errors import OutOfMemory
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.memory import budget
from wan_s2v_core.model.checkpoint import DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE
from wan_s2v_core.networks import open_checkpoint
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading

pytestmark = pytest.mark.usefixtures("pooled_vae")
CPU = torch.device("cpu")
RATE = 16000
VIDEO = VideoConfig(max_area=64 * 64, clip_frames=20)
CONFIG = SamplingConfig(steps=3, guidance_scale=3.0, seed=5)
ROOMY = MemoryLimits(vram_limit_gb=64.0)
"""A card that holds everything, so that plans are made and none is needed."""


class Failing(S2VPipeline):
    """Memory runs out before chosen layers of a stage: those with these numbers, counted from the stage's first."""

    def __init__(self, networks, stage: str = "", failures=()):
        super().__init__(networks, self.layer, LocalSampler(networks, partial(self.layer, DIT)))
        self.stage, self.failures, self.now, self.count, self.failed = stage, set(failures), "", 0, 0

    def layer(self, stage: str | None = None) -> None:
        self.now = stage or self.now
        if self.now == self.stage:
            self.count += 1
            if self.count in self.failures:
                self.failed += 1
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {self.count} GiB")

    def network(self, name, planned=budget.WHOLE):
        self.now = self.now if name == VAE else name
        return super().network(name, planned)

    def encode(self, video: Tensor) -> Tensor:
        self.now = "encode"
        return super().encode(video)

    def decode(self, latents: Tensor, *options, **named) -> Tensor:
        self.now = "decode"
        return super().decode(latents, *options, **named)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording(0.1 * torch.randn(1, 2 * RATE), RATE)


def simulated_room(device: torch.device, limits: MemoryLimits, returnable_bytes: int = 0) -> budget.Room:
    size = limits.vram_limit_gb
    return budget.Room(None if size is None else round(size * 1e9), None, limits.weights)


@pytest.fixture
def opened(tiny_checkpoint, monkeypatch):
    """Networks on a CPU that counts as a card of a size."""
    monkeypatch.setattr(networks, "room_on", simulated_room)
    monkeypatch.setattr(budget, "MARGIN_BYTES", 0)

    def open_limited(limits: MemoryLimits = MemoryLimits(), checkpoint: Path = tiny_checkpoint):  # noqa: B008
        return open_checkpoint(str(checkpoint), plan_loading("auto", CPU), limits=limits)

    return open_limited


def everything(pipeline: S2VPipeline, recording: Recording, config: SamplingConfig = CONFIG) -> list[Tensor]:
    voice = pipeline.encode_voice(recording)
    texts = pipeline.encode_prompts("a person talks", "blurry")
    picture = torch.full((64, 64, 3), 90, dtype=torch.uint8)
    job = make_conditioning(picture, voice, *texts, VIDEO)
    clips = list(pipeline.generate(job, config))
    return [voice.features, *texts, *(clip.latents for clip in clips), *(clip.video for clip in clips)]


@pytest.fixture
def vae_of_stage(request):
    """The real one where it is the stage that is looked at, and pooling beside other stages."""
    if request.node.callspec.params["stage"] in ("encode", "decode"):
        request.getfixturevalue("real_vae")


@pytest.fixture
def undisturbed(opened, recording):
    return everything(S2VPipeline(opened()), recording)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


STAGES = (SPEECH_ENCODER, TEXT_ENCODER, "encode", DIT, "decode")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_goes_on_under_a_tighter_plan(stage, vae_of_stage, opened, recording, undisturbed, caplog):
    pipeline = Failing(opened(ROOMY), stage, {random.randrange(2, 5)})
    with caplog.at_level(logging.WARNING):
        got = everything(pipeline, recording)
    assert pipeline.failed == 1
    assert_same(got, undisturbed)
    (warning,) = [record.getMessage() for record in caplog.records if "memory ran out" in record.getMessage()]
    kind = VAE if stage in ("encode", "decode") else stage
    assert PART_LABELS[kind] in warning and "GB" in warning


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_goes_on_from_the_last_finished_step(solver, opened, recording):
    """No step that had ended is made again: only the one that failed, and solvers know what was before it."""
    counts, latents, config = [], [], replace(CONFIG, solver=solver)
    for failures in ((), (20,)):
        pipeline, steps = Failing(opened(ROOMY), DIT, failures), []
        voice, texts = pipeline.encode_voice(recording), pipeline.encode_prompts("a person talks", "blurry")
        job = make_conditioning(torch.full((64, 64, 3), 90, dtype=torch.uint8), voice, *texts, VIDEO)
        clips = list(
            pipeline.generate(job, config, lambda task, step, _, steps=steps: steps.append((task.index, step)))
        )
        counts.append(pipeline.count)
        latents.append([clip.latents for clip in clips])
        assert steps == [(clip, step) for clip in range(len(clips)) for step in (1, 2, 3)]
    assert 0 < counts[1] - counts[0] <= 20
    assert_same(latents[1], latents[0])


def test_a_step_that_is_taken_again_counts_once(opened, recording):
    """In what the experts had to do."""
    loads = []
    for failures in ((), (13,)):  # in a later step than the first
        pipeline = Failing(opened(ROOMY, embedded(CHECKPOINT)), DIT, failures)
        everything(pipeline, recording)
        assert pipeline.failed == len(failures)
        loads.append(pipeline.expert_load)
    assert loads[0].tokens and loads[0] == loads[1]


@pytest.mark.parametrize("stage", STAGES)
def test_what_never_fits_ends_with_one_error(stage, opened, recording):
    held = opened(ROOMY)
    pipeline = Failing(held, stage, range(1, 10**6))
    with pytest.raises(OutOfMemory) as caught:
        everything(pipeline, recording)
    kind = VAE if stage in ("encode", "decode") else stage
    message = str(caught.value)
    assert (
        f"not enough memory for the {PART_LABELS[kind]}" in message and "nothing tighter" in message and "GB" in message
    )
    pipeline.failures = set()
    everything(pipeline, recording)


def test_another_error_is_nobodys_to_repeat(opened, recording):
    class Broken(Failing):
        def layer(self, stage: str | None = None) -> None:
            self.count += 1
            if self.count == 5:
                raise RuntimeError("shapes do not fit")

    pipeline = Broken(opened(ROOMY))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        everything(pipeline, recording)
    assert pipeline.count == 5


def hooks_in(held) -> int:
    modules = [module for network in held.loaded.values() for module in network.modules()]
    return sum(len(module._forward_pre_hooks) for module in modules)


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) is Tensor and item.device.type == "cpu":  # compilers keep tensors of their own, without data
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_thirty_runs_with_random_plans_leave_nothing_behind(opened, fresh_seed):
    chance, ends = random.Random(fresh_seed), []
    held, quick, recording = opened(ROOMY), replace(CONFIG, steps=1), Recording(0.1 * torch.randn(1, RATE), RATE)
    undisturbed = everything(S2VPipeline(opened()), recording, quick)
    for _ in range(30):
        held.limits = MemoryLimits(
            vram_limit_gb=64.0,
            resident_blocks=chance.choice([None, 0, 1, 2, 3]),
            slice_tokens=chance.choice([None, 0, 128]),
            weights=chance.choice(["auto", "locked", "mapped"]),
        )
        stage = chance.choice(STAGES)
        pipeline = Failing(held, stage, chance.sample(range(1, 30), chance.randrange(3)))
        try:
            got = everything(pipeline, recording, quick)
        except OutOfMemory:
            continue
        assert_same(got, undisturbed)
        del got, pipeline
        assert hooks_in(held) == 0
        ends.append(live_bytes())
    assert len(ends) > 10
    assert max(ends[1:]) <= ends[1] * 1.01 + 100_000, ends
