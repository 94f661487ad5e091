"""The golden check catches faults: each one planted here makes some quantity leave its limit.

Faults are small and plausible, of the kind that a rewrite or a speed-up brings in without an error message.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from wan_s2v_core import clip_denoiser, verify
from wan_s2v_core.conditioning import audio as conditioning_audio
from wan_s2v_core.model import audio, audio_encoder, block, dit, motion, pointwise, rope, text_encoder, vae
from wan_s2v_core.sampling import clips, schedule, solvers

DIT, PIPELINE, SPEECH = "dit_tiny_b_motion73", "pipeline_tiny_pose_dpmpp", "audio_tiny"
UNIPC, DPM, TEXT, VIDEO = "scheduler_unipc", "scheduler_dpmpp", "t5_tiny", "vae_tiny"


def rope_positions(change):
    original = rope.segment_positions

    def changed(start, extent, counts):
        return change(start, original(start, extent, counts))

    return rope, "segment_positions", changed


def moved_quarter_bucket(start, positions):
    if start == -19:
        positions[:, 0] = -16 + positions[:, 0].argsort(kind="stable") // (len(positions) // 4)
    return positions


def swapped_arguments(function, first, second):
    def changed(*arguments):
        arguments = list(arguments)
        arguments[first], arguments[second] = arguments[second], arguments[first]
        return function(*arguments)

    return changed


def voiced_silence(inputs, negative_text, branch):
    return replace(ORIGINAL_INPUTS(inputs, negative_text, branch), audio=inputs.audio)


ORIGINAL_INPUTS = clip_denoiser.branch_inputs


def zero_padded(self, x):
    return torch.nn.Conv1d.forward(self, F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def padding_token_first(self, features):
    tokens, vectors = ORIGINAL_AUDIO(self, features)
    return torch.cat([tokens[:, :, -1:], tokens[:, :, :-1]], dim=2), vectors


ORIGINAL_AUDIO = audio.CausalAudioEncoder.forward


def scale_first(self, audio_frames):
    shift, gain = ORIGINAL_MODULATION(self, audio_frames)
    return gain - 1, shift + 1


ORIGINAL_MODULATION = audio.AudioInjector.frame_modulation


def no_lead_in(self, features, motion_frames, past=None):
    return self(features)


def oldest_first(self, motion_latents):
    return ORIGINAL_PACKER(self, motion_latents.flip(2))


ORIGINAL_PACKER = motion.MotionPacker.forward


def columns_first(x, ropes):
    return ORIGINAL_ROTATE(x, ropes.flip(-1))


ORIGINAL_ROTATE = pointwise.Pointwise.rotate


def other_eps(x, shift, scale, eps):
    return ORIGINAL_NORM(x, shift, scale, 1e-4)


ORIGINAL_NORM = pointwise.norm_rows


def all_tokens_timed(self, timestep):
    time, rows = ORIGINAL_TIME(self, timestep)
    return time, rows[:, :1].expand_as(rows)


ORIGINAL_TIME = dit.S2VTransformer.embed_time


def sines_first(timestep, width):
    half = width // 2
    angles = torch.tensor(timestep) * 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    return torch.cat([angles.sin(), angles.cos()])


def channels_slowest(patches, grid):
    x = patches.unflatten(1, grid).unflatten(-1, (-1, 2, 2))
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def exact_gelu(self, x):
    return self.down(F.gelu(self.up(x)))


def raw_last_layer(self, waveform):
    samples = audio_encoder.normalize_waveform(waveform.float())[None]
    out = self.network(samples, output_hidden_states=True)
    normed = torch.cat(out.hidden_states[:-1])
    return torch.cat([normed, normed[-1:]])


def sample_variance(waveform):
    return (waveform - waveform.mean(-1, keepdim=True)) / waveform.std(-1, keepdim=True) * (1 + 1e-5)


def halves_up(values):
    return torch.floor(torch.as_tensor(values) + 0.5).numpy()


def encoded_past_the_end(features, clips_, clip_frames, fps, neighbours=0, rate=30):
    picked = torch.from_numpy(conditioning_audio.frame_indices(features.shape[1], clips_ * clip_frames, fps))
    return features[:, picked.clamp(max=features.shape[1] - 1)].transpose(1, 2)[None]


def no_correction(self, i, start, cleans, clean):
    return self._first_order(i, start, cleans[-1])[0]


def unnormalised(self, video):
    return self.network.encode(video).latent_dist.mode()


def unmasked(self, ids, mask):
    return self.network(input_ids=ids).last_hidden_state


FAULTS = {
    "rotary times of the quarter bucket": (DIT, rope_positions(moved_quarter_bucket)),
    "rotary time of the picture": (DIT, (rope, "REFERENCE_TIME", 31)),
    "rotary axes in another order": (DIT, (pointwise.Pointwise, "rotate", staticmethod(columns_first))),
    "eps of the block norms": (DIT, (pointwise, "norm_rows", other_eps)),
    "shift and scale swapped": (DIT, (pointwise, "norm_rows", swapped_arguments(pointwise.norm_rows, 1, 2))),
    "shift and scale of the injection swapped": (DIT, (audio.AudioInjector, "frame_modulation", scale_first)),
    "zeros instead of repeated audio before the start": (DIT, (audio.CausalConv, "forward", zero_padded)),
    "audio padding token first": (DIT, (audio.CausalAudioEncoder, "forward", padding_token_first)),
    "no lead-in before a clip's audio": (DIT, (audio.CausalAudioEncoder, "encode_clip", no_lead_in)),
    "motion packed from the wrong end": (DIT, (motion.MotionPacker, "forward", oldest_first)),
    "segments marked the other way round": (DIT, (dit, "REFERENCE", 2)),
    "picture and motion given the noise level": (DIT, (dit.S2VTransformer, "embed_time", all_tokens_timed)),
    "sines before cosines": (DIT, (dit, "timestep_features", sines_first)),
    "patches with channels slowest": (DIT, (dit, "unpatchify", channels_slowest)),
    "exact GELU": (DIT, (block.FeedForward, "forward", exact_gelu)),
    "silence that is not silent": (PIPELINE, (clip_denoiser, "branch_inputs", voiced_silence)),
    "start picture one frame short": (PIPELINE, (clips, "START_PICTURE_FRAMES", 5)),
    "last speech layer without its norm": (SPEECH, (audio_encoder.SpeechEncoder, "hidden_states", raw_last_layer)),
    "sample variance of the waveform": (SPEECH, (verify, "normalize_waveform", sample_variance)),
    "halves rounded up": (SPEECH, (conditioning_audio.np, "round", halves_up)),
    "speech repeated past the end": (SPEECH, (verify, "audio_embeddings", encoded_past_the_end)),
    "UniPC from pure noise": (UNIPC, (schedule, "UNIPC_START", 0.9999)),
    "UniPC without corrector": (UNIPC, (solvers.UniPC, "_correct", no_correction)),
    "DPM++ from below pure noise": (DPM, (schedule, "shift_sigmas", lambda s, shift: shift * s / (1 + shift * s))),
    "latents not normalised": (VIDEO, (vae.VideoVAE, "encode", unnormalised)),
    "padding tokens attended to": (TEXT, (text_encoder.TextEncoder, "encode_ids", unmasked)),
}


def run(golden, case):
    path = golden / f"{case}.safetensors"
    return list(verify.run_case(path, golden, torch.device("cpu")))


@pytest.fixture(autouse=True)
def fresh_tables():
    yield
    rope.rotary_table.cache_clear()
    dit.timestep_features.cache_clear()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(golden, monkeypatch, fault):
    case, change = FAULTS[fault]
    rope.rotary_table.cache_clear()
    assert all(result.passed for result in run(golden, case)), "the case must pass without the fault"
    rope.rotary_table.cache_clear()
    monkeypatch.setattr(*change)
    caught = [result for result in run(golden, case) if not result.passed]
    assert caught, f"nothing noticed: {fault}"
    assert all(result.quantity != "run" for result in caught), f"crashed instead: {caught[0].reason}"
