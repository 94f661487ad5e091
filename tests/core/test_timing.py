"""When a sound is heard and where it is shown: clicks at known times, and runs that record what the DiT is given."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.clip_denoiser import branch_inputs
from wan_s2v_core.conditioning.audio import voice_per_frame
from wan_s2v_core.conditioning.bundle import S2VConditioning, Voice, make_conditioning
from wan_s2v_core.config import S2VModelConfig, SamplingConfig, VideoConfig
from wan_s2v_core.geometry import FIRST_CLIP_SKIP, FRAMES_PER_LATENT, PIXELS_PER_LATENT, frames_of, latent_frames_of
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.model.audio import CausalAudioEncoder
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.model.dit import ClipInputs
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading

RATE, FPS, CLIP_FRAMES = 48000, 16, 20
VIDEO = VideoConfig(max_area=64 * 64, clip_frames=CLIP_FRAMES)
SECONDS = 9.0
CLICK_SAMPLES = 2400
REACH = 4
"""Frames on either side in which a click is looked for."""
QUICK = SamplingConfig(steps=1, guidance_scale=1.0)


class Recorder(S2VPipeline):
    """The real pipeline; keeps what the DiT is given for each clip."""

    def __init__(self, networks: CheckpointNetworks):
        super().__init__(networks)
        self.given: list[ClipInputs] = []

    def clip_inputs(self, job: S2VConditioning, task, text: Tensor) -> ClipInputs:
        self.given.append(super().clip_inputs(job, task, text))
        return self.given[-1]


class WithoutVAE(Recorder):
    """The same with a VAE that makes grey of the right length, since sound does not pass it and its time does."""

    def encode(self, video: Tensor) -> Tensor:
        frames, *sides = latent_frames_of(video.shape[2]), *(side // PIXELS_PER_LATENT for side in video.shape[3:])
        return torch.zeros(1, 16, frames, *sides)

    def decode(self, latents: Tensor, keep_frames: int) -> Tensor:
        frames, *sides = latents.shape[2:]
        return torch.zeros(1, 3, min(keep_frames, frames_of(frames)), *(PIXELS_PER_LATENT * side for side in sides))


@pytest.fixture(scope="module")
def networks(tiny_checkpoint) -> CheckpointNetworks:
    paths = dict.fromkeys(PART_LABELS, tiny_checkpoint)
    return CheckpointNetworks(Checkpoint(paths), plan_loading("auto", torch.device("cpu")))


def with_clicks(samples: Tensor, times: list[float], clicks: Tensor) -> Tensor:
    samples = samples.clone()
    for time, click in zip(times, clicks, strict=True):
        start = round(time * RATE) - len(click) // 2
        samples[:, start : start + len(click)] += click
    return samples


def job_of(pipeline: S2VPipeline, samples: Tensor, video: VideoConfig) -> S2VConditioning:
    voice, text = pipeline.encode_voice(Recording(samples, RATE)), torch.zeros(1, 3, 64)
    return make_conditioning(torch.zeros(64, 64, 3, dtype=torch.uint8), voice, text, text, video)


def heard_per_video_frame(pipeline: Recorder, samples: Tensor, video: VideoConfig) -> Tensor:
    """A E T of what was given for each frame of the video, counted on the frames that came out, not on the plan."""
    pipeline.given.clear()
    clips = list(pipeline.generate(job_of(pipeline, samples, video), QUICK))
    heard = []
    for clip, given in zip(clips, pipeline.given, strict=True):
        cut = given.audio.shape[-1] - clip.video.shape[2]
        behind_the_end = clip.index == len(clips) - 1
        heard.append(given.audio[0, ..., : clip.video.shape[2]] if behind_the_end else given.audio[0, ..., cut:])
    return torch.cat(heard, dim=-1)


def shown_frames(pipeline: Recorder, times: list[float], video: VideoConfig) -> list[int]:
    """For each click the video frame whose embedding is furthest from the run without it.

    Without it means: all clicks together at the start instead, so that the loudness, which wav2vec divides by, is kept.
    """
    plain, clicks = 0.003 * torch.randn(1, round(SECONDS * RATE)), 0.8 * torch.randn(len(times), CLICK_SAMPLES)
    early = [0.05 + 0.03 * index for index in range(len(times))]
    loud, quiet = (
        heard_per_video_frame(pipeline, with_clicks(plain, places, clicks), video) for places in (times, early)
    )
    distance = (loud - quiet)[0].norm(dim=0)  # T, of the layer before any attention over time
    frames = []
    for time in times:
        first = math.floor(time * FPS) - REACH
        frames.append(first + int(distance[first : first + 2 * REACH + 1].argmax()))
    return frames


def random_times() -> list[float]:
    return [1.0 + 0.8 * index + 0.25 * torch.rand(()).item() for index in range(9)]


def times_at_borders(skip: int) -> list[float]:
    """Just before and just after borders between clips, in turn."""
    borders = [(CLIP_FRAMES * clip - skip) / FPS for clip in range(1, 7)]
    return [border + (0.04 if index % 2 else -0.04) for index, border in enumerate(borders)]


@pytest.fixture(autouse=True)
def fresh_content(fresh_seed):
    torch.manual_seed(fresh_seed)


CASES = {  # timing, starts from the picture -> frames that are shown ahead of the sound
    ("aligned", False): 0,
    ("reference", False): FIRST_CLIP_SKIP,
    ("aligned", True): 0,
    ("reference", True): 0,
}


@pytest.mark.parametrize(("timing", "starts"), CASES)
@pytest.mark.parametrize("where", ["anywhere", "at borders"])
def test_a_click_reaches_the_frame_that_is_on_the_screen(timing, starts, where, networks):
    """Frame k is on the screen from k / 16 s to (k + 1) / 16 s.

    A frame takes the features of one instant, rounded to 1/30 s, and each feature hears 25 ms: so single clicks may
    fall to the neighbour, and on average they fall into the middle of the frame.
    """
    video = replace(VIDEO, timing=timing, starts_from_reference=starts)
    skip = 0 if starts else FIRST_CLIP_SKIP
    times = random_times() if where == "anywhere" else times_at_borders(skip)
    shown = shown_frames(WithoutVAE(networks), times, video)
    ahead = CASES[timing, starts]
    late = [frame + ahead - math.floor(time * FPS) for frame, time in zip(shown, times, strict=True)]
    assert max(map(abs, late)) <= 1 and sorted(late)[len(late) // 2] == 0, late
    from_the_middle = [frame + ahead + 0.5 - time * FPS for frame, time in zip(shown, times, strict=True)]
    assert abs(sum(from_the_middle) / len(times)) < 0.5, from_the_middle


def test_the_vae_does_not_matter_for_what_is_heard(networks):
    """What the tests above leave out changes neither what the DiT hears nor how many frames come."""
    samples, runs, video = 0.1 * torch.randn(1, round(2.1 * RATE)), [], replace(VIDEO, motion_frames=9)
    for kind in (Recorder, WithoutVAE):
        pipeline = kind(networks)
        lengths = [clip.video.shape[2] for clip in pipeline.generate(job_of(pipeline, samples, video), QUICK)]
        runs.append((lengths, pipeline.given))
    (lengths, real), (other_lengths, other) = runs
    assert lengths == other_lengths == [17, 17]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(real, other, strict=True))


# --- the voice before a clip ---------------------------------------------------------------------------------------

ENCODER = S2VModelConfig(width=48, heads=2, audio_width=24, audio_layers=4)


@pytest.mark.parametrize("motion_frames", [73, 9, 5])
@pytest.mark.parametrize("clip_frames", [20, 80])
def test_clips_that_hear_their_past_are_one_encoding(motion_frames, clip_frames, fresh_seed):
    """Clip after clip equals the whole recording at once; held first moments do not, so the past matters."""
    encoder = CausalAudioEncoder(ENCODER)
    fill_random(encoder, fresh_seed)
    whole = torch.randn(1, ENCODER.audio_layers, ENCODER.audio_width, 3 * clip_frames + 12)
    with torch.inference_mode():
        expected = encoder.encode_clip(whole, motion_frames)
        for first in range(0, whole.shape[-1], clip_frames):
            own, past = whole[..., first : first + clip_frames], whole[..., :first] if first else None
            place = slice(first // FRAMES_PER_LATENT, (first + own.shape[-1]) // FRAMES_PER_LATENT)
            for got, all_ in zip(encoder.encode_clip(own, motion_frames, past), expected, strict=True):
                torch.testing.assert_close(got, all_[:, place], atol=1e-5, rtol=0)
            if first:
                deaf = encoder.encode_clip(own, motion_frames)[0] - expected[0][:, place]
                assert deaf[:, :2].abs().amax(dim=(0, 2, 3)).min() > 1e-2, "5 frames back reach two latent frames"
                assert deaf[:, 2:].abs().max() < 1e-5


def job_with_features(features: Tensor, seconds: float, **changes) -> S2VConditioning:
    video, text = replace(VIDEO, **changes), torch.zeros(1, 3, 64)
    voice = Voice(Recording(torch.zeros(1, round(seconds * RATE)), RATE), features)
    return make_conditioning(torch.zeros(64, 64, 3, dtype=torch.uint8), voice, text, text, video)


@pytest.mark.parametrize("clip_frames", [20, 40, 80])
def test_the_past_of_a_clip_is_what_the_clips_before_it_said(clip_frames):
    seconds = 12.0
    job = job_with_features(torch.randn(4, 360, 32), seconds, clip_frames=clip_frames, hears_past=True)
    deaf = replace(job, video=replace(job.video, hears_past=False))
    whole = voice_per_frame(job.features, job.plan.total, job.video.fps, job.plan.lead)
    said = torch.zeros_like(whole[..., :0])
    for clip in range(job.clips):
        own, past = job.voice_of(clip)
        if clip:
            assert torch.equal(past, said[..., -job.geometry.motion_frames :]) and past.shape[-1] <= 73
        else:
            assert past is None
        assert torch.equal(own, deaf.voice_of(clip)[0]) and deaf.voice_of(clip)[1] is None
        said = torch.cat([said, own], dim=-1)
    assert torch.equal(said, whole) and job.clips > 2


def test_the_past_reaches_the_network(networks):
    """The first clip has none and stays as it is; the second is another one."""
    samples = 0.1 * torch.randn(1, round(2.1 * RATE))
    runs = {}
    for hears_past in (False, True):
        pipeline = WithoutVAE(networks)
        job = job_of(pipeline, samples, replace(VIDEO, hears_past=hears_past))
        runs[hears_past] = [clip.latents for clip in pipeline.generate(job, QUICK)], pipeline.given
    (plain, given), (hearing, given_past) = runs[False], runs[True]
    assert [inputs.audio_past for inputs in given] == [None, None] == [None, given_past[0].audio_past]
    assert torch.equal(given_past[1].audio_past, given_past[0].audio)
    assert torch.equal(plain[0], hearing[0]) and (plain[1] - hearing[1]).abs().max() > 1e-4


def test_silence_has_a_silent_past(make_inputs):
    inputs, _ = make_inputs()
    negative, past = torch.randn(1, 4, 32), torch.randn(1, 4, 24, 73)
    hearing = replace(inputs, audio_past=past)
    for branch in ("text_only", "negative"):
        silent = branch_inputs(hearing, negative, branch)
        assert silent.audio_past.shape == past.shape and not silent.audio_past.any() and not silent.audio.any()
        assert branch_inputs(inputs, negative, branch).audio_past is None
        assert silent.text is (negative if branch == "negative" else inputs.text)
    assert branch_inputs(hearing, negative, "both").audio_past is past and past.any()
