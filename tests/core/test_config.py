"""Settings and geometry: they survive JSON, and mistakes are named with a way out."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wan_s2v_core.config import (
    AccelerationPlan,
    ExpertRouting,
    MemoryLimits,
    S2VModelConfig,
    SamplingConfig,
    VideoConfig,
)
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.geometry import ClipGeometry, frames_of, latent_frames_of
from wan_s2v_core.prepare import LoadPlan, plan_loading

SPARSE = AccelerationPlan(sparse_keep=0.5, attention="sdpa")


@pytest.mark.parametrize(
    "config",
    [
        S2VModelConfig(),
        SamplingConfig(steps=8, audio_guidance_scale=2.0),
        SamplingConfig(timesteps=(1000, 750.5, 0.1)),
        plan_loading("auto", torch.device("cpu")),
        plan_loading("float8-weights", "cpu", SPARSE, "float8-weights"),
        LoadPlan("int8", "cuda:1", in_float16=True),
    ],
)
def test_configs_survive_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2VModelConfig(heads=7), "heads=7"),
        (lambda: S2VModelConfig(width=42, heads=3), "multiple of 4"),
        (lambda: S2VModelConfig(injected_blocks=(4, 4)), "injected_blocks"),
        (lambda: S2VModelConfig(injected_blocks=(0, 40)), "blocks=40"),
        (lambda: SamplingConfig(steps=0), "steps=0"),
        (lambda: SamplingConfig(seed=2**64), "seed=18446744073709551616 is above 18446744073709551615"),
        (lambda: SamplingConfig(seed=-7), "seed=-7 is below 0"),
        (lambda: SamplingConfig(steps=10**30), "steps=10{30} is above 1000"),
        (lambda: SamplingConfig(shift=1e308), "shift=1e.308"),
        (lambda: SamplingConfig(guidance_scale=float("nan")), "guidance_scale=nan is no number"),
        (lambda: VideoConfig(max_area=10**40), "max_area=10{40} is above"),
        (lambda: VideoConfig(clip_frames=4000), "clip_frames=4000 is above 400"),
        (lambda: VideoConfig(clips=10**20), "clips=10{20} is above"),
        (lambda: MemoryLimits(vram_limit_gb=1e308), "vram_limit_gb=1e.308"),
        (lambda: MemoryLimits(tile_px=8 * 10**20), "tile_px=80{20} is above"),
        (lambda: ExpertRouting(expert_capacity=10**20), "expert_capacity=10{20} is above"),
        (lambda: AccelerationPlan(sparse_dense_steps=10**20), "sparse_dense_steps=10{20} is above"),
        (lambda: SamplingConfig(shift=0), "shift=0"),
        (lambda: SamplingConfig(shift=float("nan")), "shift=nan"),
        (lambda: SamplingConfig(solver="heun"), "solver='heun'.*unipc"),
        (lambda: SamplingConfig(spacing="log"), "spacing='log'.*karras"),
        (lambda: SamplingConfig(timesteps=()), r"timesteps=\(\) are no numbers. Use such as 1000, 750"),
        (lambda: SamplingConfig(timesteps=7), "timesteps=7 are no numbers"),
        (lambda: SamplingConfig(timesteps=(1000, "x")), "timestep=x is no number. Use such as"),
        (lambda: SamplingConfig(timesteps=(1000.5, 3)), "timestep=1000.5 is above 1000. Use such as"),
        (lambda: SamplingConfig(timesteps=(1000, 0)), "timestep=0 is below 0.01. Use such as"),
        (lambda: SamplingConfig(timesteps=(500, 750)), "timesteps 500, 750 do not fall.*Use such as"),
        (lambda: SamplingConfig(timesteps=(500, 500)), "timesteps 500, 500 do not fall.*0.01 lower"),
        (lambda: SamplingConfig(timesteps=(9, float("nan"))), "timestep=nan is no number"),
        (lambda: SamplingConfig(timesteps=(9, 8), steps=8), "steps=8 with 2 timesteps.*Give one of the two"),
        (lambda: SamplingConfig(timesteps=(9,), spacing="karras"), "spacing='karras' with 1 timesteps"),
        (lambda: SamplingConfig(timesteps=tuple(range(1001, 0, -1))), "timestep=1001"),
        (lambda: SamplingConfig(guidance_scale=0.5), "guidance_scale=0.5"),
        (lambda: SamplingConfig(audio_guidance_scale=float("inf")), "audio_guidance_scale=inf"),
        (lambda: SamplingConfig.from_dict({"stepz": 4}), "stepz.*steps"),
        (lambda: LoadPlan.from_dict({"precision": "int3", "device": "cpu"}), "precision='int3'.*bfloat16"),
        (lambda: ClipGeometry(81), "clip_frames=81.*80 or 84"),
        (lambda: ClipGeometry(0), "clip_frames=0"),
        (lambda: ClipGeometry(80, 0), "motion_frames=0"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@given(st.integers(1, 10**6))
def test_latent_frames_and_frames_are_inverse(latent_frames):
    assert latent_frames_of(frames_of(latent_frames)) == latent_frames
    assert latent_frames_of(frames_of(latent_frames + 1)) == latent_frames + 1
    assert latent_frames_of(frames_of(latent_frames) + 3) == latent_frames, "the last latent frame is filled up"


def test_the_released_geometry():
    geometry = ClipGeometry()
    assert (geometry.latent_frames, geometry.motion_latent_frames) == (20, 19)


@given(st.integers(1, 60), st.integers(1, 40))
def test_a_clip_decodes_to_enough_frames(quarter, motion_latents):
    """Motion and new latents together hold at least the clip's frames, and the first clip those without its skip."""
    geometry = ClipGeometry(4 * quarter, frames_of(motion_latents))
    assert geometry.motion_latent_frames == motion_latents
    assert frames_of(motion_latents + geometry.latent_frames) == geometry.motion_frames + geometry.clip_frames
    assert frames_of(1 + geometry.latent_frames) == geometry.clip_frames + 1
