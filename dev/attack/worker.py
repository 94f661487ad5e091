"""The child that the inputs are given to, one after the other: torch is imported once, and what hangs is killed alone.

Reads jobs as lines of JSON and answers each with one. It calls the project as a person does: its command line, and the
readers of sound, pictures and driving videos for what no film shows.
"""

import contextlib
import faulthandler
import gc
import hashlib
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder, whose modules have everyday names

import numpy as np  # noqa: E402
import torch  # noqa: E402

from wan_s2v_core.cli import main as command_line  # noqa: E402
from wan_s2v_core.errors import WanS2VError  # noqa: E402

LONGEST_ANSWER = 20_000
FPS, POSE_FRAMES = 16, 12
SOUND_SECONDS = 4.0


def as_on_a_terminal(run: Callable[[], int]) -> dict[str, Any]:
    """Exit code, stdout and stderr of a command, in the encodings that a terminal has; or the traceback."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = (io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8", "backslashreplace"))
    logging.root.handlers.clear()  # the command sets up logging to the stderr of now
    answer: dict[str, Any] = {}
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            answer["code"] = run()
            streams[0].flush()
        except SystemExit as stop:
            answer["code"] = stop.code
        except BaseException:
            answer["traceback"] = traceback.format_exc()[-LONGEST_ANSWER:]
        streams[1].flush()
    for stream in streams:
        stream.detach()
    texts = {"out": out.getvalue(), "err": err.getvalue()}
    return answer | {name: text.decode("utf-8", "replace")[-LONGEST_ANSWER:] for name, text in texts.items()}


def command(arguments: list[str]) -> dict[str, Any]:
    return as_on_a_terminal(lambda: command_line(arguments))


def film(path: str) -> dict[str, Any]:
    """Facts about a film: its pictures as one number, their mean and spread, and its sound."""
    import av

    pictures, sound = hashlib.sha256(), hashlib.sha256()
    frames, sums, samples, squares, rate = 0, np.zeros(3), 0, 0.0, 0
    with av.open(path) as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}
        for frame in container.decode(video=0):
            picture = frame.to_ndarray(format="rgb24")
            pictures.update(picture.tobytes())
            values = picture.astype(np.float64)
            sums += (values.size, values.sum(), (values**2).sum())
            frames += 1
    with av.open(path) as container:
        for frame in container.decode(audio=0) if container.streams.audio else ():
            block, rate = frame.to_ndarray(), frame.sample_rate
            sound.update(block.tobytes())
            scale = float(np.iinfo(block.dtype).max) if block.dtype.kind == "i" else 1.0
            samples, squares = (
                samples + frame.samples,
                squares + float((block / scale).__pow__(2).mean()) * frame.samples,
            )
    count, total, square = sums
    mean = total / max(count, 1)
    return {
        "frames": frames,
        "digest": pictures.hexdigest(),
        "sound_digest": sound.hexdigest(),
        "mean": mean,
        "spread": float(np.sqrt(max(0.0, square / max(count, 1) - mean**2))),
        "sound_seconds": samples / rate if rate else 0.0,
        "loudness": float(np.sqrt(squares / max(samples, 1))),
        "comment": tags.get("comment", "")[:2000],
    }


def read(what: str, path: str) -> dict[str, Any]:
    """What a reader of the project makes of a file, as facts; or its refusal."""
    found: dict[str, Any] = {}

    def look() -> int:
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
        try:
            found.update(READERS[what](path))
        except WanS2VError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return as_on_a_terminal(look) | {"found": found}


def read_sound(path: str) -> dict[str, Any]:
    from wan_s2v_core.io.audio import check_recording, read_recording

    recording = read_recording(path, 0.0, SOUND_SECONDS)
    check_recording(recording)
    heard = recording.speech().double().numpy()
    strengths = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    return {
        "channels": len(recording.samples),
        "rate_hz": recording.rate_hz,
        "seconds": recording.seconds,
        "peak": float(recording.samples.abs().max()),
        "heard": float(np.sqrt((heard**2).mean())),
        "tone_hz": float(strengths.argmax() * 16000 / len(heard)),
    }


def read_still(path: str) -> dict[str, Any]:
    from wan_s2v_core.conditioning.image import read_picture

    return quarters(read_picture(path).numpy())


def read_pose(path: str) -> dict[str, Any]:
    from wan_s2v_core.io.video import DrivingVideo

    frames = DrivingVideo(path, FPS)(0, POSE_FRAMES).numpy()
    return quarters(frames[0]) | {"frames": len(frames)} if len(frames) else {"frames": 0}


def quarters(picture: np.ndarray) -> dict[str, Any]:
    """Size, and the colours in the middle of the four quarters of a picture, row by row."""
    height, width = picture.shape[:2]
    colours = []
    for row in (height // 4, 3 * height // 4):
        for column in (width // 4, 3 * width // 4):
            around = picture[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            colours.append([round(float(value)) for value in around.reshape(-1, around.shape[-1]).mean(0)])
    return {"height": height, "width": width, "colours": colours}


READERS = {"sound": read_sound, "picture": read_still, "pose": read_pose}


def start(arguments: list[str], log: str) -> dict[str, Any]:
    """Begin a command in a process of its own, as it would be on a terminal, but for the import of torch."""
    gc.collect()
    gc.freeze()  # what is left of decoders must not be freed in the new process: their threads are not there
    pid = os.fork()
    if pid:
        return {"pid": pid}
    code, has_begun = 1, False
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.root.handlers.clear()
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        has_begun = True
        code = command_line(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        if has_begun or not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        else:  # Ctrl-C met what stands here for the start of Python
            os.write(2, b"error: stopped.\n")
            code = 130
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> dict[str, Any]:
    """The exit code of a process that was begun, or minus the signal that ended it; nothing if it still runs."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() >= deadline:
            return {}
        time.sleep(0.002)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "command": command,
    "film": film,
    "read": read,
    "start": start,
    "wait": wait,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print never mixes with the answers
    faulthandler.enable()
    torch.set_num_threads(1)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = JOBS[job.pop("do")](**job)
        except Exception:  # of this file, not of the project
            answer = {"broken": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
