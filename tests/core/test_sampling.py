"""Schedules, solvers, guidance and the chain of clips."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from wan_s2v_core.config import SOLVERS, SamplingConfig
from wan_s2v_core.geometry import ClipGeometry, frames_of
from wan_s2v_core.sampling.clips import ClipTask, clip_noise, generate_clips
from wan_s2v_core.sampling.denoise import OnStep, denoise
from wan_s2v_core.sampling.guidance import GuidanceBranches, classifier_free_guidance, map_needed, needed_branches
from wan_s2v_core.sampling.preview import colour_factors
from wan_s2v_core.sampling.schedule import make_schedule
from wan_s2v_core.sampling.solvers import SolverState, make_solver


def velocity_of(latents, timestep):
    """A velocity that depends on both arguments and is no solver's fixed point."""
    return torch.tanh(0.7 * latents + 0.1 * math.sin(timestep / 1000))


def whole_clip(noise: Tensor, config: SamplingConfig, on_step: OnStep | None = None) -> Tensor:
    solver = make_solver(config)
    return denoise(velocity_of, solver, SolverState(noise), solver.schedule.steps, on_step).latents


def make_reference(solver: str, steps: int, shift: float):
    """diffusers' schedulers, set up to be the reference's."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(num_train_timesteps=1000, **flow)
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
        return scheduler
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
        return scheduler
    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint", **flow)
    scheduler.set_timesteps(steps)
    levels = np.linspace(1, 0, steps + 1)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)
    scheduler.sigmas = torch.from_numpy(np.append(levels, 0)).float()
    scheduler.timesteps = torch.from_numpy((levels * 1000).astype(np.int64))
    return scheduler


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=15, deadline=None)
@given(steps=st.integers(2, 60), shift=st.sampled_from([1.0, 2.5, 3.0, 5.0, 8.0, 12.0]), seed=st.integers(0, 2**31))
def test_solvers_equal_diffusers(solver, steps, shift, seed):
    noise = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(seed))
    theirs = noise
    for timestep in (scheduler := make_reference(solver, steps, shift)).timesteps:
        velocity = velocity_of(theirs, float(timestep))
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]

    ours = whole_clip(noise, SamplingConfig(steps=steps, shift=shift, solver=solver))
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_karras_spacing_equals_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 13)[:-1])
    schedule = make_schedule(SamplingConfig(steps=12, solver="euler", spacing="karras"))
    torch.testing.assert_close(torch.tensor(schedule.sigmas), scheduler.sigmas, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 120),
    shift=st.floats(0.5, 20),
    solver=st.sampled_from(SOLVERS),
    spacing=st.sampled_from(["flow", "karras"]),
)
def test_noise_levels_fall_to_zero(steps, shift, solver, spacing):
    schedule = make_schedule(SamplingConfig(steps=steps, shift=shift, solver=solver, spacing=spacing))
    assert len(schedule.timesteps) == steps == len(schedule.sigmas) - 1
    assert schedule.sigmas[-1] == 0 and schedule.sigmas[0] <= 1
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    assert all(-1e-3 < 1000 * s - t < 1.001 for s, t in zip(schedule.sigmas, schedule.timesteps, strict=False))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_clean_prediction_is_reached_exactly(solver, steps, fresh_seed):
    """If the model always knows the answer, every solver ends there, also from pure noise."""
    torch.manual_seed(fresh_seed)
    clean, noise = torch.randn(2, 3, 8)
    solver, state = make_solver(SamplingConfig(steps=steps, solver=solver)), SolverState(noise)
    for sigma in solver.schedule.sigmas[:-1]:
        state = solver.step(state, (state.latents - clean) / sigma)
    torch.testing.assert_close(state.latents, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_errors_shrink_with_the_order_of_the_solver(solver, order):
    noise = torch.linspace(-2, 2, 64)

    def end(steps, solver=solver):
        return whole_clip(noise, SamplingConfig(steps=steps, solver=solver, shift=2.0))

    exact = end(1000, "unipc")
    coarse, fine = ((end(steps) - exact).abs().max() for steps in (10, 40))
    assert coarse / fine > 4**order / 2.5


def test_state_keeps_its_precision_and_progress_is_told():
    told = []
    config = SamplingConfig(steps=5, solver="dpm++")
    out = whole_clip(torch.randn(4).bfloat16(), config, lambda step, x: told.append((step, x.dtype)))
    assert out.dtype == torch.bfloat16
    assert told == [(step, torch.bfloat16) for step in range(1, 6)]


given_timesteps = st.sets(st.integers(1, 10 * 1000), min_size=1, max_size=12).map(
    lambda tenths: tuple(tenth / 10 for tenth in sorted(tenths, reverse=True))
)


@settings(max_examples=60, deadline=None)
@given(timesteps=given_timesteps, solver=st.sampled_from(SOLVERS))
def test_timesteps_that_are_given_reach_the_model_as_they_are(timesteps, solver):
    config = SamplingConfig(timesteps=timesteps, solver=solver, shift=8.0)
    schedule = make_schedule(config)
    assert schedule.timesteps == timesteps
    assert config.steps == len(schedule.steps) == len(timesteps)
    assert schedule.sigmas[-1] == 0 and all(a > b for a, b in pairwise(schedule.sigmas))
    first, *others = 1000 * np.array(schedule.sigmas[:-1])
    assert others == pytest.approx(timesteps[1:])
    assert first == pytest.approx(timesteps[0], abs=1 if solver == "unipc" else 1e-3), "UniPC: just below pure noise"
    noise = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(len(timesteps)))
    assert whole_clip(noise, config).isfinite().all()


def test_whole_timesteps_are_told_as_floats():
    schedule = make_schedule(SamplingConfig(timesteps=(1000, 500), solver="euler"))
    assert schedule.sigmas == (1.0, 0.5, 0.0) and [type(t) for t in schedule.timesteps] == [float] * 2


def sent(state: SolverState) -> SolverState:
    """A state as another process, or a run of another day, reads it."""
    tensors, facts = state.pack()
    return SolverState.unpack(load(save(tensors)), json.loads(json.dumps(facts)))


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    timesteps=st.none() | given_timesteps,
    data=st.data(),
)
def test_ranges_of_steps_are_the_whole_clip(solver, steps, dtype, timesteps, data):
    """Bit for bit, wherever it is cut, when each range has a solver of its own and a state that was sent to it."""
    given = {"steps": steps} if timesteps is None else {"timesteps": timesteps}
    config = SamplingConfig(solver=solver, shift=2.0, **given)
    noise = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(config.steps)).to(dtype)
    told, once = [], []
    expected = whole_clip(noise, config, lambda step, clean: once.append((step, clean)))

    cuts = data.draw(st.sets(st.integers(0, config.steps), max_size=4))
    state = SolverState(noise)
    for first, stop in pairwise([0, *sorted(cuts), config.steps]):
        state = denoise(velocity_of, make_solver(config), sent(state), range(first, stop), lambda *n: told.append(n))
    assert torch.equal(state.latents, expected) and state.latents.dtype == dtype and state.step == config.steps
    assert [step for step, _ in told] == [step for step, _ in once] == list(range(1, config.steps + 1))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(told, once, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_changes_nothing_but_what_it_returns(solver):
    """A step that is repeated from its state, as after running out of memory, gives the same; noise is not used."""
    made = make_solver(SamplingConfig(steps=4, solver=solver))
    before = denoise(velocity_of, made, SolverState(torch.randn(2, 8)), range(2))
    velocity, kept = velocity_of(before.latents, 500.0), sent(before)
    first = made.step(before, velocity)
    made.step(first, velocity)
    again = made.step(before, velocity, noise=torch.randn(2, 8))
    for one, other in ((before, kept), (first, again)):
        assert one.step == other.step and torch.equal(one.latents, other.latents)
        assert all(torch.equal(*pair) for pair in zip(one.history, other.history, strict=True))


# --- guidance ----------------------------------------------------------------------------------------------------

scales = st.one_of(st.just(1.0), st.just(4.5), st.floats(1, 12))


@settings(max_examples=80, deadline=None)
@given(text=scales, audio=scales, seed=st.integers(0, 2**31))
def test_guidance_is_its_formula_with_the_fewest_forwards(text, audio, seed):
    both, text_only, negative = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    outputs, calls = {"both": both, "text_only": text_only, "negative": negative}, []
    config = SamplingConfig(guidance_scale=text, audio_guidance_scale=audio)

    def make(branch):
        def denoiser(latents, timestep):
            calls.append(branch)
            return outputs[branch]

        return denoiser

    guided = classifier_free_guidance(map_needed(make, config), config)(both, 0.0)
    expected = negative + text * (text_only - negative) + audio * (both - text_only)
    torch.testing.assert_close(guided, expected, atol=2e-5, rtol=1e-5)
    assert sorted(calls) == sorted(needed_branches(config))
    most = 1 if text == audio == 1 else 2 if text == audio or text == 1 else 3
    assert len(calls) == most


def test_equal_scales_are_the_reference_to_the_bit(fresh_seed):
    torch.manual_seed(fresh_seed)
    both, negative = torch.randn(2, 1000)
    branches = GuidanceBranches(lambda x, t: both, None, lambda x, t: negative)
    guided = classifier_free_guidance(branches, SamplingConfig(guidance_scale=4.5))(both, 0.0)
    assert torch.equal(guided, negative + 4.5 * (both - negative))


# --- clips -------------------------------------------------------------------------------------------------------


class CountingVAE:
    """A VAE that repeats frames: latent frame j holds the value of video frame 4j. Counts what it is given."""

    def __init__(self):
        self.encoded, self.decoded = [], []

    def encode(self, video):
        self.encoded.append(video.shape[2])
        return video[:, :1, ::4, ::8, ::8].repeat(1, 16, 1, 1, 1)

    def decode(self, latents, keep_frames):
        self.decoded.append(latents.shape[2])
        frames = latents[:, :3].repeat_interleave(4, dim=2)[:, :, 3:][:, :, -keep_frames:]
        return frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


@pytest.mark.parametrize("starts_from_reference", [False, True])
@pytest.mark.parametrize(("clip_frames", "motion_frames"), [(80, 73), (16, 73), (16, 5)])
def test_clips_chain(starts_from_reference, clip_frames, motion_frames):
    vae, geometry, tasks = CountingVAE(), ClipGeometry(clip_frames, motion_frames), []
    reference = torch.full((1, 3, 1, 8, 8), 0.5)

    def sample(task: ClipTask):
        tasks.append(task)
        return torch.full_like(task.noise, task.index + 1.0)

    noises = (torch.zeros(1, 16, geometry.latent_frames, 1, 1) for _ in range(4))
    clips = list(
        generate_clips(sample, vae.encode, vae.decode, reference, geometry.motion_frames, noises, starts_from_reference)
    )

    lengths = [clip.video.shape[2] for clip in clips]
    assert lengths == [clip_frames - (0 if starts_from_reference else 3), *[clip_frames] * 3]
    assert (tasks[0].motion_latents is None) == (not starts_from_reference)
    for task in tasks[1:]:
        assert task.motion_latents.shape[2] == geometry.motion_latent_frames
    past = torch.zeros(1, 3, motion_frames, 8, 8)
    if starts_from_reference:
        past[:, :, -6:] = reference
    for clip, following in zip(clips, [*tasks[1:], None], strict=True):
        past = torch.cat([past, clip.video], dim=2)[:, :, -motion_frames:]
        assert torch.equal(clip.motion_video, past), "motion is the tail of everything so far, in float"
        if following:
            assert torch.equal(following.motion_latents, CountingVAE().encode(past))
    first_lead_in = geometry.motion_latent_frames if starts_from_reference else 1
    assert vae.decoded == [n + geometry.latent_frames for n in (first_lead_in, *[geometry.motion_latent_frames] * 3)]
    assert all(frames_of(n) >= length for n, length in zip(vae.decoded, lengths, strict=True))


def test_clips_come_as_they_finish():
    vae, geometry, reference, sampled = CountingVAE(), ClipGeometry(8, 5), torch.zeros(1, 3, 1, 8, 8), []
    noises = (torch.zeros(1, 16, geometry.latent_frames, 1, 1) for _ in range(100))

    def sample(task):
        sampled.append(task.index)
        return task.noise

    next(generate_clips(sample, vae.encode, vae.decode, reference, geometry.motion_frames, noises))
    assert sampled == [0]


def test_the_last_clip_may_be_shorter():
    vae, reference = CountingVAE(), torch.zeros(1, 3, 1, 8, 8)
    noises = (torch.zeros(1, 16, frames, 1, 1) for frames in (20, 20, 5))
    clips = generate_clips(lambda task: task.noise, vae.encode, vae.decode, reference, 73, noises)
    assert [clip.video.shape[2] for clip in clips] == [77, 80, 20]


def test_noise_is_the_seed_and_the_clip():
    shape = (1, 16, 2, 3, 4)
    assert torch.equal(clip_noise(shape, 40, 2, "cpu"), clip_noise(shape, 42, 0, "cpu"))
    assert torch.equal(clip_noise(shape, 7, 0, "cpu"), torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(clip_noise(shape, 7, 0, "cpu"), clip_noise(shape, 7, 1, "cpu"))


def test_preview_colours_are_those_of_the_picture(fresh_seed):
    """Latents that mix colours with other things in any way still show a picture in its own colours."""
    torch.manual_seed(fresh_seed)
    colours = torch.rand(1, 3, 1, 12, 10) * 2 - 1
    mixing = torch.linalg.qr(torch.randn(16, 16))[0]
    latents = torch.einsum("ij,bjthw->bithw", mixing, torch.cat([colours, torch.randn(1, 13, 1, 12, 10)], 1)) + 0.5
    picture = colours.repeat_interleave(8, -1).repeat_interleave(8, -2)
    factors, bias = colour_factors(picture, latents)
    shown = torch.einsum("ij,bjthw->bithw", factors, latents) + bias.view(3, 1, 1, 1)
    assert (shown - colours).abs().max() < 0.2
    plain, _ = colour_factors(torch.full_like(picture, 0.3), latents)
    assert plain.abs().max() < 1e-5
