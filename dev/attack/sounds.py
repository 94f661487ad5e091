"""Sound files as people have them, and damaged ones: a tone in many codecs, containers, rates and layouts."""

import os
import random
import struct
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from .kinds import Kinds
from .outcome import BAD, GOOD, SAME_OR_REFUSED

KINDS = Kinds()
SECONDS = 0.8
TONES = (220.0, 440.0, 660.0)


@dataclass(frozen=True)
class Tone:
    """What is to be heard in a good file. None is not checked."""

    tone_hz: float | None
    seconds: float | None = SECONDS
    loudness: float | None = None
    """RMS of what the encoder hears, full scale 1; within 3 dB and what codecs change."""


def tone(hz: float, rate: int, seconds: float = SECONDS, channels: int = 1, level: float = 0.3) -> np.ndarray:
    """N C float64."""
    times = np.arange(round(rate * seconds)) / rate
    return np.repeat(level * np.sin(2 * np.pi * hz * times)[:, None], channels, 1)


CODECS = {  # name -> suffix, rates, most channels
    "pcm_u8": ("wav", (8000, 16000, 44100), 8),
    "pcm_s16le": ("wav", (8000, 11025, 22050, 44100, 48000, 96000, 192000), 8),
    "pcm_s24le": ("wav", (44100, 48000, 96000), 8),
    "pcm_s32le": ("wav", (48000, 192000), 6),
    "pcm_f32le": ("wav", (16000, 44100, 192000), 8),
    "pcm_f64le": ("wav", (44100, 96000), 2),
    "pcm_mulaw": ("wav", (8000,), 2),
    "pcm_alaw": ("wav", (8000,), 1),
    "adpcm_ms": ("wav", (22050,), 2),
    "adpcm_ima_wav": ("wav", (22050, 44100), 2),
    "pcm_s16be": ("aiff", (44100,), 2),
    "flac": ("flac", (16000, 44100, 96000), 8),
    "alac": ("m4a", (44100, 48000), 2),
    "libmp3lame": ("mp3", (16000, 22050, 44100, 48000), 2),
    "aac": ("m4a", (16000, 44100, 48000), 6),
    "libopus": ("opus", (48000,), 2),
    "ac3": ("ac3", (44100, 48000), 6),
    "eac3": ("mka", (48000,), 6),
    "mp2": ("mp2", (44100,), 2),
    "wmav2": ("asf", (44100,), 2),
    "tta": ("tta", (44100,), 2),
    "wavpack": ("wv", (44100,), 2),
}
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
CONTAINERS = {
    "aac": ("m4a", "mp4", "mov", "mkv", "ts", "flv", "aac"),
    "libmp3lame": ("mp3", "mkv", "avi", "mp4"),
    "flac": ("flac", "mka", "ogg"),
}
CONTAINERS |= {"pcm_s16le": ("wav", "avi", "mov", "mkv", "w64", "nut"), "libopus": ("opus", "ogg", "webm", "mka")}


def encode(path: Path, samples: np.ndarray, rate: int, codec: str, layout: str | None = None, first: int = 0) -> None:
    """Write N C into a file whose suffix says which container. first: time stamp of the first sample."""
    suffix = path.suffix[1:]
    forced = {"aac": "adts", "ts": "mpegts", "mka": "matroska", "au": "au", "asf": "asf", "opus": "opus"}.get(suffix)
    with av.open(str(path), "w", format=forced) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout or LAYOUTS[samples.shape[1]])
        if codec == "wmav2":
            stream.codec_context.bit_rate = 128_000  # it has no usual one
        feed_sound(container, stream, samples, first)


def feed_sound(container: Any, stream: Any, samples: np.ndarray, first: int = 0) -> None:
    """Encode N C, all of it."""
    context = stream.codec_context
    layout, rate = context.layout.name, context.sample_rate
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), format="dbl", layout=layout)
    frame.sample_rate = rate
    fifo = av.AudioFifo()
    for part in av.AudioResampler(format=context.format, layout=layout, rate=rate).resample(frame):
        part.pts = None
        fifo.write(part)
    place = first
    while fifo.samples:
        piece = fifo.read(context.frame_size or 1024, partial=True)
        piece.pts, piece.time_base = place, Fraction(1, rate)
        place += piece.samples
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def any_sound(chance: random.Random, folder: Path, codec: str | None = None) -> tuple[Path, Tone]:
    """A good file of a codec by chance; all channels are alike."""
    codec = codec or chance.choice(sorted(CODECS))
    suffix, rates, most = CODECS[codec]
    suffix = chance.choice(CONTAINERS.get(codec, (suffix,)))
    channels = chance.choice([1, 1, 2, 2, *range(1, most + 1)])
    if suffix in ("flv", "aac", "avi", "ogg", "w64", "nut", "ts"):
        channels = min(channels, 2)
    rate, hz = chance.choice(rates), chance.choice(TONES)
    if suffix == "flv":
        rate = 44100
    path = folder / f"voice.{suffix}"
    encode(path, tone(hz, rate, channels=channels), rate, codec)
    return path, Tone(hz)


def plain_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> None:
    """16 bits, N C in -1 to 1."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def raw_wav(
    path: Path, data: bytes, tag: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16, **facts: int
) -> None:
    """A WAV of just these facts; `align`, `riff` and `size` instead of the right ones."""
    align = facts.get("align", max(1, channels * bits // 8) % 65536)
    head = struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits)
    body = (
        b"WAVEfmt "
        + struct.pack("<I", len(head))
        + head
        + b"data"
        + struct.pack("<I", facts.get("size", len(data)) % 2**32)
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", facts.get("riff", len(body) + len(data)) % 2**32) + body + data)


# --- good files ----------------------------------------------------------------------------------------------------


@KINDS.add(GOOD)
def sound_of_any_codec(chance, folder):
    return any_sound(chance, folder)


@KINDS.add(GOOD)
def wav_of_any_form(chance, folder):
    codec = chance.choice([name for name, facts in CODECS.items() if facts[0] == "wav"])
    return any_sound(chance, folder, codec)


@KINDS.add(GOOD)
def sound_with_a_wrong_suffix(chance, folder):
    path, heard = any_sound(chance, folder, chance.choice(("pcm_s16le", "flac", "libmp3lame", "aac")))
    other = folder / f"voice.{chance.choice(('png', 'txt', 'mp3', 'wav', 'MP4', 'm3u8', 'sdp', 'concat', 'ffconcat'))}"
    path.rename(other)
    return other, heard


@KINDS.add(GOOD)
def names_that_look_like_something_else(chance, folder):
    path, heard = any_sound(chance, folder, "pcm_s16le")
    names = (
        "voice%03d.wav",
        "http:__x.wav",
        "-i.wav",
        "concat:a|b.wav",
        "a b ' \".wav",
        "声音 🎤.wav",
        "x\n.wav",
        "take:1.wav",
    )
    other = folder / chance.choice((*names, "x" * 240 + ".wav", "~.wav", "$HOME.wav", ".hidden"))
    path.rename(other)
    return other, heard


@KINDS.add(GOOD)
def one_voice_in_one_channel(chance, folder):
    """The others are silent, as interfaces with two inputs record it."""
    channels = chance.choice((2, 4, 6))
    place, hz = chance.choice((0, 1, 2)) % channels, chance.choice(TONES)
    samples = tone(hz, 44100, channels=channels)
    samples[:, [other for other in range(channels) if other != place]] = 0
    path = folder / "voice.wav"
    encode(path, samples, 44100, "pcm_s16le")
    return path, Tone(hz)


@KINDS.add(GOOD)
def opposite_channels(chance, folder):
    hz, path = chance.choice(TONES), folder / "voice.wav"
    samples = tone(hz, 44100, channels=2)
    samples[:, 1] *= -chance.choice((1.0, 0.999, 0.97))
    encode(path, samples, 44100, chance.choice(("pcm_s16le", "pcm_f32le")))
    return path, Tone(hz, loudness=0.3 / 2**0.5)


@KINDS.add(GOOD)
def levels_of_all_kinds(chance, folder):
    """Very soft, with an offset, at full scale, or a little beyond it."""
    hz, path = chance.choice(TONES), folder / "voice.wav"
    level, offset = chance.choice(((1e-3, 0), (0.3, 0.5), (1.0, 0), (0.99, 0), (1.5, 0)))
    encode(path, tone(hz, 44100, level=level) + offset, 44100, "pcm_f32le")
    return path, Tone(hz if not offset else None)


@KINDS.add(GOOD)
def video_with_sound(chance, folder):
    hz = chance.choice(TONES)
    path = folder / f"clip.{chance.choice(('mp4', 'mkv', 'mov', 'avi'))}"
    with av.open(str(path), "w") as container:
        pictures = picture_stream(container)
        sound = container.add_stream(chance.choice(("aac", "libmp3lame")), rate=44100, layout="stereo")
        feed_pictures(container, pictures, 12)
        feed_sound(container, sound, tone(hz, 44100, channels=2))
    return path, Tone(hz)


def picture_stream(container: Any, side: int = 32) -> Any:
    stream = container.add_stream("mpeg4", rate=16)
    stream.width = stream.height = side
    stream.pix_fmt = "yuv420p"
    return stream


def feed_pictures(container: Any, stream: Any, frames: int) -> None:
    for number in range(frames):
        grey = np.full((stream.height, stream.width, 3), number * 9 % 256, np.uint8)
        picture = av.VideoFrame.from_ndarray(grey, format="rgb24")
        picture.pts, picture.time_base = number, Fraction(1, 16)
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))


@KINDS.add(GOOD)
def several_tracks(chance, folder):
    """All but one are other tones; the one that is marked as default is meant, in whatever place."""
    path, meant, tracks = folder / "tracks.mkv", chance.randrange(3), []
    with av.open(str(path), "w") as container:
        for number in range(3):
            stream = container.add_stream("flac", rate=44100, layout="mono")
            stream.disposition = av.stream.Disposition.default if number == meant else av.stream.Disposition(0)
            tracks.append(stream)
        for stream, hz in zip(tracks, TONES, strict=True):
            feed_sound(container, stream, tone(hz, 44100))
    return path, Tone(TONES[meant])


@KINDS.add(GOOD)
def sound_that_starts_late(chance, folder):
    """Seconds of silence before it, or a time stamp far below 0 or far from it."""
    hz, path = chance.choice(TONES), folder / "late.mkv"
    late = chance.choice((0.5, 3.0, -0.3))
    encode(path, tone(hz, 16000), 16000, "flac", first=round(late * 16000))
    return path, Tone(None, None)


@KINDS.add(GOOD)
def tags_of_megabytes(chance, folder):
    """Pictures and texts before the sound."""
    path, heard = any_sound(chance, folder, "libmp3lame")
    if path.suffix == ".mp3":
        size = 3_000_000
        packed = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\x00\x00" + packed + bytes(size) + path.read_bytes())
    return path, heard


@KINDS.add(GOOD)
def two_files_in_one(chance, folder):
    """Joined by appending, which these formats allow."""
    path, other = folder / "voice.mp3", folder / "more.mp3"
    rates = (44100, chance.choice((44100, 22050)))
    for place, rate in zip((path, other), rates, strict=True):
        encode(place, tone(440, rate), rate, "libmp3lame")
    path.write_bytes(path.read_bytes() + other.read_bytes())
    return path, Tone(440 if rates[0] == rates[1] else None, None)


# --- odd ones ------------------------------------------------------------------------------------------------------


@KINDS.add(SAME_OR_REFUSED)
def facts_of_a_wav(chance, folder):
    """One fact of the header is another; the data is that of 16 bits."""
    data = (tone(440, 16000) * 32767).astype("<i2").tobytes()
    wrong = (
        {"rate": chance.choice((0, 1, 7, 999, 3999, 400_000, 10**6, 2**31 - 1, 2**32 - 1))},
        {"channels": chance.choice((0, 9, 17, 64, 255, 256, 65535))},
        {"bits": chance.choice((0, 1, 4, 7, 12, 63, 64, 65, 128, 65535))},
        {"align": chance.choice((0, 1, 3, 65535))},
        {"tag": chance.choice((0, 2, 3, 6, 7, 17, 85, 255, 352, 0xFFFE, 0xFFFF, 0x2000))},
        {"size": chance.choice((0, 1, len(data) + 1, 2**31, 2**32 - 1, 2**32 - 2))},
        {"riff": chance.choice((0, 4, 2**32 - 1))},
    )
    raw_wav(folder / "voice.wav", data, **chance.choice(wrong))
    return folder / "voice.wav", Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def floats_of_another_scale(chance, folder):
    """Integers written as floats, and values that are no numbers: refused, or brought to full scale with a word."""
    samples = tone(440, 16000)[:, 0]
    scale = chance.choice((128.0, 32767.0, 8_388_607.0, 2.0**31, 1e30, 3e38))
    wrong = (
        samples * scale,
        np.where(np.arange(len(samples)) % 999 == 5, np.nan, samples),
        np.full_like(samples, np.inf),
        samples * 1e-42,
    )
    values = chance.choice((wrong[0], wrong[0], *wrong)).astype(chance.choice(("<f4", "<f8")))
    raw_wav(folder / "voice.wav", values.tobytes(), tag=3, bits=values.itemsize * 8)
    return folder / "voice.wav", Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def sound_that_is_very_late(chance, folder):
    """A gap of hours, days or years in a few bytes."""
    late = chance.choice((3600, 50_000, 10**6, 10**8))
    encode(folder / "late.mkv", tone(440, 8000, 0.3), 8000, "flac", first=late * 8000)
    return folder / "late.mkv", Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def a_gap_in_the_middle(chance, folder):
    """Time stamps that jump, forwards or back."""
    path = folder / "gap.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=16000, layout="mono")
        samples = (tone(440, 16000)[:, 0] * 32767).astype(np.int16)
        jump = chance.choice((16000 * 5, 16000 * 86_400, 16000 * 10**7))
        for start in range(0, len(samples), 4000):
            piece = av.AudioFrame.from_ndarray(samples[None, start : start + 4000], format="s16", layout="mono")
            piece.sample_rate, piece.time_base = 16000, Fraction(1, 16000)
            piece.pts = start + (jump if start >= 8000 else 0)
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path, Tone(None, None)


@KINDS.add(BAD)
def files_without_sound(chance, folder):
    path = folder / "voice.wav"
    texts = (b"", b"RIFF", b"hello\n" * 9, b"<html>404</html>", bytes(4000), chance.randbytes(4000), b"\xff\xfb" * 5)
    ways = (
        lambda: path.write_bytes(chance.choice(texts)),
        lambda: raw_wav(path, b""),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/urandom"),
        lambda: path.symlink_to(path.name),
        lambda: os.mkfifo(path),
        lambda: write_silent_film(path),
    )
    chance.choice(ways)()
    return path, Tone(None, None)


def write_silent_film(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as container:
        feed_pictures(container, picture_stream(container), 8)


@KINDS.add(BAD)
def lists_that_name_other_files(chance, folder):
    """What FFmpeg follows: a picture of another user's file, or an address, must not get into a film."""
    secret = folder / "secret.wav"
    plain_wav(secret, tone(660, 16000))
    texts = {
        "voice.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "voice.wav": f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "voice.ffconcat": f"ffconcat version 1.0\nfile '{secret.name}'\n",
        "list.mp3": f"ffconcat version 1.0\nfile {secret.name}\n",
        "voice.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "voice.mpd": f"<MPD><Period><AdaptationSet><BaseURL>{secret}</BaseURL></AdaptationSet></Period></MPD>",
        "x.m3u8": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    }
    name = chance.choice(sorted(texts))
    (folder / name).write_text(texts[name])
    return folder / name, Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def sounds_that_change_on_the_way(chance, folder):
    """Rate or channels of the second half are others."""
    parts = [folder / "a.aac", folder / "b.aac"]
    encode(parts[0], tone(440, 44100, channels=2), 44100, "aac")
    encode(parts[1], tone(440, 16000), 16000, "aac")
    path = folder / "voice.aac"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path, Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def bits_of_a_sound_flipped(chance, folder):
    path, _ = any_sound(chance, folder)
    content = bytearray(path.read_bytes())
    stop = chance.choice((64, 600, len(content)))
    for _ in range(chance.choice((1, 8, 60))):
        content[chance.randrange(min(stop, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path, Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def stretches_of_a_sound_moved(chance, folder):
    """Cut, repeated, zeroed or exchanged."""
    path, _ = any_sound(chance, folder)
    content = path.read_bytes()
    first, second = sorted(chance.sample(range(len(content)), 2))
    ways = (
        content[:second],
        content[:first] + content[second:],
        content[:second] + content[first:],
        content[:first] + bytes(second - first) + content[second:],
        content[:first] + chance.randbytes(second - first) + content[second:],
        content[second:] + content[:second],
    )
    path.write_bytes(chance.choice(ways))
    return path, Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def numbers_in_a_container(chance, folder):
    """Four bytes of an index or header become a number that is very large or 0."""
    path, _ = any_sound(
        chance, folder, chance.choice(("aac", "libopus", "flac", "libmp3lame", "wavpack", "tta", "wmav2"))
    )
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 3))):
        place = chance.choice((chance.randrange(min(len(content), 1200)), chance.randrange(len(content)))) // 4 * 4
        content[place : place + 4] = chance.choice(
            (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0")
        )
    path.write_bytes(content)
    return path, Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def very_short_sounds(chance, folder):
    samples = chance.choice((1, 2, 5, 20, 399, 400, 401))
    plain_wav(folder / "voice.wav", tone(440, 16000)[:samples])
    return folder / "voice.wav", Tone(None, None)


@KINDS.add(SAME_OR_REFUSED)
def very_long_sounds(chance, folder):
    """Hours of silence, packed into kilobytes: of it half a second is used."""
    path = folder / "long.flac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        silence = np.zeros((1, 4096 * 64), np.int16)
        for number in range(chance.choice((60, 200))):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, number * silence.shape[1], Fraction(1, 8000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path, Tone(None, None)
