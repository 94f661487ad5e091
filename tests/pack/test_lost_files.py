"""Files that are gone or broken between runs: what ComfyUI has cached of them is made again, and no more than that."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

SAMPLE, SAVE, NODE = "6", "7", "1"
CLIPS = "wan_s2v_clips"


@pytest.fixture
def saved(comfy, run):
    """Run a prompt that must succeed -> the run, and the video it tells of, which must be there."""

    def make(prompt: dict, comfy=comfy, run=run):
        ended = run(prompt)
        assert ended.status == "success", (ended.errors, ended.node_errors)
        path = comfy.videos(ended)[-1]
        assert path.is_file() and path.stat().st_size
        return ended, path

    return make


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sampled(ended) -> bool:
    """Whether anything was denoised."""
    return any(node.endswith(SAMPLE) or node.endswith("WanS2VSample") for node, _, _ in ended.progress)


def test_an_emptied_output_folder_is_filled_again(graph, saved, comfy, watch, new_seed):
    prompt = {"seed": new_seed(), "seconds": 1.0}
    _, first = saved(graph(**prompt, format="lossless-mkv"))
    expected = watch(first).pictures
    empty(comfy.output)
    ended, again = saved(graph(**prompt, format="h264-mp4"))
    assert sampled(ended) and again.suffix == ".mp4"
    empty(comfy.output)
    ended, again = saved(graph(**prompt, format="lossless-mkv"))
    assert np.array_equal(watch(again).pictures, expected)


def test_a_deleted_video_is_made_again_from_its_clips(graph, saved, run, watch, new_seed):
    prompt = graph(seed=new_seed(), format="lossless-mkv")
    _, video = saved(prompt)
    expected = watch(video).pictures
    video.unlink()
    ended, video = saved(prompt)
    assert SAMPLE not in ended.started and np.array_equal(watch(video).pictures, expected)
    again = run(prompt)
    assert again.status == "success" and not again.started, "nothing is missing"


def test_a_clip_that_was_changed_is_made_again(graph, saved, comfy, watch, new_seed):
    """Only that one: two clips, of which the second is damaged between two runs of one server."""
    prompt = {"seed": new_seed(), "seconds": 2.0, "steps": 2, "format": "lossless-mkv"}
    _, video = saved(graph(**prompt))
    folder = max((comfy.output / CLIPS).iterdir(), key=lambda path: path.stat().st_mtime)
    film = folder / "clip_0001.mkv"
    content = bytearray(film.read_bytes())
    content[len(content) // 2] ^= 255
    film.write_bytes(content)
    ended, again = saved(graph(**prompt, filename_prefix="other"))
    steps = [value for node, value, _ in ended.progress if node == SAMPLE]
    assert min(steps) == 3, "the first clip is as it was"
    assert np.array_equal(watch(again).pictures, watch(video).pictures)


def test_another_format_samples_nothing_without_any_cache(graph, saved, start_comfy, watch, new_seed):
    """So it is after a restart, too: what is known of the last saved video is on the disk."""
    prompt = {"seed": new_seed(), "seconds": 1.0}
    with start_comfy("--cache-none") as server:
        there = {"comfy": server, "run": server.client.run}
        ended, first = saved(graph(**prompt, format="lossless-mkv"), **there)
        assert sampled(ended)
        for change in ({"format": "vp9-webm"}, {"format": "lossless-mkv", "filename_prefix": "elsewhere/name"}):
            ended, last = saved(graph(**prompt, **change), **there)
            assert not sampled(ended)
        assert np.array_equal(watch(first).pictures, watch(last).pictures)
        assert len([path for path in (server.output / CLIPS).iterdir() if path.is_dir()]) == 1
        saved(graph(**prompt | {"seed": new_seed()}), **there)
        (left,) = (server.output / CLIPS).iterdir()
        assert json.loads((left / "settings.json").read_text())["saved"] is True, "those of the last video"


def test_the_one_node_makes_again_what_is_gone(run, saved, comfy, write_sound, write_picture, new_seed):
    files = {"picture": write_picture("lost.png"), "voice": write_sound("lost.wav", 0.5)}
    common = {"checkpoint": "embedded demo", "prompt": "", "preset": "quick look", "size": "auto", "seed": new_seed()}

    def prompt(**changes) -> dict:
        inputs = files | common | {"format": "lossless-mkv", "filename_prefix": "lost/video"} | changes
        return {NODE: {"class_type": "WanS2VTalkingVideo", "inputs": inputs}}

    _, video = saved(prompt())
    video.unlink()
    ended, video = saved(prompt())
    assert not sampled(ended)
    again = run(prompt())
    assert again.status == "success" and not again.started
    empty(comfy.output)
    ended, _ = saved(prompt(format="h264-mp4"))
    assert sampled(ended)


def test_settings_tell_no_folders(graph, run, comfy, new_seed):
    assert run(graph(seed=new_seed(), keep_clips=True)).status == "success"
    folders = [path for path in (comfy.output / CLIPS).iterdir() if path.is_dir()]
    for text in ((folder / "settings.json").read_text(encoding="utf-8") for folder in folders):
        assert str(comfy.base) not in text and str(Path(__file__).parents[2]) not in text


def test_a_folder_that_another_server_uses_is_left_to_it(graph, run, comfy, new_seed):
    """As if a second server went on with the same clips just now."""
    prompt = graph(seed=new_seed(), seconds=2.0, steps=4)
    before = set((comfy.output / CLIPS).iterdir()) if (comfy.output / CLIPS).is_dir() else set()
    assert run(prompt, interrupt_on_progress=6).status == "interrupted"
    (folder,) = set((comfy.output / CLIPS).iterdir()) - before
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run(prompt)
        assert ended.status == "success" and min(value for node, value, _ in ended.progress if node == SAMPLE) == 5
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    os.unlink(lock.name)


def test_a_damaged_folder_of_clips_stops_no_run(graph, saved, comfy, new_seed):
    """Of another run, beside all others: deep settings, pipes and huge files as records."""
    prompt = graph(seed=new_seed())
    for number, harm in enumerate((deep_settings, pipes, huge_files)):
        folder = comfy.output / CLIPS / f"20260101_00000{number}_abcdef"
        folder.mkdir(parents=True)
        harm(folder)
    saved(prompt)


def deep_settings(folder: Path) -> None:
    (folder / "settings.json").write_text("[" * 100_000)
    (folder / "clip_0000.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")


def pipes(folder: Path) -> None:
    for name in ("settings.json", "clip_0000.safetensors", "clip_0000.mkv"):
        os.mkfifo(folder / name)


def huge_files(folder: Path) -> None:
    for name in ("settings.json", "clip_0000.safetensors", "clip_0000.mkv"):
        with open(folder / name, "wb") as file:
            file.truncate(10**11)
