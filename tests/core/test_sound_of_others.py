"""Sound as people and other programs have it: taken rightly, or refused in one line; never lost or endless."""

import logging
import math
import os
import struct
import wave
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io import audio
from wan_s2v_core.io.audio import Recording, as_voice, check_recording, read_recording, sound_blocks
from wan_s2v_core.io.foreign import recording_of
from wan_s2v_core.io.small_film import write_small_film
from wan_s2v_core.io.video import VideoWriter, video_preset, video_presets

PRESETS = list(video_presets())
RATE = 16000
SURROUND = ("FL", "FR", "FC", "LFE", "BL", "BR")


def voice(seconds: float = 2.0, rate: int = RATE, level: float = 0.3) -> Tensor:
    """N: a tone that comes and goes like syllables."""
    t = torch.arange(round(seconds * rate)) / rate
    return level * torch.sin(2 * math.pi * 220 * t) * (torch.sin(2 * math.pi * 3 * t) > 0)


def rms_db(samples: Tensor) -> float:
    return 10 * math.log10(float(samples.double().square().mean()) + 1e-20)


def float_wav(path: Path, samples: Tensor, rate: int = RATE) -> Path:
    """32-bit float wav, C N."""
    data, channels = samples.T.contiguous().numpy().astype("<f4").tobytes(), len(samples)
    form = struct.pack("<HHIIHH", 3, channels, rate, rate * 4 * channels, 4 * channels, 32)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    return path


def int_wav(path: Path, rate: int, samples: int = 8000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * samples))
    return path


def tracks(path: Path, *sounds: Tensor, layouts=("mono",), default=None, codec="pcm_s16le", start=0) -> Path:
    """A file with an audio track for each C N."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=RATE, layout=layout) for layout in layouts]
        for number, stream in enumerate(streams):
            if default is not None:
                stream.disposition = int(number == default)
        for stream, sound in zip(streams, sounds, strict=True):
            pcm = (sound.T.contiguous().numpy() * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=stream.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


# Beyond full scale


@pytest.mark.parametrize("scale", [32767.0, 2.0**31, 8.5])
def test_floats_of_another_scale_are_refused_with_peak_and_remedy(tmp_path, scale):
    path = float_wav(tmp_path / "sound.wav", (voice() * scale / 0.3)[None])
    with pytest.raises(ConfigError, match=r"has a peak of [\d.,e+]+; full scale is 1.*[Dd]ivide.*16-bit wav"):
        read_recording(path)
    with pytest.raises(ConfigError, match="has a peak of"):
        check_recording(Recording((voice() * scale / 0.3)[None], RATE))


@pytest.mark.parametrize("scale", [1.001, 2.0, 8.0])
def test_a_little_beyond_full_scale_is_made_softer_with_one_warning(tmp_path, caplog, scale):
    sound = voice(level=scale)[None]
    read = read_recording(float_wav(tmp_path / "sound.wav", sound))
    torch.testing.assert_close(read.samples, sound / sound.abs().max())
    assert len(caplog.messages) == 1 and "exceeds full scale" in caplog.messages[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [2e9, -2e9, 60.0, 1.5])
def test_no_encoder_gets_more_than_full_scale(tmp_path, preset, value):
    """libavcodec's AAC never comes back from 2e9."""
    sound = Recording(torch.cat([torch.full((1, RATE), value), voice()[None]], 1), RATE)
    path, frames = tmp_path / f"out{video_preset(preset).suffix}", torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    with VideoWriter(path, 32, 32, 16, sound, preset) as writer:
        writer.write(frames)
    assert 0 < read_recording(path).samples.abs().max() <= 1
    write_small_film(tmp_path / "small.mp4", frames, 16, sound)


def test_not_a_number_reaches_no_encoder(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 32, 32, 16, Recording(voice()[None], RATE)) as writer:
        writer.sound.samples[:, 100:200] = math.nan
        writer.write(torch.zeros(8, 32, 32, 3, dtype=torch.uint8))
    assert read_recording(tmp_path / "out.mp4").samples.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fps", [0.02, 0.3, Fraction(1001, 1000), 999.999, 1000])
def test_odd_frame_rates_end(tmp_path, preset, fps):
    """A film, or one line that says what cannot be."""
    path, count = tmp_path / f"out{video_preset(preset).suffix}", 2
    try:
        with VideoWriter(path, 32, 32, fps, Recording(voice()[None], RATE), preset) as writer:
            writer.write(torch.zeros(count, 32, 32, 3, dtype=torch.uint8))
    except ConfigError as error:
        assert "cannot be written" in str(error) and not list(tmp_path.iterdir())
    else:
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == count


# Values of other programs


class OnDemand(Mapping):
    """What some packs hand over: read when it is asked for."""

    def __init__(self, values: dict, broken: bool = False):
        self.values, self.broken = values, broken

    def __getitem__(self, key):
        if self.broken:
            raise RuntimeError("no audio could be\nextracted from take.mp4")
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


HEARD = voice()
TAKEN = {
    "mapping": lambda: OnDemand({"waveform": HEARD[None, None], "sample_rate": RATE}),
    "C N": lambda: {"waveform": HEARD[None], "sample_rate": RATE},
    "N": lambda: {"waveform": HEARD, "sample_rate": RATE},
    "double": lambda: {"waveform": HEARD[None, None].double(), "sample_rate": RATE},
    "half": lambda: {"waveform": HEARD[None, None].half(), "sample_rate": RATE},
    "int16": lambda: {"waveform": (HEARD[None, None] * 32768).to(torch.int16), "sample_rate": RATE},
    "int32": lambda: {"waveform": (HEARD.double()[None, None] * 2**31).to(torch.int32), "sample_rate": RATE},
    "int8": lambda: {"waveform": (HEARD[None, None] * 128).round().to(torch.int8), "sample_rate": RATE},
    "uint8": lambda: {"waveform": (HEARD[None, None] * 128 + 128).round().to(torch.uint8), "sample_rate": RATE},
    "numpy": lambda: {"waveform": HEARD[None, None].numpy(), "sample_rate": RATE},
    "big endian": lambda: {"waveform": HEARD[None, None].numpy().astype(">f4"), "sample_rate": RATE},
    "rate is a float": lambda: {"waveform": HEARD[None, None], "sample_rate": float(RATE)},
    "rate is text": lambda: {"waveform": HEARD[None, None], "sample_rate": str(RATE)},
    "rate is a tensor": lambda: {"waveform": HEARD[None, None], "sample_rate": torch.tensor(RATE)},
    "list of one": lambda: [{"waveform": HEARD[None, None], "sample_rate": RATE}],
    "gradient": lambda: {"waveform": HEARD[None, None].clone().requires_grad_(), "sample_rate": RATE},
    "expanded": lambda: {"waveform": HEARD.expand(1, 2, -1), "sample_rate": RATE},
    "batch of two": lambda: {"waveform": torch.stack([HEARD, HEARD * 0.1])[:, None], "sample_rate": RATE},
}


@pytest.mark.parametrize("case", TAKEN)
def test_values_that_are_taken(caplog, case):
    recording = recording_of(TAKEN[case]())
    tolerance = 2 / 128 if case.endswith("int8") else 1e-3
    assert recording.rate_hz == RATE and recording.samples.dtype == torch.float32
    torch.testing.assert_close(recording.samples[0], HEARD, atol=tolerance, rtol=0)
    check_recording(recording)
    assert len(caplog.messages) == (case == "batch of two")
    recording.samples.numpy()


REFUSED = {
    "no values": (lambda: {"waveform": HEARD.to("meta"), "sample_rate": RATE}, "the audio input cannot be read"),
    "none": (lambda: None, "holds no sound"),
    "text": (lambda: "voice.wav", "holds no sound"),
    "list of two": (lambda: [TAKEN["N"](), TAKEN["N"]()], "holds no sound"),
    "no waveform": (lambda: {"sample_rate": RATE}, "holds no sound"),
    "waveform is text": (lambda: {"waveform": "x", "sample_rate": RATE}, "holds no sound"),
    "empty": (lambda: {"waveform": HEARD[None, None, :0], "sample_rate": RATE}, "holds no sound"),
    "4 sides": (lambda: {"waveform": HEARD[None, None, None], "sample_rate": RATE}, "holds no sound"),
    "no rate": (lambda: {"waveform": HEARD}, "sample_rate=None, which is no number"),
    "rate of words": (lambda: {"waveform": HEARD, "sample_rate": "CD" * 999}, r"sample_rate=CD.*\.\.\."),
    "rate is nan": (lambda: {"waveform": HEARD, "sample_rate": math.nan}, "sample_rate=nan"),
    "rate is infinite": (lambda: {"waveform": HEARD, "sample_rate": math.inf}, "sample_rate=inf"),
    "two rates": (lambda: {"waveform": HEARD, "sample_rate": torch.tensor([1, 2])}, "sample_rate="),
    "rate of 1": (lambda: {"waveform": HEARD, "sample_rate": 1}, "rate_hz=1"),
    "rate of 10 GHz": (lambda: {"waveform": HEARD, "sample_rate": 10**10}, "rate_hz=10000000000"),
    "swapped sides": (lambda: {"waveform": HEARD[None, :, None], "sample_rate": RATE}, "swapped"),
    "int64": (lambda: {"waveform": (HEARD * 32768).long(), "sample_rate": RATE}, "int64, whose full scale"),
    "bool": (lambda: {"waveform": HEARD > 0, "sample_rate": RATE}, "bool, whose full scale"),
    "complex": (lambda: {"waveform": HEARD.to(torch.complex64), "sample_rate": RATE}, "complex64, whose full scale"),
    "broken": (lambda: OnDemand({"waveform": 0}, broken=True), r"cannot be read: no audio could be\\nextracted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_refused_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        recording_of(make())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Channels


def surround(**channels: Tensor) -> Recording:
    silent = torch.zeros_like(next(iter(channels.values())))
    return Recording(torch.stack([channels.get(name, silent) for name in SURROUND]), RATE, SURROUND)


def test_a_voice_in_the_centre_keeps_its_loudness(tmp_path):
    sound = surround(FC=voice())
    film = sound.mixed().samples
    assert len(film) == 2 and torch.equal(film[0], film[1])
    for heard in (film, sound.speech()):
        assert abs(rms_db(heard) - rms_db(voice())) < 3
    levelled = sound.levelled()
    assert rms_db(levelled.mixed().samples) == pytest.approx(-20, abs=0.1)
    with VideoWriter(tmp_path / "out.mp4", 32, 32, 16, sound) as writer:
        writer.write(torch.zeros(32, 32, 32, 3, dtype=torch.uint8))
    assert abs(rms_db(read_recording(tmp_path / "out.mp4").samples[:, :32000]) - rms_db(voice())) < 3.1


def test_places_of_surround():
    """Left stays left, surrounds come 3 dB softer, what is for the subwoofer alone is left out."""
    noise = 0.1 * torch.randn(4, 2 * RATE)
    film = surround(FL=noise[0], BR=noise[1], LFE=noise[2], FC=noise[3]).mixed().samples
    torch.testing.assert_close(film[0], noise[0] + 0.71 * noise[3])
    torch.testing.assert_close(film[1], 0.71 * noise[1] + 0.71 * noise[3])


def test_encoder_and_film_hear_one_mix():
    sound = surround(FL=0.05 * torch.randn(RATE), FC=voice(1), BL=0.03 * torch.randn(RATE))
    torch.testing.assert_close(sound.speech(), sound.mixed().samples.mean(0))


def test_a_loud_mix_is_softer_and_not_cut_off():
    sound = Recording(voice(level=0.9).expand(6, -1), RATE, SURROUND)
    film = sound.mixed().samples
    assert film.abs().max() == pytest.approx(1) and abs(rms_db(film) - rms_db(voice(level=0.9))) < 3


@pytest.mark.parametrize("channels", [3, 4, 5, 7, 9])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_unknown_places_are_not_divided_by_silent_channels(channels, noise):
    samples = noise * torch.randn(channels, 2 * RATE)
    samples[channels // 2] += voice()
    sound = Recording(samples, RATE)
    for heard in (sound.mixed().samples, sound.speech()):
        assert rms_db(heard) == pytest.approx(rms_db(voice()), abs=0.1)


def test_six_and_eight_channels_without_names_are_5_1_and_7_1():
    samples = 0.1 * torch.randn(8, RATE)
    torch.testing.assert_close(Recording(samples[:6], RATE).mixed().samples[0], samples[[0, 2, 4]].T @ gains(3))
    torch.testing.assert_close(Recording(samples, RATE).mixed().samples[1], samples[[1, 2, 5, 7]].T @ gains(4))


def gains(count: int) -> Tensor:
    return torch.tensor([1.0, *[0.71] * (count - 1)])


def test_a_voice_on_the_fourth_of_six_microphones_is_heard():
    """That place is the subwoofer's in 5.1, which these six are not."""
    samples = 1e-4 * torch.randn(6, 2 * RATE)
    samples[3] += voice()
    assert rms_db(Recording(samples, RATE).speech()) == pytest.approx(rms_db(voice()), abs=0.1)


@pytest.mark.parametrize("layout", ["5.1", "5.1(side)", "7.1", "quad", "2.1", "5.0", "3.0", "6.1", "7.1(wide)"])
def test_layouts_of_files(tmp_path, layout):
    """The front left channel comes out on the left, as loud as it was, whatever else there is."""
    count = av.AudioLayout(layout).nb_channels
    samples = torch.zeros(count, RATE)
    samples[0] = voice(1)
    read = read_recording(tracks(tmp_path / "sound.mov", samples, layouts=(layout,), codec="pcm_s24le"))
    assert len(read.samples) == count and read.channels[0] == "FL"
    film = read.mixed().samples
    assert rms_db(film[0]) == pytest.approx(rms_db(samples[0]), abs=0.05) and not film[1].any()


@pytest.mark.parametrize("residue", [0.0, 0.05])
def test_channels_that_cancel_each_other(caplog, residue):
    sound = torch.stack([voice(), -voice() * (0.99 - residue) + 1e-3 * torch.randn(2 * RATE)])
    recording = as_voice(Recording(sound, RATE), "take.wav")
    assert torch.equal(recording.speech(), sound[0])
    assert len(caplog.messages) == 1 and "channel 1 of 2 alone" in caplog.messages[0]
    assert torch.equal(recording.mixed().samples, sound), "the film keeps both"


def test_channels_that_cancel_each_other_for_a_while():
    """The second of two speakers was recorded with one cable turned."""
    first, second = voice(6), voice(3)
    sound = torch.stack([torch.cat([first, second]), torch.cat([first, -second])])
    assert rms_db(Recording(sound, RATE).speech()[-3 * RATE :]) == pytest.approx(rms_db(second), abs=0.1)


@pytest.mark.parametrize("delay_ms", [0.1, 0.5, 1.0, 5.0, 20.0])
def test_ordinary_stereo_is_the_mean_of_its_channels(caplog, delay_ms):
    """Also with delays between microphones, one channel alone, or two voices apart."""
    speech = torch.nn.functional.conv1d(torch.randn(1, 1, 3 * RATE), torch.randn(1, 1, 40) / 40)[0, 0]
    delay = round(delay_ms / 1000 * RATE)
    cases = [
        torch.stack([speech[delay:], speech[: len(speech) - delay]]),
        torch.stack([speech, torch.zeros_like(speech)]),
        torch.stack([speech, 0.3 * torch.randn(len(speech))]),
    ]
    for samples in cases:
        assert torch.equal(as_voice(Recording(samples / 9, RATE), "take").speech(), (samples / 9).mean(0))
    assert not [text for text in caplog.messages if "alone" in text]


# Tracks


@pytest.mark.skipif(not hasattr(av.stream, "Disposition"), reason="this PyAV does not tell marks of streams")
def test_the_default_track_is_heard(tmp_path, caplog):
    game, speech = torch.zeros(2, RATE) + 0.01, voice(1)[None]
    path = tracks(tmp_path / "screen.mkv", game, speech, layouts=("stereo", "mono"), default=1)
    torch.testing.assert_close(read_recording(path).samples, speech, atol=1e-4, rtol=0)
    assert len(caplog.messages) == 1 and "track 2 of 2" in caplog.messages[0]


def test_without_a_default_the_track_with_most_channels_is_heard(tmp_path, caplog):
    sounds = voice(1)[None], 0.5 * voice(1).expand(2, -1), 0.1 * voice(1).expand(2, -1)
    path = tracks(tmp_path / "screen.mkv", *sounds, layouts=("mono", "stereo", "stereo"))
    torch.testing.assert_close(read_recording(path).samples, sounds[1], atol=1e-4, rtol=0)
    assert "track 2 of 3" in caplog.text


@pytest.mark.parametrize("level, word", [(0.0, "all samples are 0"), (1e-5, "peak -100 dBFS")])
def test_a_silent_voice_is_told_once(tmp_path, caplog, level, word):
    with caplog.at_level(logging.WARNING):
        recording = read_recording(float_wav(tmp_path / "sound.wav", torch.full((2, RATE), level)))
    check_recording(recording)
    assert len(caplog.messages) == 1 and "silent" in caplog.text and word in caplog.text


# Bounds


def test_a_late_start_is_silence_in_small_blocks(tmp_path):
    path = late_film(tmp_path / "late.mkv", 1500)
    sizes = [block.shape[1] for block, _ in sound_blocks(path)]
    assert sum(sizes) == 1501 * RATE and max(sizes) <= audio.RESAMPLER_BLOCK
    assert read_recording(path, start_seconds=1500).samples.abs().max() > 0.2, "only the stretch is kept"


def test_a_start_that_is_too_late_is_refused(tmp_path):
    path = late_film(tmp_path / "late.mkv", 10_000_000)
    with pytest.raises(ConfigError, match=r"starts 10,000,000 s after its file; up to 3,600 s"):
        next(sound_blocks(path))


def late_film(path: Path, seconds: int) -> Path:
    """A picture at 0 and sound that starts so much later."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "bgr0"
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        picture.pts, picture.time_base = 0, Fraction(1, 10)
        container.mux(pictures.encode(picture))
        container.mux(pictures.encode(None))
        mux_sound(container, sound, voice(1), seconds)
    return path


def mux_sound(container, stream, samples: Tensor, seconds: float) -> None:
    pcm = (samples.numpy() * 32767).astype(np.int16)[None]
    frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, round(seconds * RATE), Fraction(1, RATE)
    container.mux(stream.encode(frame))


@pytest.mark.parametrize("gap, filled", [(2.5, 2.5), (0.05, 0.0), (1e6, 0.0)])
def test_a_pause_in_the_time_stamps_is_silence(tmp_path, caplog, gap, filled):
    path = tmp_path / "pause.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        mux_sound(container, stream, voice(1), 0)
        mux_sound(container, stream, voice(1), 1 + gap)
    samples = read_recording(path).samples[0]
    assert len(samples) == round((2 + filled) * RATE)
    assert not samples[RATE : RATE + round(filled * RATE)].any()
    torch.testing.assert_close(samples[-RATE:], voice(1), atol=1e-4, rtol=0)
    assert len(caplog.messages) == (gap > 1)


@pytest.mark.parametrize("rate", [1, 50, 3999, 900_000, 2**31 - 1])
def test_rates_without_speech_are_refused(tmp_path, rate):
    path = int_wav(tmp_path / "sound.wav", rate)
    for read in (read_recording, lambda path: list(sound_blocks(path))):
        with pytest.raises(ConfigError, match=f"rate_hz={rate}"):
            read(path)
    with pytest.raises(ConfigError, match=f"rate_hz={rate}"):
        check_recording(Recording(torch.zeros(1, 3 * rate if rate < 9999 else 9999), rate))


def test_sound_that_host_memory_does_not_hold(tmp_path, monkeypatch):
    path = int_wav(tmp_path / "sound.wav", RATE, 2_000_000)
    monkeypatch.setattr(audio, "free_ram_bytes", lambda: 1_000_000)
    monkeypatch.setattr(audio, "GROWTH_BYTES", 1 << 16)
    with pytest.raises(ConfigError, match="of host memory as samples"):
        read_recording(path)
    assert read_recording(path, 100.0, 5.0).seconds == 5, "a part of it is held"


@pytest.mark.parametrize("start, seconds", [(1e308, None), (math.inf, None), (0, 1e308), (0, math.inf), (2e6, 1.0)])
def test_numbers_that_no_recording_has(tmp_path, start, seconds):
    path = int_wav(tmp_path / "sound.wav", RATE)
    for cut in (
        lambda: read_recording(path, start, seconds),
        lambda: Recording(torch.zeros(1, 800), RATE).cut(start, seconds),
    ):
        with pytest.raises(ConfigError, match=r"seconds=(1e\+308|inf|2e\+06)"):
            cut()


def test_samples_of_64_bits(tmp_path):
    data = (voice().double() * (2**63 - 1024)).numpy().astype("<i8").tobytes()
    form = struct.pack("<HHIIHH", 1, 1, RATE, RATE * 8, 8, 64)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    torch.testing.assert_close(read_recording(path).samples[0], voice(), atol=1e-6, rtol=0)


def test_special_files_and_playlists_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    int_wav(tmp_path / "other.wav", RATE)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.wav\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile other.wav\n")
    for name, message in {"pipe.wav": "a pipe", "list.m3u8": "cannot be opened", "list.ffconcat": "cannot be"}.items():
        with pytest.raises(ConfigError, match=message):
            read_recording(tmp_path / name)
    with pytest.raises(ConfigError, match="device"):
        read_recording("/dev/zero")
