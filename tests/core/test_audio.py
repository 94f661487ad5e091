"""Speech features to embeddings per video frame, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.conditioning.audio import audio_embeddings, clip_count, frame_indices, resample_features
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.model.audio_encoder import SpeechEncoder, normalize_waveform

SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}


@pytest.mark.parametrize("kind", [{}, LARGE], ids=["base", "large"])
def test_hidden_states_are_those_of_the_layers(kind, fresh_seed):
    """Each entry is what its layer gave; the last has passed the final norm where the model has one.

    Read off the layers by hooks, so it holds for every version of transformers.
    """
    encoder = SpeechEncoder(SETTINGS | kind)
    fill_random(encoder, fresh_seed)
    inner, seen = encoder.network.encoder, []
    inner.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for layer in inner.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        states = encoder.hidden_states(torch.randn(6000))
        if kind:
            seen[-1] = inner.layer_norm(seen[-1])
    torch.testing.assert_close(states, torch.cat(seen), atol=1e-6, rtol=0)
    assert len(states) == SETTINGS["num_hidden_layers"] + 1


def test_loudness_and_offset_of_the_recording_do_not_matter():
    wave = torch.randn(16000)
    torch.testing.assert_close(normalize_waveform(3 * wave + 0.2), normalize_waveform(wave), atol=1e-5, rtol=0)
    assert not normalize_waveform(torch.zeros(16000)).any(), "silence stays silent and finite"


def test_resampling_keeps_the_ends():
    states = torch.randn(3, 205, 8)
    features = resample_features(states, 50)
    assert features.shape == (3, 122, 8)  # 205 / 50 * 30 in floats is just under 123
    torch.testing.assert_close(features[:, [0, -1]], states[:, [0, -1]])


def test_the_shortest_recording_has_one_feature():
    states = torch.randn(3, 1, 8)  # 25 to 45 ms at 50 Hz, less than a feature at 30 Hz
    assert torch.equal(resample_features(states, 50), states)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 400),
    fps=st.sampled_from([8, 16, 24, 25, 30]),
    clip_frames=st.integers(4, 100),
    neighbours=st.integers(0, 2),
)
def test_embeddings_equal_a_plain_loop(frames, fps, clip_frames, neighbours):
    features = torch.arange(1, frames + 1, dtype=torch.float32)[None, :, None].expand(2, -1, 3)
    clips = clip_count(frames, clip_frames, fps)
    total = clips * clip_frames
    got = audio_embeddings(features, clips, clip_frames, fps, neighbours)
    assert got.shape == (1, 2, 3 * (2 * neighbours + 1), total)
    assert total / fps * 30 >= frames, "the clips cover the recording"
    times = np.linspace(0, total / fps, total, endpoint=False)
    for index in range(total):
        centre = min(max(round(times[index] * 30), 0), math.ceil(total / fps * 30) - 1)  # round: halves to even
        window = [
            0.0 if centre >= frames else features[0, min(max(centre + k * int(30 / fps), 0), frames - 1), 0].item()
            for k in range(-neighbours, neighbours + 1)
        ]
        assert got[0, 0, ::3, index].tolist() == window


def test_indices_follow_the_clock():
    indices = frame_indices(1000, 160, 16)
    assert indices[0] == 0 and indices[16] == 30 and indices[80] == 150
    assert (np.diff(indices) >= 1).all()


def level_db(samples: torch.Tensor) -> float:
    return 10 * math.log10(float(samples.double().square().mean()))


@given(gain_db=st.floats(-60, 60), channels=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_gain_is_in_decibels(gain_db, channels):
    recording = Recording(0.1 * torch.randn(channels, 800), 16000)
    louder = recording.amplified(gain_db)
    assert louder.rate_hz == 16000 and louder.samples.dtype == torch.float32
    assert level_db(louder.samples) - level_db(recording.samples) == pytest.approx(gain_db, abs=1e-4)
    torch.testing.assert_close(louder.amplified(-gain_db).samples, recording.samples)


@pytest.mark.parametrize("gain_db", [-60.1, 61.0, math.inf, math.nan])
def test_gains_that_cannot_be_meant(gain_db):
    with pytest.raises(ConfigError, match="gain_db="):
        Recording(torch.randn(1, 800), 16000).amplified(gain_db)


def test_gain_beyond_full_scale_is_kept_and_told(caplog):
    recording = Recording(torch.tensor([[0.5, -0.6, 0.1, 0.0]]), 16000)
    assert float(recording.amplified(6.0).samples.min()) < -1
    assert "1 of 4 samples exceed full scale" in caplog.text
    assert recording.amplified(0.0) is recording


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_levelled_speech_has_one_level(scale):
    even = torch.sin(torch.arange(16000) * 0.3)[None]
    assert level_db(Recording(scale * even, 16000).levelled().samples) == pytest.approx(-20, abs=1e-3)
    spiky = even.clone()
    spiky[0, 100] = 40.0  # RMS alone would put this peak beyond full scale
    made = Recording(scale * spiky, 16000).levelled().samples
    assert 20 * math.log10(float(made.abs().max())) == pytest.approx(-1, abs=1e-3) and level_db(made) < -20
    torch.testing.assert_close(made / made[0, 100], spiky / 40, msg="one gain for all of it")


def test_silence_stays_silent():
    assert not Recording(torch.zeros(2, 100), 16000).levelled().samples.any()
    faint = Recording(torch.full((1, 100), 1e-6), 16000).levelled().samples
    torch.testing.assert_close(faint, torch.full((1, 100), 1e-3), msg="raised by 60 dB at most")


@pytest.mark.parametrize("gain_db", [-24.0, -6.0, 12.0, 40.0])
def test_features_do_not_depend_on_a_constant_gain(gain_db, fresh_seed):
    """So lips do not either: the encoder sees zero mean and unit variance, up to 1e-7 added to the variance."""
    encoder = SpeechEncoder(SETTINGS | LARGE)
    fill_random(encoder, fresh_seed)
    recording = Recording(0.2 * torch.randn(1, 16000), 16000)
    with torch.inference_mode():
        expected = encoder.hidden_states(recording.speech())
        found = encoder.hidden_states(recording.amplified(gain_db).speech())
        levelled = encoder.hidden_states(recording.levelled().speech())
    for states in (found, levelled):
        assert float((states - expected).norm() / expected.norm()) < 1e-3
