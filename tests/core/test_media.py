"""Sound and video files: what is written comes back, on time; what cannot work is named."""

import builtins
import contextlib
import logging
import math
import resource
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wan_s2v_core.errors import BackendUnavailable, ConfigError
from wan_s2v_core.io import video
from wan_s2v_core.io import video as video_io
from wan_s2v_core.io.audio import Recording, check_recording, read_recording, resample, sound_frame
from wan_s2v_core.io.video import (
    DrivingVideo,
    VideoWriter,
    exact_fps,
    probe_video,
    read_frames,
    video_preset,
    video_presets,
)

PRESETS = list(video_presets())
LOSSLESS, DEFAULT = "lossless-mkv", "h264-mp4"
AAC_FRAME = 1024
RATES = [8000, 22050, 44100, 48000, 96000]


def random_frames(frames: int, height: int = 48, width: int = 64) -> Tensor:
    """T H W 3 uint8: smooth random pictures that change from frame to frame."""
    coarse = torch.rand(1, 3, frames, 5, 6)
    smooth = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return smooth[0].movedim(0, -1).mul(255).byte()


def grey_frames(levels: list[int], height: int = 32, width: int = 48) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, height, width, 3)


def random_sound(channels: int, count: int) -> Tensor:
    """C N float32 on the grid of 16-bit samples."""
    return torch.randint(-30000, 30000, (channels, count)) / 32768


def clicks(count: int, places: list[int]) -> Tensor:
    samples = torch.zeros(1, count)
    samples[0, places] = 0.9
    return samples


def write_video(path: Path, frames: Tensor, fps=16, recording=None, chunk=7, **options) -> Path:
    height, width = frames.shape[1:3]
    with VideoWriter(path, width, height, fps, recording, **options) as writer:
        for part in frames.split(chunk):
            writer.write(part)
    return path


def write_wav(path: Path, samples: Tensor, rate: int) -> Path:
    """16-bit wav by the standard library, independent of PyAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32768).round().to(torch.int16).T.contiguous().numpy().tobytes())
    return path


def write_sound(path: Path, samples: Tensor, rate: int, codec: str, start: int = 0, **options) -> Path:
    index_first = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=index_first) as container:
        stream = container.add_stream(
            codec, rate=rate, layout=sound_frame(samples.numpy(), rate).layout.name, **options
        )
        frame = sound_frame(samples.numpy(), rate)
        frame.pts, frame.time_base = start, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(autouse=True)
def fresh_content(fresh_seed):
    torch.manual_seed(fresh_seed)


# Reading sound


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2, 9])
def test_wav_comes_back_sample_by_sample(tmp_path, channels, rate):
    samples = random_sound(channels, rate // 3)
    recording = read_recording(write_wav(tmp_path / "sound.wav", samples, rate))
    assert recording.rate_hz == rate and recording.samples.dtype == torch.float32
    assert torch.equal(recording.samples, samples)
    check_recording(recording)


@pytest.mark.parametrize(
    "codec, step",
    [
        ("pcm_u8", 2 / 256),
        ("pcm_s16le", 0),
        ("pcm_s24le", 0),
        ("pcm_s32le", 0),
        ("pcm_f32le", 0),
        ("pcm_f64le", 0),
        ("flac", 0),
    ],
)
def test_every_sample_format(tmp_path, codec, step):
    samples = random_sound(2, 5000)
    recording = read_recording(write_sound(tmp_path / "sound.mkv", samples, 22050, codec))
    assert (recording.samples - samples).abs().max() <= step


@pytest.mark.parametrize(
    "suffix, codec, delay",
    [(".mp3", "libmp3lame", 0), (".m4a", "aac", 0), (".ogg", "libopus", 0), (".flac", "flac", 0)],
)
def test_a_click_stays_at_its_time_in_every_codec(tmp_path, suffix, codec, delay):
    """Encoders run in with silence that the containers note: measured delay 0 samples, give or take one."""
    path = write_sound(tmp_path / f"sound{suffix}", clicks(48000, [17777]), 48000, codec)
    recording = read_recording(path)
    assert abs(recording.samples[0].abs().argmax().item() - 17777 - delay) <= 1
    assert 48000 <= recording.samples.shape[1] <= 48000 + 2 * 1152


def test_more_than_eight_channels_in_planes(tmp_path):
    samples = random_sound(9, 48000) / 4
    path = write_sound(tmp_path / "sound.mkv", samples, 48000, "libopus", options={"mapping_family": "255"})
    assert read_recording(path).samples.shape == samples.shape


def test_a_stretch_equals_the_same_cut_of_the_whole(tmp_path):
    rate = 22050
    whole = Recording(random_sound(2, rate * 3), rate)
    path = write_wav(tmp_path / "sound.wav", whole.samples, rate)
    for _ in range(8):
        start, seconds = (torch.rand(2) * torch.tensor([2.99, 2.0])).tolist()
        for length in (None, seconds + 1e-6):
            got = read_recording(path, start, length)
            assert torch.equal(got.samples, whole.cut(start, length).samples)
    assert torch.equal(read_recording(path, 0, 99).samples, whole.samples)
    assert whole.cut(1, 0.5).seconds == pytest.approx(0.5, abs=1 / rate)


def test_sound_that_starts_late_begins_with_silence(tmp_path):
    path, rate = tmp_path / "late.mkv", 16000
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "bgr0"
        sound = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for index in range(10):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 10)
            container.mux(pictures.encode(picture))
        frame = sound_frame(np.full((1, 8000), 0.5, np.float32), rate)
        frame.pts, frame.time_base = 4000, Fraction(1, rate)
        container.mux(sound.encode(frame))
        for stream in (pictures, sound):
            container.mux(stream.encode(None))
    samples = read_recording(path).samples
    assert samples.shape == (1, 12000)
    assert not samples[:, :4000].any() and (samples[:, 4000:] == 0.5).all()


@pytest.mark.parametrize("suffix, codec", [(".flac", "flac"), (".mp4", "aac"), (".mp3", "libmp3lame")])
@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_file_that_breaks_gives_what_came_before(tmp_path, caplog, suffix, codec, damage):
    path = write_sound(tmp_path / f"sound{suffix}", random_sound(1, 200_000), 44100, codec)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = b"\xff" * (len(content) - half) if damage == "overwritten" else b""
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        recording = read_recording(path)
    assert 50_000 < recording.samples.shape[1] < 150_000
    (message,) = [text for text in caplog.messages if "exceeds full scale" not in text]
    kept = float(message.split("the ")[1].split(" s ")[0])
    assert kept == pytest.approx(recording.seconds, abs=0.02)


def bad_sounds(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.wav").write_text("This is no sound.\n" * 300)
    (folder / "empty.wav").touch()
    write_wav(folder / "header.wav", torch.zeros(1, 0), 16000)
    write_video(folder / "silent.mp4", random_frames(3))
    return {
        "missing": (folder / "none.wav", "not there"),
        "folder": (folder, "is a folder"),
        "text": (folder / "text.wav", "cannot be opened"),
        "empty": (folder / "empty.wav", "0 bytes"),
        "no samples": (folder / "header.wav", "without a sample|cannot be opened"),
        "no sound": (folder / "silent.mp4", "no audio stream .*video"),
    }


@pytest.mark.parametrize("case", ["missing", "folder", "text", "empty", "no samples", "no sound"])
def test_sounds_that_cannot_be_read_are_named(tmp_path, case):
    path, message = bad_sounds(tmp_path)[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("start, seconds", [(-1, None), (1.0, None), (5, 1), (0, 0), (0, -1), (math.nan, None)])
def test_stretches_that_do_not_exist(tmp_path, start, seconds):
    recording = Recording(random_sound(1, 16000), 16000)
    path = write_wav(tmp_path / "sound.wav", recording.samples, 16000)
    with pytest.raises(ConfigError, match="seconds="):
        recording.cut(start, seconds)
    with pytest.raises(ConfigError, match="seconds="):
        read_recording(path, start, seconds)


@pytest.mark.parametrize(
    "recording, message",
    [
        (Recording(torch.zeros(1, 0), 16000), "no usable sample"),
        (Recording(torch.zeros(16000), 16000), "Channels by samples"),
        (Recording(torch.zeros(1, 399), 16000), "25 ms"),
        (Recording(torch.zeros(2, 1102), 44100), "25 ms"),
        (Recording(torch.full((1, 800), math.nan), 16000), "800 of 800"),
        (Recording(torch.tensor([[math.inf] + [0.0] * 799]), 16000), "1 of 800"),
        (Recording(torch.zeros(1, 800), 0), "rate_hz=0"),
        (Recording(torch.zeros(1, 800), -8000), "rate_hz=-8000"),
    ],
)
def test_recordings_without_features(recording, message):
    with pytest.raises(ConfigError, match=message):
        check_recording(recording)


def test_silence_and_the_shortest_speech_are_fine():
    check_recording(Recording(torch.zeros(1, 400), 16000))
    check_recording(Recording(torch.zeros(2, 1103), 44100))
    assert not Recording(torch.zeros(2, 44100), 44100).speech().any()


# Resampling


@settings(max_examples=30, deadline=None)
@given(rate=st.sampled_from(RATES), new=st.sampled_from([*RATES, 16000]), count=st.integers(400, 200_000))
def test_resampling_keeps_length_and_time(rate, new, count):
    """A click stays within half a sample of its time, and the first sample stays the first."""
    place = count // 3
    got = resample(clicks(count, [place]), rate, new)
    assert got.shape == (1, round(count * new / rate))
    # A click above half the new rate spreads over neighbours; its largest sample is the nearest one.
    assert abs(got[0].argmax().item() - place * new / rate) <= 0.5 + 1e-6
    assert resample(clicks(count, [0]), rate, new)[0].argmax() == 0


@pytest.mark.parametrize("rate", RATES)
def test_a_sine_stays_a_sine(rate):
    """Away from the ends, where the filter sees what is not there, the error is below 1e-4."""
    frequency, count = 200 + 1800 * torch.rand(1).item(), 2 * rate
    sine = torch.sin(2 * math.pi * frequency * torch.arange(count, dtype=torch.float64) / rate).float()
    recording = Recording(torch.stack([1.5 * sine, 0.5 * sine]), rate)
    got = recording.speech()
    expected = torch.sin(2 * math.pi * frequency * torch.arange(32000, dtype=torch.float64) / 16000).float()
    assert got.shape == (32000,) and got.dtype == torch.float32
    torch.testing.assert_close(got[200:-200], expected[200:-200], atol=1e-4, rtol=0)


def test_speech_is_the_mean_of_the_channels():
    samples = random_sound(9, 3000)
    assert torch.equal(Recording(samples, 16000).speech(), samples.mean(0))


# Round trips of video


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fps", [16, 25.0, 30000 / 1001])
def test_frames_rate_and_length_come_back(tmp_path, preset, fps):
    count = int(torch.randint(20, 60, ()))
    frames, path = random_frames(count), tmp_path / f"out{video_preset(preset).suffix}"
    rate = RATES[count % len(RATES)]
    write_video(path, frames, fps, Recording(random_sound(2, rate * 3) / 4, rate), preset=preset)
    facts = probe_video(path)
    assert (facts.frames, facts.width_px, facts.height_px) == (count, 64, 48)
    assert facts.fps == pytest.approx(fps, rel=1e-3)
    assert facts.seconds == pytest.approx(count / fps, abs=2e-3)
    slack = 1e-4 if preset == LOSSLESS else AAC_FRAME / 32000
    assert facts.audio_seconds == pytest.approx(count / fps, abs=slack)
    back = read_frames(path, fps, 0, count + 10)
    assert back.shape == frames.shape
    assert (back.int() - frames.int()).abs().float().mean() < 12


@pytest.mark.parametrize("preset", PRESETS)
def test_colours_come_back(tmp_path, preset):
    """The matrix of writer, tags and reader is one: plain colours return within 3 of 255."""
    colours = torch.randint(20, 236, (6, 1, 1, 3), dtype=torch.uint8).expand(-1, 64, 64, -1)
    path = write_video(tmp_path / f"out{video_preset(preset).suffix}", colours, preset=preset)
    assert (read_frames(path, 16, 0, 6).int() - colours.int())[:, 20:40, 20:40].abs().max() <= 3


@pytest.mark.parametrize("size", [(48, 64), (37, 51), (17, 16)])
def test_lossless_is_lossless(tmp_path, size):
    frames = torch.randint(0, 256, (9, *size, 3), dtype=torch.uint8)
    sound = random_sound(2, 9 * 2000)  # at 32 kHz and 16 fps, 9 frames last 18000 samples
    path = write_video(tmp_path / "out.mkv", frames, 16, Recording(sound, 32000), preset=LOSSLESS)
    assert torch.equal(read_frames(path, 16, 0, 9), frames)
    assert torch.equal(read_recording(path).samples, sound)


@pytest.mark.parametrize("channels", [1, 2, 9])
def test_channels_of_the_film(tmp_path, caplog, channels):
    """Lossless keeps all of them; the others mix nine without places into one and say so."""
    sound = Recording(random_sound(channels, 16000) / 4, 16000)
    for preset in PRESETS:
        path = tmp_path / f"out{video_preset(preset).suffix}"
        caplog.clear()
        write_video(path, random_frames(16), recording=sound, preset=preset)
        mixed = channels > video_preset(preset).most_channels
        assert len(read_recording(path).samples) == (1 if mixed else channels)
        assert len(caplog.records) == mixed


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_clicks_stay_with_the_picture(tmp_path, preset, rate):
    """Measured: 0 samples off in every preset (where the rate is kept); allowed is one sample."""
    places = sorted((torch.tensor([0.3, 1.0, 1.9]) * rate + torch.randint(0, 999, (3,))).int().tolist())
    path = tmp_path / f"out{video_preset(preset).suffix}"
    write_video(path, random_frames(40), 16, Recording(clicks(3 * rate, places), rate), preset=preset)
    back = read_recording(path)
    for place in places:
        near = round(place / rate * back.rate_hz)
        window = back.samples[0, near - 2000 : near + 2000].abs()
        assert abs(window.argmax().item() - 2000) <= 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sound_seconds", [0.4, 5.0])
def test_sound_is_cut_or_padded_to_the_pictures(tmp_path, preset, sound_seconds):
    path = tmp_path / f"out{video_preset(preset).suffix}"
    sound = random_sound(1, int(48000 * sound_seconds)) / 2
    write_video(path, random_frames(33), 16, Recording(sound, 48000), preset=preset)
    back, wanted = read_recording(path).samples, round(33 / 16 * 48000)
    assert wanted <= back.shape[1] <= wanted + (AAC_FRAME if preset == DEFAULT else 0)
    end = min(wanted, sound.shape[1])
    assert back[0, end // 2 : end].std() > 0.1, "there is sound up to the end of it"
    assert not sound_seconds < 2 or back[0, end + 4096 :].abs().max() < 0.02, "and silence behind"
    with av.open(str(path)) as container:
        assert container.duration / 1e6 == pytest.approx(33 / 16, abs=0.015)


@pytest.mark.parametrize("preset", PRESETS)
def test_metadata_comes_back(tmp_path, preset):
    metadata = {
        "prompt": "Eine Frau spricht, 一个女人在说话 \"'=;#\\",
        "workflow": '{"nodes": ' + "[1, 2, 3], " * 20_000,
    }
    path = tmp_path / f"out{video_preset(preset).suffix}"
    write_video(path, random_frames(2), metadata=metadata, preset=preset)
    with av.open(str(path)) as container:
        stored = {key.lower(): value for key, value in container.metadata.items()}
        keys = set(container.metadata)
    assert metadata.items() <= stored.items()
    assert preset != DEFAULT or set(metadata) <= keys, "MP4 keeps the case of keys"


@given(numerator=st.integers(1, 120_000), denominator=st.sampled_from([1, 1001, 125]))
def test_frame_rates_are_exact(numerator, denominator):
    fps = Fraction(numerator, denominator)
    if 0.001 <= fps <= 1000:
        assert exact_fps(fps) == fps == exact_fps(float(fps))


# The writer's promises


def test_memory_stays_flat(tmp_path):
    """300 frames are 26 MB; what Python holds at the peak is a few chunks, and nothing at the end."""
    chunk = random_frames(10, 120, 240)
    with VideoWriter(tmp_path / "out.mp4", 240, 120, 16, Recording(random_sound(1, 16000), 16000)) as writer:
        writer.write(chunk)
        tracemalloc.start()
        for _ in range(30):
            writer.write(chunk)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert not any(isinstance(value, (list, dict)) and value for value in vars(writer).values())
    assert now < 100_000 and peak < 1_000_000
    assert probe_video(tmp_path / "out.mp4").frames == 310


def test_the_name_appears_when_the_film_is_whole(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")
    with VideoWriter(path, 64, 48, 16) as writer:
        writer.write(random_frames(20))
        assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    assert probe_video(path).frames == 20


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("frames", [0, 20])
def test_an_exception_leaves_the_older_file(tmp_path, error, frames):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")
    with pytest.raises(error), VideoWriter(path, 64, 48, 16, Recording(torch.zeros(1, 16000), 16000)) as writer:
        writer.write(random_frames(20)[:frames])
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"] and path.read_bytes() == b"older"


@contextlib.contextmanager
def files_no_larger_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 20_000, 80_000])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_full_disk_is_named(tmp_path, preset, limit):
    path = tmp_path / f"out{video_preset(preset).suffix}"
    frames = torch.randint(0, 256, (40, 96, 96, 3), dtype=torch.uint8)
    with files_no_larger_than(limit), pytest.raises(ConfigError, match=r"full.*free some space"):
        write_video(path, frames, recording=Recording(random_sound(1, 16000), 16000), preset=preset)
    assert not list(tmp_path.iterdir())


def test_no_space_in_the_middle(tmp_path, monkeypatch):
    """The error that FFmpeg gives on ENOSPC."""

    def refuse(*_):
        raise av.error.FFmpegError(28, "No space left on device", "out.mp4")

    with pytest.raises(ConfigError, match="full"), VideoWriter(tmp_path / "out.mp4", 64, 48, 16) as writer:
        monkeypatch.setattr(writer, "_encode_picture", refuse)
        writer.write(random_frames(1))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    writer = VideoWriter(folder / "out.mp4", 64, 48, 16)
    folder.rmdir()
    with pytest.raises(ConfigError, match="cannot be written"), writer:
        pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "mpeg1"}, "preset='mpeg1' is unknown.*h264-mp4"),
        ({"path": "out.mkv"}, r"does not end in \.mp4.*out\.mp4"),
        ({"path": "none/out.mp4"}, "not there or no folder"),
        ({"path": "sub.mp4"}, "is a folder"),
        ({"width_px": 63}, "63 x 48.*multiples of 2.*62 x 48.*lossless-mkv"),
        ({"height_px": 47}, "64 x 47.*64 x 46"),
        ({"height_px": 1}, "no picture size"),
        ({"height_px": 0}, "no picture size"),
        ({"width_px": -2}, "no picture size"),
        ({"fps": 0}, "fps=0 is no frame rate"),
        ({"fps": math.nan}, "fps=nan"),
        ({"fps": math.inf}, "fps=inf"),
        ({"recording": Recording(torch.full((1, 9999), math.nan), 16000)}, "not a number"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, message):
    (tmp_path / "sub.mp4").mkdir()
    arguments = {"path": "out.mp4", "width_px": 64, "height_px": 48, "fps": 16} | changes
    with pytest.raises(ConfigError, match=message):
        VideoWriter(**arguments | {"path": tmp_path / arguments["path"]})


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(video.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"Permission denied.*must be writable"):
        VideoWriter(tmp_path / "out.mp4", 64, 48, 16)


@pytest.mark.parametrize(
    "frames", [random_frames(2).float(), random_frames(2)[:, :-2], random_frames(2)[0], random_frames(2).movedim(-1, 1)]
)
def test_frames_that_do_not_fit(tmp_path, frames):
    with (
        pytest.raises(ConfigError, match=r"do not fit out\.mp4"),
        VideoWriter(tmp_path / "out.mp4", 64, 48, 16) as writer,
    ):
        writer.write(random_frames(3))
        writer.write(frames)
    assert not list(tmp_path.iterdir())


def test_no_frame_is_no_video(tmp_path):
    with pytest.raises(ConfigError, match="no frame"), VideoWriter(tmp_path / "out.mp4", 64, 48, 16) as writer:
        writer.write(random_frames(1)[:0])
    assert not list(tmp_path.iterdir())


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    preset = video_preset(DEFAULT)
    monkeypatch.setattr(
        video, "video_preset", lambda _: video.VideoPreset(**{**vars(preset), "video_codec": "no_such"})
    )
    with pytest.raises(BackendUnavailable, match=r"no_such.*another of the presets"):
        write_video(tmp_path / "out.mp4", random_frames(1))
    assert not list(tmp_path.iterdir())


def test_without_pyav(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "sound.wav", random_sound(1, 800), 16000)
    real = builtins.__import__

    def refuse(name, *arguments):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendUnavailable, match="pip install av"):
        read_recording(path)
    with pytest.raises(BackendUnavailable, match="pip install av"):
        write_video(tmp_path / "out.mp4", random_frames(1))


# Driving videos


@settings(max_examples=15, deadline=None)
@given(
    source_fps=st.sampled_from([8, 12, 16, 24, 25, 30, 50, Fraction(30000, 1001)]),
    fps=st.sampled_from([8, 16, 25, 30]),
    start=st.integers(0, 12),
    count=st.integers(1, 40),
)
def test_driving_frames_follow_the_clock(tmp_path_factory, source_fps, fps, start, count):
    """Each frame is the picture nearest in time, as long as the video lasts."""
    levels = list(range(0, 240, 8))
    path = write_video(tmp_path_factory.mktemp("v") / "in.mp4", grey_frames(levels), source_fps)
    got = read_frames(path, fps, start, count)
    duration = len(levels) / source_fps
    times = [Fraction(k, fps) for k in range(start, start + count) if Fraction(k, fps) < duration]
    assert abs(len(got) - len(times)) <= (times != [] and abs(times[-1] - duration) < 0.003)
    assert got.shape[1:] == (32, 48, 3)
    for picture, time in zip(got, times, strict=False):
        wanted = min(len(levels) - 1, math.floor(time * source_fps + Fraction(1, 2)))
        tie = (time * source_fps) % 1 == Fraction(1, 2)
        shown = picture.float().mean().item()
        assert min(abs(shown - levels[index]) for index in ({wanted, wanted - 1} if tie else {wanted})) < 3


def test_a_turned_video_stands_upright(tmp_path):
    """Phones store a quarter turn as a matrix in the header; here it is patched in."""
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not tell rotations")
    frames = random_frames(3)
    path = write_video(tmp_path / "in.mp4", frames)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer to volume
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30]  # clockwise
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    path.write_bytes(content)
    got = read_frames(path, 16, 0, 3)
    assert (got.int() - torch.rot90(frames, -1, (1, 2)).int()).abs().float().mean() < 12


def test_only_what_is_asked_comes(tmp_path):
    path = write_video(tmp_path / "in.mkv", grey_frames(list(range(40))), preset=LOSSLESS)
    assert read_frames(path, 16, 5, 3)[:, 0, 0, 0].tolist() == [5, 6, 7]
    assert read_frames(path, 16, 38, 9)[:, 0, 0, 0].tolist() == [38, 39]
    assert read_frames(path, 16, 40, 9).shape == (0, 32, 48, 3)


def test_a_driving_video_is_decoded_once(tmp_path, monkeypatch):
    """Stretches in order, out of order and behind the end equal those read one by one."""
    path = write_video(tmp_path / "in.mkv", grey_frames(list(range(40))), 25, preset=LOSSLESS)
    opened = []
    real = video_io.open_media
    monkeypatch.setattr(video_io, "open_media", lambda path: opened.append(path) or real(path))
    driving = DrivingVideo(path, 16)
    for count, (start, frames) in enumerate([(0, 7), (7, 9), (16, 20), (36, 5), (90, 2)]):
        got = driving(start, frames)
        assert len(opened) == 1, f"opened again for stretch {count}"
        assert got[:, :1, :1].flatten().tolist() == read_frames(path, 16, start, frames)[:, :1, :1].flatten().tolist()
        del opened[1:]
    assert driving(3, 2)[:, 0, 0, 0].tolist() == read_frames(path, 16, 3, 2)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("case", ["missing", "folder", "text", "empty", "sound"])
def test_videos_that_cannot_be_read_are_named(tmp_path, case):
    paths = {name: path for name, (path, _) in bad_sounds(tmp_path).items()}
    paths["sound"] = write_wav(tmp_path / "sound.wav", random_sound(1, 800), 16000)
    for read in (lambda path: read_frames(path, 16, 0, 4), probe_video):
        with pytest.raises(
            ConfigError, match=r"not there|is a folder|cannot be opened|0 bytes|no video stream"
        ) as caught:
            read(paths[case])
        assert str(paths[case]) in str(caught.value)


def test_stretches_of_frames_that_do_not_exist(tmp_path):
    path = write_video(tmp_path / "in.mp4", random_frames(3))
    for start, frames in ((-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="name no stretch"):
            read_frames(path, 16, start, frames)
    with pytest.raises(ConfigError, match="fps=0"):
        read_frames(path, 0, 0, 3)
