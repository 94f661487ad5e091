"""Scenes for the demo model: mouths follow the voice, drawing is quick and right, everything is repeatable."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"
FRAMES = 48
RATE = 16000


@pytest.fixture(scope="module")
def scenes():
    """The module demo/scenes.py, which is no part of a package."""
    if str(DEMO) not in sys.path:
        sys.path.append(str(DEMO))
    return importlib.import_module("scenes")


@pytest.fixture(scope="module")
def voices(scenes):
    return importlib.import_module("voices")


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """Something like speech: a buzz with formants in syllables, and pauses; 8 s."""
    rng = np.random.default_rng(1)
    time = np.arange(8 * RATE) / RATE
    pitch = 120 * (1 + 0.1 * np.sin(2 * np.pi * 0.4 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formant = np.interp(time, np.linspace(0, 8, 25), rng.uniform(400, 2200, 25))
    buzz = sum(np.sin(n * phase) * np.exp(-(((n * pitch - formant) / 500) ** 2)) for n in range(1, 25))
    loudness = np.interp(time, np.linspace(0, 8, 57), rng.uniform(0, 1, 57) ** 2 * rng.choice((0, 1), 57, p=(0.2, 0.8)))
    return (0.3 * buzz * loudness).astype(np.float32)


@pytest.fixture(scope="module")
def scene(scenes, voice):
    return scenes.make_scene(3, voice, FRAMES, start_frame=8)


@pytest.fixture(scope="module")
def drawn(scenes, scene) -> np.ndarray:
    return scenes.draw_scene(scene)


def openings(scene) -> np.ndarray:
    return np.array([face.mouth_opening for face in scene.frames])


def gap_heights(scenes, scene, drawn: np.ndarray) -> np.ndarray:
    """Pixels between the lips in the middle of the mouth, counted by their colour."""
    inside = np.array([(86, 24, 30), (188, 82, 86), (250, 246, 240)], float)
    outside = np.array([scene.face.skin, scene.face.lips, scenes.faces.shade(scene.face.lips, 0.17)], float)
    heights = []
    for face, picture in zip(scene.frames, drawn, strict=True):
        canvas = scenes.Canvas(picture.shape[0])
        canvas.move_head(face)
        column, row = canvas.pixels(np.array([[0.0, scenes.faces.MOUTH_Y]]))[0].round().astype(int)
        strip = picture[row - 10 : row + 32, column - 3 : column + 4].astype(float)
        nearest = [np.abs(strip[..., None, :] - colours).sum(-1).min(-1) for colours in (inside, outside)]
        heights.append((nearest[0] < nearest[1]).sum() / strip.shape[1])
    return np.array(heights)


def test_the_same_seed_gives_the_same_scene(scenes, voice, scene):
    assert scenes.make_scene(3, voice, FRAMES, start_frame=8) == scene
    assert scenes.make_scene(4, voice, FRAMES, start_frame=8).face != scene.face


def test_a_stretch_of_a_scene_is_the_same_as_in_the_whole(scenes, voice, scene):
    whole = scenes.make_scene(3, voice, FRAMES + 20, start_frame=-2)
    for a, b in zip(whole.frames[10:], scene.frames, strict=False):
        assert (a.mouth_opening, a.mouth_rounding) == pytest.approx((b.mouth_opening, b.mouth_rounding))
        assert replace(a, mouth_opening=0, mouth_rounding=0) == replace(b, mouth_opening=0, mouth_rounding=0)


def test_the_mouth_follows_the_envelope(scenes, voice, scene):
    loudness = scenes.envelope(voice, FRAMES, 8)
    assert np.corrcoef(openings(scene), loudness)[0, 1] >= 0.97
    order = np.argsort(loudness)
    assert (np.diff(openings(scene)[order]) >= 0).all()  # louder is never less open
    assert openings(scene).max() <= 1 and openings(scene).max() > 0.5


def test_the_drawn_mouth_follows_the_envelope(scenes, voice, scene, drawn):
    measured = gap_heights(scenes, scene, drawn)
    assert np.corrcoef(measured, scenes.envelope(voice, FRAMES, 8))[0, 1] >= 0.95


def test_the_envelope_is_the_rms_of_each_frames_own_interval(scenes, voice):
    got = scenes.envelope(voice, 6, start_frame=-1)
    expected = [np.sqrt(np.mean(voice[k * 1000 : (k + 1) * 1000].astype(float) ** 2)) for k in range(5)]
    np.testing.assert_allclose(got, [0.0, *expected], rtol=1e-5, atol=1e-9)
    assert scenes.envelope(voice, 4, start_frame=8 * 16).tolist() == [0.0] * 4


@pytest.mark.parametrize("sound", [np.zeros(RATE, np.float32), np.zeros(0, np.float32), np.full(RATE, 1e-5)])
def test_in_silence_the_mouth_is_closed(scenes, sound):
    assert openings(scenes.make_scene(0, sound, 16)).max() < 0.02


def test_loudness_of_the_recording_does_not_matter(scenes, voice):
    quiet = scenes.make_scene(3, 0.1 * voice, FRAMES, start_frame=8)
    np.testing.assert_allclose(openings(quiet), openings(scenes.make_scene(3, voice, FRAMES, 8)), atol=1e-4)


def test_dark_sounds_round_the_lips(scenes):
    time = np.arange(2 * RATE) / RATE
    low, high = (np.sin(2 * np.pi * hz * time) * 0.3 for hz in (250, 3500))
    rounding = [scenes.mouth_roundings(sound, 20, 4).mean() for sound in (low, high)]
    assert rounding[0] > 0.4 and rounding[1] < 0.05


def test_eyes_blink_and_heads_sway_a_little(scenes, voice):
    frames = scenes.make_scene(5, voice, 160).frames
    shut = sum(face.eye_openness < 0.2 for face in frames)
    assert 2 <= shut <= 16
    assert 0 < np.ptp([face.offset[0] for face in frames]) < 0.2
    steps = np.abs(np.diff([face.offset for face in frames], axis=0))
    assert steps.max() < 0.015


def test_pictures_have_shape_and_type(scenes, drawn, scene):
    assert drawn.shape == (FRAMES, 256, 256, 3) and drawn.dtype == np.uint8
    small = scenes.draw_scene(replace(scene, frames=scene.frames[:2]), size_px=128, supersample=1)
    assert small.shape == (2, 128, 128, 3)


@pytest.mark.parametrize("style", ["long", "bob", "bun", "short", "curly", "bald"])
def test_putting_together_gives_what_drawing_gives(scenes, style):
    """A head that stands still, in a state that needs no rounding."""
    face, _ = scenes.make_look(2)
    states = {
        "mouth_opening": 12 / scenes.OPENING_STEPS,
        "mouth_rounding": 2 / scenes.ROUNDING_STEPS,
        "eye_openness": 7 / scenes.EYE_STEPS,
        "brow_raise": 3 / scenes.BROW_STEPS,
        "gaze": (0.35, 0.0),
    }
    still = replace(face, hair_style=style, **states)
    expected = np.asarray(scenes.faces.draw_face(still, 256, supersample=2)).astype(int)
    got = scenes.Look(still, 256, supersample=2).draw(still).astype(int)
    assert np.abs(got - expected).mean() < 0.6
    assert (np.abs(got - expected).max(-1) > 24).mean() < 1e-3
    seam = round(256 * (scenes.CENTRE[1] + scenes.SEAM_Y * scenes.UNIT))
    across = (got - expected)[seam - 3 : seam + 3, 90:166].mean((1, 2))
    assert np.abs(np.diff(across)).max() < 0.5  # no step where the two parts meet


def test_moving_frames_are_close_to_drawn_ones(scenes, scene, drawn):
    for k in (3, 20, 41):
        expected = np.asarray(scenes.faces.draw_face(scene.frames[k], 256, supersample=2)).astype(int)
        assert np.abs(drawn[k] - expected).mean() < 2


def test_no_frame_shows_an_edge_of_a_layer(scenes, scene):
    """The shoulders leave the picture at its bottom, also when the head is high."""
    high = replace(scene.frames[0], offset=(0.1, -0.1))
    bottom = scenes.draw_scene(replace(scene, frames=(high,)))[0, -3:, 100:156].astype(int)
    assert np.abs(np.diff(bottom, axis=0)).max() < 12


def test_the_prompt_names_the_look(scenes):
    looks = [scenes.make_look(seed) for seed in range(60)]
    for face, prompt in looks:
        words = ("bald",) if face.hair_style == "bald" else (scenes.STYLE_WORDS[face.hair_style], "hair")
        assert all(word in prompt for word in (*words, "eyes", "shirt", "talks to the camera", "background"))
        (shirt,) = (name for name in scenes.CLOTHES if f" a {name} shirt" in prompt)
        assert np.abs(np.subtract(face.clothes, scenes.CLOTHES[shirt])).max() <= 8
    assert len({prompt for _, prompt in looks}) > 50
    assert {face.hair_style for face, _ in looks} == set(scenes.faces.HAIR_STYLES)


def test_the_driving_video_is_at_the_same_places(scenes, scene):
    poses = scenes.draw_pose(scene)
    assert poses.shape == (FRAMES, 256, 256, 3) and poses.dtype == np.uint8
    assert (poses[:, :4] == 0).all()  # lines on black
    for face, pose in zip(scene.frames[::8], poses[::8], strict=True):
        canvas = scenes.Canvas(256)
        canvas.move_head(face)
        mouth = scenes.faces.mouth_shape(face)
        middle = canvas.pixels(np.array([[0.0, (mouth.top + mouth.bottom) / 2]]))[0]
        red = (pose[..., 0] > 120) & (pose[..., 1] < 120)
        rows, columns = np.nonzero(red)
        assert abs(columns.mean() - middle[0]) < 2 and rows.min() - 3 <= middle[1] <= rows.max() + 3


def test_companding_keeps_sound_and_silence(voices, voice, tmp_path):
    sound = voices.finished(voice.copy())
    voices.save_voices(tmp_path / "voices.npz", [sound, np.zeros(100, np.float32)])
    first, second = voices.load_voices(tmp_path / "voices.npz")
    assert first.dtype == np.float32 and first.shape == sound.shape and not second.any()
    assert np.square(first - sound).mean() < 1e-3 * np.square(sound).mean()


def test_augmenting_gives_another_sound_of_the_same_length(voices, voice):
    first, again, other = (voices.augment(voice, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == voice.shape and first.dtype == np.float32 and not np.array_equal(first, other)
    for seed in range(10):
        changed = voices.augment(voice, np.random.default_rng(seed))
        assert np.isfinite(changed).all() and 0.01 < np.abs(changed).max() < 1
    assert not voices.augment(np.zeros(500, np.float32), np.random.default_rng(0)).any()


def test_without_espeak_the_maker_says_what_to_do(voices, monkeypatch):
    monkeypatch.setattr(voices.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        voices.Speaker("en").say("Hello")
