"""Long recordings, heard in windows: what the whole gives, in room that does not grow with the length."""

import math
import os
import random
import re
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import files_no_larger_than
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan_s2v_core.assets import CHECKPOINT, VOICE, embedded
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.conditioning.audio import Resampling, audio_embeddings, resample_features
from wan_s2v_core.conditioning.bundle import S2VConditioning, Voice, make_conditioning
from wan_s2v_core.conditioning.hearing import hear
from wan_s2v_core.config import VideoConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io.audio import Recording, read_recording, resample
from wan_s2v_core.io.scratch import scratch
from wan_s2v_core.memory.budget import voice_bytes
from wan_s2v_core.model import long_speech
from wan_s2v_core.model.audio_encoder import SPEECH_FEATURE_HZ, SpeechEncoder
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.model.loading import load_audio_encoder
from wan_s2v_core.model.long_speech import WINDOWS, Windows, hear_in_windows
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading

SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
KINDS = {
    "base": {"feat_extract_norm": "group"},
    "large": {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
}
ROUNDING = 2e-6
"""Relative to the whole, of a window with the keys of all frames: measured 6e-8 on the embedded encoder and 4e-7 on
one of random weights at the real width."""
SAMPLED = 0.02
"""The same with no more than 300 keys from outside the window and its surroundings, on the embedded encoder."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def worst_frame(found: Tensor, expected: Tensor) -> float:
    """Of any layer, relative to what its frames are like."""
    return float(((found - expected).norm(dim=2) / expected.norm(dim=2).mean(1, keepdim=True)).max())


def heard_in_windows(encoder: SpeechEncoder, samples: Tensor, windows: Windows) -> Tensor:
    """A T E at 50 Hz, put together; NaN where nothing was given."""
    layers, width = encoder.shape
    frames = encoder.frames_of(len(samples))
    whole = torch.full((layers, frames, width), math.nan)
    for layer, first, states in hear_in_windows(encoder, samples, torch.empty(frames, width), windows):
        whole[layer, first : first + len(states)] = states
    return whole


@pytest.fixture(params=KINDS)
def encoder(request, fresh_seed) -> SpeechEncoder:
    random.seed(fresh_seed)
    torch.manual_seed(fresh_seed)
    made = SpeechEncoder(SETTINGS | KINDS[request.param])
    fill_random(made, fresh_seed)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def trained() -> SpeechEncoder:
    return load_audio_encoder(embedded(CHECKPOINT)).requires_grad_(False)


@pytest.fixture(scope="module")
def spoken() -> Tensor:
    """20 s: the embedded voice, and after it again, lower, slower and softer."""
    samples = read_recording(embedded(VOICE)).speech()
    return torch.cat([samples, 0.4 * resample(samples[None], 16000, 19000)[0]])[: 20 * 16000]


# --- windows --------------------------------------------------------------------------------------------------------


@given(frames=st.integers(1, 5000), window=st.integers(1, 700))
def test_windows_cover_the_recording_once(frames, window):
    cut = Windows(window).cut(frames)
    assert [frame for first, end in cut for frame in range(first, end)] == list(range(frames))
    lengths = [end - first for first, end in cut]
    assert max(lengths) <= window and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("around", [-1, 0, 1, 200, 319, 320])
def test_windows_give_what_the_whole_gives(encoder, around):
    """Also where a recording ends just before, on and after a frame that fills a window, in every frame."""
    window, context = random.randint(20, 60), random.randint(0, 30)
    samples = encoder.samples_of(window * random.randint(2, 5)) + around
    waveform = 0.2 * torch.randn(samples) * torch.linspace(0.2, 1.0, samples) + 0.03
    expected = encoder.hidden_states(waveform)
    found = heard_in_windows(encoder, waveform, Windows(window, context, most_keys=10_000))
    assert found.shape == expected.shape and expected.shape[1] == encoder.frames_of(samples)
    assert relative(found, expected) < ROUNDING and worst_frame(found, expected) < 5 * ROUNDING


@given(samples=st.integers(400, 100_000))
@settings(max_examples=100, deadline=None)
def test_frames_and_samples_fit(trained, samples):
    frames = trained.frames_of(samples)
    assert trained.samples_of(frames) <= samples < trained.samples_of(frames + 1)
    assert frames == (samples - 400) // 320 + 1


@pytest.mark.parametrize("context", [0, 50])
def test_a_sample_of_the_rest_is_nearly_as_good(trained, spoken, context, monkeypatch):
    """On a real voice; and a window without it is much further off, so that what it hears of the rest matters."""
    windows = Windows(150, context, most_keys=300)
    expected = trained.hidden_states(spoken)
    found = heard_in_windows(trained, spoken, windows)
    with_keys = long_speech.other_keys
    monkeypatch.setattr(
        long_speech, "other_keys", lambda module, near, far, spacing: with_keys(module, near, far[:0], spacing)
    )
    alone = heard_in_windows(trained, spoken, windows)
    assert ROUNDING < relative(found, expected) < SAMPLED and worst_frame(found, expected) < 5 * SAMPLED
    assert relative(alone, expected) > 3 * relative(found, expected)


def test_a_seam_is_no_jump(trained, spoken):
    """From frame to frame the error changes less than a tenth of what the voice does."""
    windows = Windows(150, 50, most_keys=300)
    expected = trained.hidden_states(spoken)
    error = heard_in_windows(trained, spoken, windows) - expected
    usual = expected.diff(dim=1).norm(dim=2).mean(1)  # of each layer
    for _, seam in windows.cut(expected.shape[1])[:-1]:
        assert ((error[:, seam] - error[:, seam - 1]).norm(dim=1) < 0.1 * usual).all()


def test_windows_leave_the_encoder_as_it_was(encoder):
    waveform = torch.randn(40_000)
    expected = encoder.hidden_states(waveform)
    heard_in_windows(encoder, waveform, Windows(30, 10, 20))
    assert torch.equal(encoder.hidden_states(waveform), expected)
    steps = hear_in_windows(encoder, waveform, torch.empty(124, 32), Windows(30, 10, 20))
    for _ in range(6):
        next(steps)
    steps.close()  # as a stop does
    assert torch.equal(encoder.hidden_states(waveform), expected)


# --- features at 30 Hz ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.025, 0.03, 0.7, 2.0])
def test_a_short_recording_is_heard_whole(encoder, seconds):
    """Bit by bit as it was before there were windows, up to a window's length."""
    waveform = torch.randn(round(16000 * seconds))
    expected = resample_features(encoder.hidden_states(waveform), SPEECH_FEATURE_HZ)
    assert torch.equal(hear(encoder, waveform, Windows(100, 10, 30)), expected)
    assert torch.equal(hear(encoder, waveform), expected)


@given(data=st.data(), frames=st.integers(2, 3000))
@settings(max_examples=60, deadline=None)
def test_resampling_in_stretches(data, frames):
    """Whatever they are, down to a frame: the whole's but for the last bit."""
    states = torch.randn(2, frames, 3)
    expected = resample_features(states, SPEECH_FEATURE_HZ)
    cuts = sorted(data.draw(st.sets(st.integers(1, frames - 1), max_size=8)))
    resampling = Resampling(frames, SPEECH_FEATURE_HZ)
    features = torch.full((2, len(resampling), 3), math.nan)
    for layer in range(2):
        for first, end in zip([0, *cuts], [*cuts, frames], strict=True):
            begin = max(0, first - 1)
            resampling.fill(features[layer], begin, states[layer, begin:end])
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


def test_a_long_recording_has_the_features_of_the_whole(encoder, tmp_path):
    """In memory, and the same to the bit in a file, of which nothing is left to see."""
    waveform = torch.randn(random.randint(40_000, 80_000))
    expected = resample_features(encoder.hidden_states(waveform), SPEECH_FEATURE_HZ)
    windows = Windows(random.randint(20, 70), 5, most_keys=1000)
    found = hear(encoder, waveform, windows)
    assert found.shape == expected.shape and relative(found, expected) < ROUNDING
    on_disk = hear(encoder, waveform, windows, tmp_path, most_in_memory=0)
    assert torch.equal(on_disk, found) and not list(tmp_path.iterdir())


# --- room -----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes of tensors made in it that were there at once; views and what was there before count nothing."""

    def __init__(self):
        super().__init__()
        self.owners: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            key, size = made.untyped_storage().data_ptr(), made.untyped_storage().nbytes()
            if key in given and key not in self.owners:
                continue
            if key not in self.owners:
                self.owners[key] = [0, size]
                self.now += size
            self.owners[key][0] += 1
            weakref.finalize(made, self.release, key)
        self.peak = max(self.peak, self.now)
        return out

    def release(self, key: int) -> None:
        self.owners[key][0] -= 1
        if not self.owners[key][0]:
            self.now -= self.owners.pop(key)[1]


def peak_of_hearing(encoder: SpeechEncoder, frames: int, windows: Windows) -> int:
    waveform, states = torch.randn(encoder.samples_of(frames)), torch.empty(frames, encoder.shape[1])
    with torch.inference_mode(), Live() as live:
        for _ in hear_in_windows(encoder, waveform, states, windows):
            pass
    return live.peak


def test_room_for_hearing_does_not_grow_with_the_length(encoder):
    windows = Windows(60, 10, most_keys=100)
    short, long = (peak_of_hearing(encoder, frames, windows) for frames in (400, 3200))
    assert short > 50_000 and long < 1.1 * short
    with torch.inference_mode(), Live() as live:
        encoder.hidden_states(torch.randn(encoder.samples_of(3200)))
    assert live.peak > 5 * long, "the whole takes what its length asks for"


def test_the_predicted_room_is_bounded():
    limit = WINDOWS.window / SPEECH_FEATURE_HZ
    assert voice_bytes(0.5 * limit) < voice_bytes(limit) == voice_bytes(600) == voice_bytes(36_000)
    assert voice_bytes(600, Windows(500)) < voice_bytes(600)
    assert voice_bytes(600, Windows(500, most_keys=5000)) < voice_bytes(600, Windows(500))


# --- scratch space --------------------------------------------------------------------------------------------------


def test_scratch_space_is_a_tensor(tmp_path):
    small, large = scratch((3, 5), tmp_path, 60), scratch((3, 5), tmp_path, 59)
    values = torch.randn(3, 5)
    for made in (small, large):
        made.copy_(values)
        assert made.dtype == torch.float32 and torch.equal(made.T[1:3], values.T[1:3])
    assert not list(tmp_path.iterdir()), "the file has no name"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
def test_scratch_space_is_no_memory_of_this_process():
    """A file on disk stands behind it, which the system writes out when it needs the room."""
    made = scratch((4_000_000,), most_in_memory=0).fill_(1.0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= made.data_ptr() < last:
            break
    assert line.split()[1] == "rw-s" and "(deleted)" in line and tempfile.gettempdir() in line


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
@pytest.mark.parametrize("way", ["reserved", "written"])
def test_a_full_disk_is_told_before_anything_is_heard(tmp_path, way, monkeypatch):
    if way == "written":
        monkeypatch.delattr(os, "posix_fallocate")
    full = rf"0\.0 GB of scratch space cannot be had in {re.escape(str(tmp_path))}: File too large\..* recording\.$"
    with files_no_larger_than(1 << 20), pytest.raises(ConfigError, match=full):
        scratch((1000, 500), tmp_path, 1000)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be had in .*nowhere: No such file"):
        scratch((1000,), tmp_path / "nowhere", 0)


# --- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tiny_checkpoint) -> CheckpointNetworks:
    checkpoint = Checkpoint(dict.fromkeys(PART_LABELS, tiny_checkpoint))
    return CheckpointNetworks(checkpoint, plan_loading("auto", torch.device("cpu")))


class StopHereError(Exception):
    pass


def test_a_run_can_stop_in_any_window(networks):
    recording, windows = Recording(0.1 * torch.randn(1, 48000), 16000), Windows(30, 10, 60)
    told = []
    S2VPipeline(networks, lambda: told.append(1)).encode_voice(recording, windows)
    assert len(told) > 5 * 10, "every layer of every window"
    left = len(told) * 2 // 3

    def stop() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise StopHereError

    with pytest.raises(StopHereError):
        S2VPipeline(networks, stop).encode_voice(recording, windows)
    modules = [module for network in networks.loaded.values() for module in network.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert isinstance(modules[0], nn.Module)


# --- what a clip hears ----------------------------------------------------------------------------------------------


def job_of(features: Tensor, seconds: float, video: VideoConfig) -> S2VConditioning:
    voice, text = Voice(Recording(torch.zeros(1, round(16000 * seconds)), 16000), features), torch.zeros(1, 3, 4)
    return make_conditioning(torch.zeros(64, 64, 3, dtype=torch.uint8), voice, text, text, video)


@given(
    frames=st.integers(6, 900),
    longer=st.floats(0, 0.05),
    fps=st.sampled_from([8, 12.5, 16, 24, 29.97, 30]),
    clip_frames=st.integers(5, 30),
    motion_frames=st.integers(1, 90),
    timing=st.sampled_from(["aligned", "reference"]),
    clip_plan=st.sampled_from(["audio", "reference"]),
    start=st.booleans(),
    hears_past=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_clip_hears_its_part_of_the_whole(
    frames, longer, fps, clip_frames, motion_frames, timing, clip_plan, start, hears_past
):
    """Bit by bit what it was when the embeddings of all frames were made at once."""
    video = VideoConfig(
        fps=fps,
        clip_frames=4 * clip_frames,
        motion_frames=motion_frames,
        timing=timing,
        clip_plan=clip_plan,
        starts_from_reference=start,
        hears_past=hears_past,
    )
    features = torch.randn(2, frames, 3)
    job = job_of(features, frames / 30 + 0.025 + longer, video)
    plan = job.plan
    whole = F.pad(audio_embeddings(features, 1, plan.total - plan.lead, fps), (plan.lead, 0))
    first = 0
    for clip, length in enumerate(plan.clip_frames):
        own, past = job.voice_of(clip)
        assert torch.equal(own, whole[..., first : first + length])
        if hears_past and first:
            assert torch.equal(past, whole[..., max(0, first - motion_frames) : first])
        else:
            assert past is None
        first += length
    assert first == whole.shape[-1]


def test_a_clip_takes_no_more_room_in_a_long_voice():
    peaks = []
    for seconds in (20, 400):
        job = job_of(torch.randn(4, 30 * seconds, 16), seconds, VideoConfig())
        with Live() as live:
            job.voice_of(2)
        peaks.append(live.peak)
    assert 0 < peaks[1] == peaks[0]
