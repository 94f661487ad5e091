"""What the pack carries along is there, can be used, and is what the scripts in demo/ make."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan_s2v_core.io.audio import read_recording
from wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from wan_s2v_core.pipeline import check_parts

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
LARGEST_BYTES = 7_000_000
ROUNDING = 2
"""Of 255: what another release of the drawing library may round differently, on average much less."""


@pytest.fixture(scope="module")
def assets():
    """The module demo/make_assets.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("make_assets", ROOT / "demo" / "make_assets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faces(assets):
    return importlib.import_module("faces")  # make_assets put demo/ on the path


@pytest.fixture
def pixels(assets):
    """Draw the portrait's face, with changes, small -> H W 3."""

    def draw(**changes) -> np.ndarray:
        return np.asarray(assets.draw_face(replace(assets.PORTRAIT_FACE, **changes), 128)).astype(int)

    return draw


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_everything_is_there_and_small(assets):
    assert {assets.PORTRAIT, assets.VOICE, "README.md"} <= {str(path) for path in files_of(ASSETS)}
    assert sum((ASSETS / path).stat().st_size for path in files_of(ASSETS)) < LARGEST_BYTES


def test_the_portrait_is_an_rgb_picture_of_usable_size(assets):
    with Image.open(ASSETS / assets.PORTRAIT) as picture:
        assert picture.mode == "RGB" and picture.size == (assets.PORTRAIT_PX,) * 2 and min(picture.size) >= 512


def test_the_portrait_is_what_the_script_draws(assets, tmp_path):
    assets.make_portrait(tmp_path / assets.PORTRAIT)
    drawn, kept = (np.asarray(Image.open(path / assets.PORTRAIT)).astype(int) for path in (tmp_path, ASSETS))
    assert np.abs(drawn - kept).mean() < 0.1
    assert (np.abs(drawn - kept) > ROUNDING).mean() < 0.002


def test_the_voice_is_speech_long_enough_for_two_clips(assets):
    recording = read_recording(ASSETS / assets.VOICE)
    assert 11 <= recording.seconds <= 13 and recording.samples.shape[0] == 1 and recording.rate_hz >= 22050
    assert recording.samples.abs().max() == pytest.approx(assets.PEAK, abs=0.002)
    loudness = recording.samples[0].unfold(0, recording.rate_hz // 10, recording.rate_hz // 10).square().mean(1).sqrt()
    assert (loudness > 0.02).float().mean() > 0.6  # most tenths of a second are sound
    assert recording.samples[0, [0, -1]].abs().max() < 1e-3


def test_levelling_gives_the_peak_and_quiet_ends(assets):
    samples = np.random.default_rng(0).normal(0.5, 0.1, 22050)
    levelled = assets.level(samples, 22050)
    assert levelled.dtype == np.int16 and abs(np.abs(levelled).max() - assets.PEAK * 32767) <= 1
    assert levelled[0] == levelled[-1] == 0 and abs(levelled.mean()) < 100


def test_flac_keeps_every_sample(assets, tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 30001).astype(np.int16)
    assets.write_flac(tmp_path / "noise.flac", samples, 22050)
    back = read_recording(tmp_path / "noise.flac")
    assert back.rate_hz == 22050
    np.testing.assert_array_equal((back.samples[0] * 32768).numpy(), samples)


def test_without_espeak_the_script_says_what_to_do(assets, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        assets.speak("Hello")


def test_the_checkpoint_has_all_parts(assets):
    check_parts(dict.fromkeys((DIT, TEXT_ENCODER, SPEECH_ENCODER, VAE), ASSETS / assets.CHECKPOINT))


def test_the_checkpoint_is_what_the_script_makes(assets, tiny_checkpoint):
    kept = ASSETS / assets.CHECKPOINT
    assert files_of(kept) == files_of(tiny_checkpoint)
    for path in files_of(kept):
        if path.suffix == ".pth":  # its wrapping may change with the version of torch, its weights may not
            old, new = (torch.load(folder / path, weights_only=True) for folder in (kept, tiny_checkpoint))
            assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old), path
        else:
            assert (kept / path).read_bytes() == (tiny_checkpoint / path).read_bytes(), path


def test_every_hair_style_draws_another_face(faces, pixels):
    drawn = [pixels(hair_style=style) for style in faces.HAIR_STYLES]
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(
    ("changes", "top", "bottom"),
    [({"mouth_opening": 0.6}, 0.55, 0.86), ({"mouth_rounding": 1.0}, 0.55, 0.72), ({"eye_openness": 0.0}, 0.38, 0.52)],
)
def test_a_part_of_the_face_moves_alone(pixels, changes, top, bottom):
    """Shares of the height between which rows may change; 128 px."""
    rows = np.abs(pixels(**changes) - pixels()).max(axis=(1, 2))
    changed = np.flatnonzero(rows > 3)
    assert len(changed) and changed[0] >= top * 128 and changed[-1] <= bottom * 128


def test_an_opening_mouth_shows_more_and_more_of_its_inside(pixels):
    differences = [np.abs(pixels(mouth_opening=share) - pixels()).sum() for share in (0.1, 0.3, 0.6, 1.0)]
    assert differences == sorted(differences)


def test_the_head_moves_by_its_offset(faces, pixels):
    shift = 10
    units = shift / (128 * faces.UNIT)
    still, moved = pixels(), pixels(offset=(units, 0.0))
    eyes = slice(50, 66)  # rows; a head that moved by 10 px looks the same 10 px further
    assert np.abs(moved[eyes, 40 + shift : 88 + shift] - still[eyes, 40:88]).mean() < 2
