"""Runs that are killed at a write, each in a child of this process, which itself computes nothing and so has no
threads that a child would wait for. `python killed_runs.py FOLDER CHECKPOINT SEED SCENE`.

FOLDER holds voice.wav and face.png.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pooled_vae import pool

from wan_s2v_core.config import SamplingConfig, VideoConfig
from wan_s2v_core.io.video import VideoWriter, read_frames
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.model.loading import find_part
from wan_s2v_core.render import RenderRequest, render

WRITES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
KILLED, NEVER = 9, 10**9
box, checkpoint = Path(sys.argv[1]), sys.argv[2]
chance, scene = random.Random(int(sys.argv[3])), sys.argv[4]
pool(pytest.MonkeyPatch())
for kind in PART_LABELS:  # what this imports takes longer than a run, and children need not do it again
    find_part(checkpoint, kind).build()


def make(name: str, **changes) -> None:
    files = (checkpoint, str(box / "voice.wav"), str(box / "face.png"), str(box / name))
    request, video = RenderRequest(*files, **changes), VideoConfig(max_area=64 * 64, clip_frames=20)
    render(request, video, SamplingConfig(steps=1, seed=3, guidance_scale=1.0))


def child(work: Callable[[], object], number: int = NEVER) -> int:
    """Do work in a child that ends without a word before its write with that number, from 1 -> the writes it saw."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        torch.set_num_threads(1)
        writes = []

        def count(event: str, arguments: tuple) -> None:
            told = arguments and isinstance(arguments[0], (str, os.PathLike)) and str(box) in str(arguments[0])
            opens = event == "open" and told and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if told and (event in WRITES or opens):
                writes.append(event)
                os.write(writer, b".")
                if len(writes) == number:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        seen = len(pipe.read())
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED), f"the child failed by itself, killed at {number}"
    return seen


def same(name: str, other: str) -> None:
    one, two = (read_frames(box / file, 16, 0, 99) for file in (name, other))
    assert torch.equal(one, two), (name, other)


def left(name: str) -> list[str]:
    return sorted(path.name for path in box.iterdir() if name in path.name and path.name != f"{name}.mkv")


def plain() -> None:
    """At any write, not the first but the last ones too: while clips are removed."""
    child(lambda: make("whole.mkv"))
    writes = child(lambda: make("counted.mkv"))
    assert writes > 20, writes
    for number in (2, writes - 1, *chance.sample(range(3, writes - 1), 3)):
        child(lambda: make("out.mkv"), number)
        child(lambda: make("out.mkv"))
        child(lambda: same("out.mkv", "whole.mkv"))
        assert left("out") == [], (number, left("out"))
        (box / "out.mkv").unlink()


def film(name: str, pictures: torch.Tensor) -> None:
    with VideoWriter(box / name, 64, 96, 16, preset="lossless-mkv") as writer:
        writer.write(pictures)


def apart() -> None:
    """A driving video that changes in its second clip: the first clip is brought from the folder that is renamed."""
    pictures = torch.randint(0, 255, (40, 96, 64, 3), dtype=torch.uint8)
    changed = torch.cat([pictures[:30], 255 - pictures[30:]])
    child(lambda: film("a.mkv", pictures))
    child(lambda: film("b.mkv", changed))
    child(lambda: make("first.mkv", pose_video=str(box / "a.mkv"), keep_clips=True))
    child(lambda: make("whole.mkv", pose_video=str(box / "b.mkv")))
    kept = {path.name: path.read_bytes() for path in (box / "first.mkv.clips").glob("clip*")}
    for number in chance.sample(range(3, 16), 3):
        shutil.copytree(box / "first.mkv.clips", box / "out.mkv.clips")
        child(lambda: make("out.mkv", pose_video=str(box / "b.mkv")), number)
        child(lambda: make("out.mkv", pose_video=str(box / "b.mkv")))
        child(lambda: same("out.mkv", "whole.mkv"))
        found = {path.name: path.read_bytes() for path in (box / "out.mkv.clips.1").glob("clip*")}
        assert found == kept, "the other video's clips are there"
        for path in box.glob("out.mkv*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


{"plain": plain, "apart": apart}[scene]()
