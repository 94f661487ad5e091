"""Pictures, driving videos, clip plans and the timing of the voice."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from wan_s2v_core.conditioning.audio import voice_per_frame
from wan_s2v_core.conditioning.bundle import S2VConditioning, make_plan
from wan_s2v_core.conditioning.image import center_crop, fit_picture, read_picture, to_frames, to_pixels
from wan_s2v_core.conditioning.pose import pose_pixels
from wan_s2v_core.config import DEFAULT_NEGATIVE_PROMPT, VideoConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.geometry import FIRST_CLIP_SKIP, ClipGeometry, output_size, plan_clips
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.prepare import plan_loading

SIZES = [  # picture height and width, area -> height and width, as the reference gives them
    ((704, 1024), 720896, (704, 1024)),
    ((704, 1024), 399360, (512, 768)),
    ((1024, 704), 399360, (768, 512)),
    ((704, 1024), 4096, (64, 64)),
    ((704, 1024), 8192, (64, 128)),
]


@pytest.mark.parametrize(("picture", "area", "expected"), SIZES)
def test_sizes_of_the_reference(picture, area, expected):
    assert output_size(*picture, area) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(64 * 64, 1280 * 720))
def test_sizes_fit_the_area_and_the_step(height, width, area):
    assume(max(height, width) / min(height, width) < 4)
    out = output_size(height, width, area)
    assert out[0] * out[1] <= area and not out[0] % 64 and not out[1] % 64 and min(out) >= 64


def test_a_picture_too_long_is_named():
    with pytest.raises(ConfigError, match=r"4000x50 px.*Crop"):
        output_size(50, 4000, 4096)


@pytest.mark.parametrize("fit", ["crop", "pad", "reference"])
@pytest.mark.parametrize("picture", [(40, 90), (90, 40), (64, 64), (33, 47)])
def test_pictures_are_fitted(fit, picture):
    """A white picture: crop fills the frame; pad and reference leave black where it does not reach."""
    white = torch.full((*picture, 3), 255, dtype=torch.uint8)
    out = fit_picture(white, 64, 128, fit)
    assert out.shape == (1, 3, 1, 64, 128)
    if fit == "crop":
        assert (out == 1).all()
    else:
        assert set(out.unique().tolist()) <= {-1.0, 1.0}
    if fit == "pad":
        shown = (out[0, 0, 0] == 1).float().mean().item()
        scale = min(64 / picture[0], 128 / picture[1])
        assert shown == pytest.approx(round(picture[0] * scale) * round(picture[1] * scale) / (64 * 128))


def test_crop_keeps_the_middle():
    picture = torch.arange(5).repeat(3, 1)[..., None].expand(3, 5, 3).to(torch.uint8)
    assert center_crop(picture, 3, 3)[0, :, 0].tolist() == [1, 2, 3]
    assert center_crop(picture, 5, 5)[:, 2, 0].tolist() == [0, 2, 2, 2, 0]


def test_pixels_round_trip():
    frames = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    assert torch.equal(to_frames(to_pixels(frames).movedim(0, 1)), frames)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_pictures_of_any_mode(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (20, 30), (200, 100, 50)).convert(mode).save(path)
    picture = read_picture(path)
    assert picture.shape == (30, 20, 3) and picture.dtype == torch.uint8 and picture.any()


def test_transparency_is_black_and_rotation_is_undone(tmp_path):
    Image.new("RGBA", (20, 30), (255, 255, 255, 0)).save(tmp_path / "x.png")
    assert not read_picture(tmp_path / "x.png").any()
    turned = Image.new("RGB", (20, 30), "white")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").shape == (20, 30, 3)


def bad_pictures(folder):
    (folder / "text.png").write_text("no picture at all")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20000, 20)).save(folder / "line.png")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    return {
        "missing.png": "not there",
        "text.png": "cannot be read as a picture",
        "empty.png": "0 bytes",
        "cut.png": "cannot be read",
        "dot.png": "1x1 px; sides from 16",
        "line.png": "20000x20 px",
    }


def test_bad_pictures_are_named(tmp_path):
    for name, message in bad_pictures(tmp_path).items():
        with pytest.raises(ConfigError, match=message):
            read_picture(tmp_path / name)


# --- clips and time ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(frames=st.integers(1, 3000), quarter=st.integers(1, 30), skip=st.sampled_from([0, 3]))
def test_plans_cover_the_sound_and_waste_little(frames, quarter, skip):
    geometry = ClipGeometry(4 * quarter)
    plan = plan_clips(frames, geometry, skip, skip)
    assert plan.total - skip >= frames == plan.frames
    assert set(plan.clip_frames[:-1]) <= {geometry.clip_frames}
    assert (
        plan.clip_frames[-1] % 4 == 0 and min(20, geometry.clip_frames) <= plan.clip_frames[-1] <= geometry.clip_frames
    )
    assert plan.total - skip - frames < max(4, min(20, geometry.clip_frames)), "only the last clip is rounded up"


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.floats(0.5, 40),
    start=st.booleans(),
    timing=st.sampled_from(["aligned", "reference"]),
    clip_plan=st.sampled_from(["audio", "reference"]),
)
def test_the_voice_of_a_frame_is_heard_in_that_frame(seconds, start, timing, clip_plan):
    """A feature marked with its time reaches the frame that is shown at that time; 3 frames early as the reference."""
    video = VideoConfig(starts_from_reference=start, timing=timing, clip_plan=clip_plan)
    features = (torch.arange(int(seconds * 30)) / 30)[None, :, None]  # each holds its own time in seconds
    plan = make_plan(seconds, features.shape[1], video, ClipGeometry())
    voice = voice_per_frame(features, plan.total, video.fps, plan.lead)
    assert voice.shape[-1] == plan.total
    shown = voice[0, 0, 0, plan.skip : plan.skip + plan.frames]
    ahead = 0 if timing == "aligned" or start else FIRST_CLIP_SKIP
    for frame in range(1, plan.frames - ahead):
        time = (frame + ahead) / 16
        if time < seconds - 0.1:
            assert abs(shown[frame].item() - time) <= 0.5 / 30 + 1e-6
    if clip_plan == "audio":
        assert plan.frames == round(16 * seconds)
    if ahead == 0 and not start:
        assert plan.start(0) == -3 and not voice[..., :3].any(), "silence before time 0"


def test_fewer_clips_make_a_shorter_video():
    video = VideoConfig(clips=2)
    plan = make_plan(60.0, 1800, video, ClipGeometry())
    assert plan.clip_frames == (80, 80) and plan.frames == 157
    assert make_plan(3.0, 90, video, ClipGeometry()).frames == 48


def test_the_pose_goes_on_from_clip_to_clip():
    """Clip r is driven by the frames of its own time; before time 0 the first is held, past the end it is black."""
    from wan_s2v_core.pipeline import S2VPipeline

    video = VideoConfig(clip_frames=20, fps=16)
    geometry = ClipGeometry(20, 73)
    plan = make_plan(3.0, 90, video, geometry)
    driving = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 16, 16, 3) * 8
    seen = []

    class Pixels(S2VPipeline):
        def encode(self, pixels):
            seen.append(pixels)
            return pixels[:, :, ::4]

    job = S2VConditioning(
        plan=plan,
        geometry=geometry,
        video=video,
        recording=Recording(torch.zeros(1, 48000), 16000),
        reference=torch.zeros(1, 3, 1, 16, 16),
        features=torch.zeros(1, 1, 1),
        text=torch.zeros(1),
        negative_text=torch.zeros(1),
        pose=lambda start, frames: driving[start : start + frames],
    )
    pipeline = Pixels(CheckpointNetworks(Checkpoint({}), plan_loading("auto", torch.device("cpu"))))
    latents = [pipeline.encode_pose(job, clip) for clip in range(3)]
    assert [tuple(x.shape[2:]) for x in latents] == [
        (5, 16, 16),
        (5, 16, 16),
        (3 if plan.clip_frames[2] == 12 else 5, 16, 16),
    ]
    expected = [0, 0, 0, 0, *range(17)], [17, *range(17, 30)]
    for pixels, numbers in zip(seen, expected, strict=False):
        shown = ((pixels[0, 0, :, 8, 8] + 1) * 127.5 / 8).round().tolist()
        assert shown[: len(numbers)] == numbers
        assert not any(shown[len(numbers) :]), "black past the end"
    assert (seen[2] == -1).all()
    assert pipeline.encode_pose(replace(job, pose=None), 0) is None


def test_pose_is_cropped_to_the_frame():
    frames = torch.full((3, 10, 40, 3), 255, dtype=torch.uint8)
    assert (pose_pixels(frames, 3, 64, 64) == 1).all()


def test_the_negative_prompt_is_the_references(golden):
    manifest = json.loads((golden / "manifest_s2v_14b.json").read_text(encoding="utf-8"))
    assert manifest["inference_defaults"]["sample_neg_prompt"] == DEFAULT_NEGATIVE_PROMPT
