"""Speech features to embeddings per video frame, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.conditioning.audio import audio_embeddings, clip_count, frame_indices, resample_features
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
