"""Damaged media files, and what reading them gives: python media_mutations.py SEED COUNT prints one JSON of all of it.

Run as a process of its own, so that a crash or a hang of a library in C is seen from outside.
"""

import faulthandler
import io
import json
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from wan_s2v_core.conditioning.image import read_picture
from wan_s2v_core.conditioning.timeline import loudness
from wan_s2v_core.errors import WanS2VError
from wan_s2v_core.io.audio import check_recording, read_recording, sound_blocks
from wan_s2v_core.io.video import frames_of, probe_video, read_frames, read_header

LONGEST_SECONDS = 60
SOUNDS = [("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("wav", "pcm_u8"), ("flac", "flac"), ("mp3", "libmp3lame"),
          ("m4a", "aac"), ("ogg", "libopus"), ("ac3", "ac3"), ("aiff", "pcm_s24be"), ("caf", "alac"),
          ("wv", "wavpack"), ("au", "pcm_mulaw")]  # fmt: skip
FILMS = [
    ("mp4", "libx264", "yuv420p", "aac"),
    ("mkv", "ffv1", "bgr0", "flac"),
    ("webm", "libvpx-vp9", "yuv420p", "libopus"),
    ("avi", "mjpeg", "yuvj420p", "pcm_s16le"),
    ("mov", "png", "rgba", "pcm_s16be"),
    ("ts", "mpeg2video", "yuv420p", "mp2"),
    ("mkv", "libx265", "yuv420p10le", "ac3"),
    ("gif", "gif", "rgb8", None),
]
PICTURES = ["png", "jpeg", "webp", "gif", "tiff", "bmp", "tga", "ppm", "ico", "jp2", "avif", "pcx", "sgi", "dds"]


def whole_files() -> dict[str, bytes]:
    """Sound, films and pictures of many kinds, small."""
    made = {}
    for number, (suffix, codec) in enumerate(SOUNDS):
        made[f"sound{number}.{suffix}"] = film(suffix, None, None, codec)
    for number, (suffix, codec, pixels, sound) in enumerate(FILMS):
        made[f"film{number}.{suffix}"] = film(suffix, codec, pixels, sound)
    for suffix in PICTURES:
        content, image = io.BytesIO(), Image.effect_noise((48, 40), 90).convert("RGB")
        image.save(content, {"jp2": "JPEG2000", "tga": "TGA"}.get(suffix, suffix.upper()))
        made[f"picture.{suffix}"] = content.getvalue()
    deep, content = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), io.BytesIO()
    exif = deep.getexif()
    exif[0x0112] = 6
    deep.save(content, "PNG", exif=exif)
    return made | {"deep.png": content.getvalue()}


def film(suffix: str, codec: str | None, pixels: str | None, sound: str | None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{suffix}"
        with av.open(str(path), "w") as container:
            if codec:
                pictures = container.add_stream(codec, rate=10)
                pictures.width, pictures.height, pictures.pix_fmt = 64, 48, pixels
            if sound:
                rate = 48000
                voice = container.add_stream(sound, rate=rate, layout="stereo")
            for number in range(8 if codec else 0):
                content = np.full((48, 64, 3), 30 * number, np.uint8)
                picture = av.VideoFrame.from_ndarray(content, format="rgb24")
                picture.pts, picture.time_base = number, Fraction(1, 10)
                container.mux(pictures.encode(picture))
            if sound:
                tone = 0.3 * np.sin(np.arange(2 * 40000) / 9).astype(np.float32)[None]
                frame = av.AudioFrame.from_ndarray(tone, format="flt", layout="stereo")
                frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
                container.mux(voice.encode(frame))
                container.mux(voice.encode(None))
            if codec:
                container.mux(pictures.encode(None))
        return path.read_bytes()


def damaged(content: bytes, others: list[bytes], chance: np.random.Generator) -> tuple[str, bytes]:
    """One way that a file comes to harm, and the file."""
    data, size = bytearray(content), len(content)
    near = int(chance.integers(0, min(size, 300)))
    place = int(chance.integers(0, size))
    kind = str(chance.choice(["cut", "flips", "header flips", "large number", "other head", "zeros", "twice", "noise"]))
    if kind == "cut":
        del data[place:]
    elif kind in ("flips", "header flips"):
        span = min(size, 300) if kind == "header flips" else size
        for index in chance.integers(0, span, int(chance.integers(1, 12))):
            data[index] ^= 1 << int(chance.integers(8))
    elif kind == "large number":
        value = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80"]
        data[near : near + 4] = value[int(chance.integers(len(value)))]
    elif kind == "other head":
        other = others[int(chance.integers(len(others)))]
        data[:near] = other[:near]
    elif kind == "zeros":
        data[place : place + 500] = bytes(len(data[place : place + 500]))
    elif kind == "twice":
        data[place:place] = data[near : near + 2000]
    else:
        data[place : place + 200] = chance.bytes(len(data[place : place + 200]))
    return kind, bytes(data)


def readings(path: Path) -> list:
    return [
        lambda: check_recording(read_recording(path)),
        lambda: read_recording(path, 0.3, 0.5).speech(),
        lambda: loudness(sound_blocks(path), 3600),
        lambda: read_frames(path, 16, 0, 20),
        lambda: read_frames(path, 16, 5, 2),
        lambda: sum(1 for _ in zip(frames_of(path), range(30), strict=False)),
        lambda: probe_video(path),
        lambda: read_header(path),
        lambda: read_picture(path),
    ]


def most_anonymous_bytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def attack(seed: int, count: int) -> dict:
    """Damage `count` files and read each in every way."""
    chance, whole = np.random.default_rng(seed), whole_files()
    names, outcomes, problems, slowest = list(whole), Counter(), [], 0.0
    resident = most_anonymous_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            name = names[number % len(names)] if count >= len(names) else names[int(chance.integers(len(names)))]
            kind, content = damaged(whole[name], list(whole.values()), chance)
            path = Path(folder) / f"{number}-{name}"
            path.write_bytes(content)
            for reading, call in enumerate(readings(path)):
                began = time.monotonic()
                faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True)
                try:
                    call()
                    outcomes["read"] += 1
                except WanS2VError as error:
                    outcomes["refused"] += 1
                    if "\n" in str(error) or len(str(error)) > 600:
                        problems.append([name, kind, reading, f"not one short line: {str(error)[:300]}"])
                except Exception:
                    problems.append([name, kind, reading, traceback.format_exc()[-600:]])
                faulthandler.cancel_dump_traceback_later()
                slowest = max(slowest, time.monotonic() - began)
            path.unlink()
    taken = most_anonymous_bytes() - resident
    return {**outcomes, "problems": problems, "slowest_seconds": round(slowest, 2), "most_bytes": taken}


if __name__ == "__main__":
    print(json.dumps(attack(int(sys.argv[1]), int(sys.argv[2]))))
