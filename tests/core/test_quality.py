"""Quality measures: planted faults are found and sized, what cannot be measured says why."""

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wan_s2v_core.assets import VOICE, embedded
from wan_s2v_core.bench import likeness
from wan_s2v_core.bench.clip_borders import ClipLengths, clip_lengths
from wan_s2v_core.bench.head import HeadTracker
from wan_s2v_core.bench.lip_sync import MOST_LAG_FRAMES, compare, voice_envelope
from wan_s2v_core.bench.lpips import LAYERS, alexnet_lpips
from wan_s2v_core.bench.mouth import RestlessnessMap
from wan_s2v_core.bench.opening import MouthPictures
from wan_s2v_core.bench.pictures import planes
from wan_s2v_core.bench.quality import QualityRequest, measure
from wan_s2v_core.errors import CheckpointError, ConfigError
from wan_s2v_core.io.audio import Recording, read_recording
from wan_s2v_core.io.video import VideoWriter, frames_of, read_header

ROOT = Path(__file__).resolve().parents[2]
FPS, FRAMES, SIZE = 16, 96, 192
RATE = 16000
KEYS = {"lip_sync_correlation", "lip_sync_lag_ms", "identity_drift", "seam_jump", "flicker", "reasons"}


@pytest.fixture(scope="module")
def faces():
    """The module demo/faces.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("faces", ROOT / "demo" / "faces.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["faces"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def babble(seed: int, seconds: float) -> Recording:
    """Noise in syllables of changing loudness, with pauses."""
    chance = np.random.default_rng(seed)
    loudness = []
    while len(loudness) < seconds * RATE:
        syllable = np.hanning(chance.integers(RATE // 8, RATE // 3)) * chance.uniform(0.2, 1)
        loudness += [*syllable, *np.zeros(chance.integers(0, RATE // 6))]
    loudness = np.array(loudness[: round(seconds * RATE)])
    return Recording(torch.from_numpy(loudness * chance.normal(size=len(loudness)) * 0.2).float()[None], RATE)


def envelope_of(recording: Recording, frames: int = FRAMES) -> np.ndarray:
    edges = np.arange(frames + 1) * recording.rate_hz // FPS
    samples = recording.samples[0].double().numpy()
    return np.array([np.sqrt((samples[a:b] ** 2).mean()) for a, b in pairwise(edges)])


def write_video(path: Path, frames: Tensor, recording: Recording | None = None, **options) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], FPS, recording, **options) as writer:
        writer.write(frames)
    return path


def write_sound(path: Path, recording: Recording) -> Path:
    """A lossless film with this sound; --audio takes those too."""
    frames = torch.zeros(int(recording.seconds * FPS), 16, 16, 3, dtype=torch.uint8)
    return write_video(path, frames, recording, preset="lossless-mkv")


def shifted(recording: Recording, frames: int) -> Recording:
    """Later by so many frames: a picture made for the original comes early."""
    return Recording(torch.roll(recording.samples, frames * recording.rate_hz // FPS, 1), recording.rate_hz)


@pytest.fixture(scope="module")
def voice() -> Recording:
    return read_recording(embedded(VOICE), 0.5, FRAMES / FPS)


def draw_talk(faces, envelope: np.ndarray, **features) -> Tensor:
    """T H W 3: a face that sways, blinks and follows the voice."""
    opening = np.clip(envelope / np.quantile(envelope, 0.98), 0, 1)
    pictures = []
    for frame, share in enumerate(opening):
        sway = (0.08 * np.sin(0.12 * frame), 0.04 * np.sin(0.2 * frame + 1))
        pose = {"offset": sway, "tilt_degrees": 2 * np.sin(0.1 * frame), "eye_openness": float(frame % 40 > 2)}
        face = replace(faces.Face(**features), mouth_opening=float(share), **pose)
        pictures.append(torch.from_numpy(np.array(faces.draw_face(face, SIZE, supersample=1))))
    return torch.stack(pictures)


@pytest.fixture(scope="module")
def talk(faces, voice) -> Tensor:
    return draw_talk(faces, envelope_of(voice))


@pytest.fixture(scope="module")
def film(talk, voice, tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "talk.mp4", talk, voice)


# Lip sync


def test_a_drawn_face_follows_its_voice(film):
    report = measure(QualityRequest(film))
    assert report.values["lip_sync_correlation"] > 0.95 and report.values["lip_sync_lag_ms"] == 0
    assert set(report.reasons) == {"seam_jump"}


def test_dark_skin_where_teeth_brighten_the_mouth(faces, voice, tmp_path):
    talk = draw_talk(faces, envelope_of(voice), skin=(92, 60, 44), lips=(130, 60, 60), hair_style="bald")
    report = measure(QualityRequest(write_video(tmp_path / "talk.mp4", talk, voice)))
    assert report.values["lip_sync_correlation"] > 0.93 and report.values["lip_sync_lag_ms"] == 0


@pytest.mark.parametrize("frames", [-4, 3])
def test_a_lag_is_found(film, voice, tmp_path, frames):
    """A voice that comes early meets a late picture."""
    report = measure(QualityRequest(film, audio=write_sound(tmp_path / "voice.mkv", shifted(voice, -frames))))
    assert report.values["lip_sync_lag_ms"] == pytest.approx(frames * 1000 / FPS)


def test_another_voice_does_not_fit(talk):
    restless, mouths = RestlessnessMap(FPS), MouthPictures(FRAMES)
    for picture in talk:
        restless.add(planes(picture))
    tracker = HeadTracker(restless.find())
    for picture in talk:
        mouths.add(tracker.cut(planes(picture)))
    opening = mouths.opening()
    found = [abs(compare(opening, envelope_of(babble(seed, FRAMES / FPS))).correlation) for seed in range(40)]
    assert np.median(found) < 0.2


@pytest.mark.parametrize("lag", range(-MOST_LAG_FRAMES, MOST_LAG_FRAMES + 1))
def test_every_lag_is_recovered_exactly(lag):
    envelope = envelope_of(babble(3, 10), 160)
    sync = compare(2 * np.roll(envelope, lag) + 1, envelope)
    assert sync.lag_frames == lag and sync.correlation_at_lag == pytest.approx(1)


def test_the_envelope_ends_with_the_sound(tmp_path):
    recording = babble(1, 3)
    path = write_sound(tmp_path / "voice.mkv", recording)
    envelope = voice_envelope(path, np.arange(81) / FPS)
    assert len(envelope) == 48
    np.testing.assert_allclose(envelope, envelope_of(recording, 48), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "frames, sound, words",
    [
        ("talk", None, "no sound"),
        ("talk", 0.0, "silent"),
        ("still", 1.0, "still"),
        ("noise", 1.0, "no mouth|no lag"),
        ("grey", 1.0, "still"),
        ("short", 1.0, "24 are needed|too short"),
        ("one", 1.0, "too short"),
    ],
)
def test_what_cannot_be_measured_says_why(talk, voice, tmp_path, frames, sound, words):
    pictures = {
        "talk": talk,
        "still": talk[:1].expand(FRAMES, -1, -1, -1),
        "noise": torch.randint(0, 256, (FRAMES, 64, 64, 3), dtype=torch.uint8),
        "grey": torch.full((FRAMES, 16, 16, 3), 128, dtype=torch.uint8),
        "short": talk[:12],
        "one": talk[:1],
    }[frames]
    recording = None if sound is None else Recording(voice.samples * sound, voice.rate_hz)
    report = measure(QualityRequest(write_video(tmp_path / "film.mp4", pictures, recording)))
    values, reasons = report.values, " ".join(report.reasons.values())
    assert values["lip_sync_correlation"] is None or abs(values["lip_sync_correlation"]) < 0.3
    assert values["lip_sync_lag_ms"] is None
    assert any(word in reasons for word in words.split("|")), reasons


# Seams, drift, flicker


def cuts(talk: Tensor, size: int) -> Tensor:
    """Every 24 frames the head jumps aside and back."""
    return torch.stack([torch.roll(frame, size * (index // 24 % 2), 1) for index, frame in enumerate(talk)])


def test_seams_show(talk, tmp_path):
    found = []
    for size in (0, 3, 12):
        path = write_video(tmp_path / f"{size}.mp4", cuts(talk, size))
        found.append(measure(QualityRequest(path, clip_frames=24)).values["seam_jump"])
    assert 0.5 < found[0] < 1.6 and found[1] > 1.5 * found[0] and found[2] > 2 * found[1]


def test_drift_grows_with_a_planted_shift_of_colour(talk, tmp_path):
    found = []
    for level in (0, 12, 40):
        tinted = talk.float()
        tinted[FRAMES // 2 :, ..., 2] -= level
        path = write_video(tmp_path / f"{level}.mp4", tinted.clamp(0, 255).byte())
        found.append(measure(QualityRequest(path)).values["identity_drift"])
    assert found[0] < 0.06 and found[0] + 0.01 < found[1] < found[2] - 0.02


def test_drift_from_a_reference_picture(faces, talk, film, tmp_path):
    own, other = tmp_path / "own.png", tmp_path / "other.png"
    faces.draw_face(faces.Face(), 256).save(own)
    faces.draw_face(faces.Face(skin=(92, 60, 44), hair_style="bald", jaw=1.0), 256).save(other)
    near, far = (measure(QualityRequest(film, reference=path)).values["identity_drift"] for path in (own, other))
    assert near < 0.2 and far > 2 * near


def test_flicker_grows(talk, tmp_path):
    found = []
    for level in (0, 2, 8):
        pulse = level * (torch.arange(FRAMES) % 2)[:, None, None, None]
        path = write_video(tmp_path / f"{level}.mp4", (talk.int() - pulse).clamp(0, 255).byte())
        found.append(measure(QualityRequest(path)).values["flicker"])
    assert found[0] < 0.004 and found[0] + 0.004 < found[1] < found[2]
    assert found[2] == pytest.approx(2 * 8 / 255, rel=0.3)


def test_nothing_drifts_or_flickers_in_a_still_video(talk, tmp_path):
    path = write_video(tmp_path / "still.mkv", talk[:1].expand(40, -1, -1, -1), preset="lossless-mkv")
    values = measure(QualityRequest(path, clip_frames=10)).values
    assert values["identity_drift"] == pytest.approx(0, abs=1e-5)
    assert values["flicker"] == 0 and values["seam_jump"] == 1


def test_borders_come_from_the_file():
    ours = {"clip_frames": "[37, 40, 40, 5]", "prompt": "of another program"}
    graph = {"3": {"class_type": "WanS2VConditioning", "inputs": {"clip_frames": 48, "start_from_picture": True}}}
    linked = {"3": {"class_type": "WanS2VConditioning", "inputs": {"clip_frames": ["7", 0]}}}
    assert clip_lengths(ours, None) == ClipLengths(40, 3)
    assert clip_lengths(ours, None).starts(120) == [0, 37, 77, 117]
    assert clip_lengths({"prompt": json.dumps(graph)}, None).starts(100) == [0, 48, 96]
    assert clip_lengths({"comment": "made by hand", "prompt": json.dumps(linked)}, None) is None
    assert clip_lengths({"clip_frames": "[37, 9]"}, None).starts(46) == [0, 37]
    for odd in ("[]", "[0, 3]", "[true]", '["8"]', "8", '{"a": 1}', "[" * 100_000):
        assert clip_lengths({"clip_frames": odd}, None) is None, odd
    assert clip_lengths({}, 30).starts(90) == [0, 30, 60]
    assert clip_lengths(ours, 20) == ClipLengths(20, 3)
    with pytest.raises(ConfigError, match="clip_frames=0"):
        clip_lengths({}, 0)


# Likeness


def test_equal_videos(film):
    assert likeness.likeness(film, film) == {"psnr": likeness.BEST_PSNR, "ssim": pytest.approx(1, abs=1e-6)}


def test_psnr_and_ssim_fall_with_noise(talk, tmp_path):
    plain = write_video(tmp_path / "plain.mkv", talk[:6], preset="lossless-mkv")
    found = []
    for level in (4, 12, 40):
        noisy = (talk[:6].float() + level * torch.randn(talk[:6].shape)).clamp(0, 255).round().byte()
        path = write_video(tmp_path / f"{level}.mkv", noisy, preset="lossless-mkv")
        found.append(likeness.likeness(plain, path))
        error = (noisy.double() - talk[:6].double()).square().mean().item()
        assert found[-1]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert found[0]["ssim"] > found[1]["ssim"] > found[2]["ssim"] > 0


@pytest.mark.parametrize("change, words", [("fewer", "number of frames"), ("smaller", "differ in size")])
def test_videos_that_cannot_be_compared(talk, film, tmp_path, change, words):
    other = talk[:50] if change == "fewer" else talk[:, :64, :64]
    report = measure(QualityRequest(film, against=write_video(tmp_path / "other.mp4", other)))
    for name in ("psnr", "ssim", "lpips"):
        assert report.values[name] is None and words in report.reasons[name]


def lpips_weights(path: Path) -> Path:
    """Random weights under the names of the package."""
    sizes = {1: (64, 3, 11), 2: (192, 64, 5), 3: (384, 192, 3), 4: (256, 384, 3), 5: (256, 256, 3)}
    tensors = {}
    for index, (part, number, *_) in enumerate(LAYERS):
        out, into, side = sizes[part]
        tensors[f"net.slice{part}.{number}.weight"] = torch.randn(out, into, side, side) / (into * side**2) ** 0.5
        tensors[f"net.slice{part}.{number}.bias"] = torch.zeros(out)
        tensors[f"lin{index}.model.1.weight"] = torch.rand(1, out, 1, 1)
    torch.save(tensors, path)
    return path


def test_lpips_is_zero_for_equal_pictures_and_grows(tmp_path):
    distance = alexnet_lpips(lpips_weights(tmp_path / "alex.pth"))
    picture, noise = 255 * torch.rand(1, 3, 64, 80), torch.randn(1, 3, 64, 80)
    found = [distance(picture, (picture + level * noise).clamp(0, 255)) for level in (0, 5, 50)]
    assert found[0] == 0 and found[0] < found[1] < found[2]


def test_lpips_refuses_other_weights(film, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"is no weights file of LPIPS.*missing"):
        measure(QualityRequest(film, against=film, lpips_weights=tmp_path / "other.pth"))


# Command line and files


def test_the_command_prints_one_json_object(film, run_cli):
    code, out, _ = run_cli("quality", film, "--against", film, "--clip_frames", "40", "--json")
    found = json.loads(out)
    assert code == 0 and set(found) == KEYS | {"psnr", "ssim", "lpips"}
    assert found["psnr"] == 100 and found["lpips"] is None and set(found["reasons"]) == {"lpips"}


def test_the_command_prints_lines(film, run_cli):
    code, out, _ = run_cli("quality", film)
    assert code == 0 and "lip_sync_lag_ms: 0\n" in out and "seam_jump: the file does not say" in out


@pytest.mark.parametrize("option", ["video", "--audio", "--against", "--reference", "--lpips_weights"])
def test_missing_files_are_named(film, run_cli, tmp_path, option):
    none = tmp_path / "none.mp4"
    code, out, _ = run_cli("quality", *([none] if option == "video" else [film, option, none]), "--json")
    assert code == 2 and str(none) in json.loads(out)["error"]


def test_header_and_frames(talk, tmp_path):
    path = write_video(tmp_path / "film.mkv", talk[:5], preset="lossless-mkv", metadata={"comment": "hello"})
    header = read_header(path)
    assert header.fps == FPS and not header.has_sound and header.tags["comment"] == "hello"
    pictures, times = zip(*frames_of(path), strict=True)
    assert torch.equal(torch.stack(pictures), talk[:5]) and times == pytest.approx(np.arange(5) / FPS, abs=1e-3)
