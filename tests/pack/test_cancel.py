"""Cancelling, and giving memory back: nothing finished is lost, nothing unfinished stays, and the server goes on."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

SAMPLE, SAVE = "6", "7"
STEPS = 12
"""So many that the end of a clip is far from its start; one takes about 0.1 s at 64x64."""
SOON = 2.0
"""Seconds within which a cancelled run ends, on busy cores too; on idle ones it takes a tenth of a second."""
CANCELS = 20
LEAK_MB = 50
"""Main memory that the server may take more after them all, or 5 % where that is more: 2.5 MB a run. The networks of
one take about 25 MB, the activations of one clip some 100 MB."""


@pytest.fixture
def clips(comfy):
    """New folders of clips since the test began: call it to look."""
    folder = comfy.output / "wan_s2v_clips"

    def listed() -> set[Path]:
        return set(folder.iterdir()) if folder.is_dir() else set()

    before = listed()
    return lambda: sorted(listed() - before)


@pytest.fixture
def cancelled(run, comfy):
    """Run a prompt and interrupt it at a value of its progress bar -> the run, and the seconds until nothing runs."""

    def cancel(prompt: dict, value: int, pause: float = 0.0):
        asked = []

        def stop(_: str, __: dict, state) -> None:
            if not asked and state.progress and state.progress[-1][1] >= value:
                time.sleep(pause)
                asked.append(time.monotonic())
                comfy.client.interrupt(state.prompt_id)

        ended = run(prompt, on_event=stop)
        while comfy.client.queue()["queue_running"]:
            time.sleep(0.01)
        return ended, time.monotonic() - asked[0]

    return cancel


@pytest.fixture
def free(comfy):
    """What the buttons in ComfyUI do: unload networks, forget cached results."""

    def post() -> None:
        comfy.client.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)  # the worker looks between prompts, and collects garbage then

    return post


def resident_mb(comfy) -> float:
    status = Path(f"/proc/{comfy.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def loads(comfy) -> int:
    """How many networks have been loaded from files so far; the log tells each."""
    return len(re.findall(r": \d+ tensors as torch\.\w+ on ", comfy.log()))


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_cancelled_in_the_second_clip(graph, cancelled, run, clips, comfy, watch):
    prompt = graph(seconds=3.0, steps=STEPS)
    ended, seconds = cancelled(prompt, STEPS + 2)
    assert ended.status == "interrupted" and seconds < SOON
    assert STEPS + 2 <= ended.step(SAMPLE)[0] < 2 * STEPS, "it stops at once, not at the end of the clip"
    (folder,) = clips()
    assert sorted(path.name for path in folder.iterdir()) == [
        "clip_0000.mkv",
        "clip_0000.safetensors",
        "motion.safetensors",
        "settings.json",
    ]
    shown = watch(folder / "clip_0000.mkv")
    assert len(shown.pictures) == 17 and shown.sound_seconds == pytest.approx(17 / 16, abs=0.01)
    assert json.loads((folder / "settings.json").read_text(encoding="utf-8"))["sampling"]["steps"] == STEPS
    assert not comfy.videos(ended) and not comfy.client.queue()["queue_running"]


def first_value(ended) -> int:
    """Where the sampler's progress bar began."""
    return min(value for node, value, _ in ended.progress if node == SAMPLE)


def test_a_cancelled_run_goes_on(graph, run, cancelled, free, clips, comfy, watch, new_seed):
    """The finished clip is not sampled again, in its own folder, and the video is that of an undisturbed run."""
    common = {"seconds": 3.0, "seed": new_seed(), "steps": STEPS, "format": "lossless-mkv"}
    ended, _ = cancelled(graph(**common), STEPS + 2)
    (folder,) = clips()
    written = (folder / "clip_0000.mkv").stat().st_mtime_ns
    ended = run(graph(**common, offload="always"))
    assert ended.status == "success" and first_value(ended) == STEPS + 1 and ended.step(SAMPLE) == (3 * STEPS,) * 2
    assert clips() == [folder] and (folder / "clip_0000.mkv").stat().st_mtime_ns == written
    assert len(list(folder.glob("*.mkv"))) == 3
    shown = watch(comfy.videos(ended)[-1])

    assert run(graph(seed=new_seed())).status == "success"
    free()
    assert wait_for(lambda: not folder.exists()), "its clips have become a video"
    ended = run(graph(**common))
    assert ended.status == "success" and first_value(ended) == 1
    whole = watch(comfy.videos(ended)[-1])
    assert len(whole.pictures) == 48 and np.array_equal(shown.pictures, whole.pictures)
    assert np.array_equal(shown.sound, whole.sound)


def test_kept_clips_are_not_touched_by_a_longer_run(graph, run, clips, comfy, watch, new_seed):
    """Two videos share a beginning: the first one's clips stay what they are, the second one's outlive them."""
    common = {"seconds": 3.0, "seed": new_seed(), "steps": 2, "format": "lossless-mkv"}
    assert run(graph(**common, max_clips=1, keep_clips=True)).status == "success"
    (first,) = clips()
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    ended = run(graph(**common))
    assert ended.status == "success" and first_value(ended) == 3 and len(clips()) == 2
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert len(watch(comfy.videos(ended)[-1]).pictures) == 48


def test_the_next_run_is_as_if_nothing_had_been(graph, film, cancelled, new_seed):
    """Uncancelled, cancelled and uncancelled again: the first and the last are the same video."""
    common = {"seconds": 2.0, "steps": 2, "format": "lossless-mkv"}
    seed = new_seed()
    expected = film(graph(**common, seed=seed)).pictures
    film(graph(**common, seed=new_seed()))
    ended, _ = cancelled(graph(**common, seed=new_seed()), 3)
    assert ended.status == "interrupted"
    again = film(graph(**common, seed=seed)).pictures
    assert np.array_equal(again, expected)


def test_cancelled_while_a_clip_is_decoded(graph, cancelled, clips, device, new_seed):
    """The decoder has no progress bar; it looks before each of its layers. It takes seconds at this size."""
    on_cpu = device == "cpu"
    size = (
        {"width": 256, "height": 256} if on_cpu else {"width": 1280, "height": 704, "clip_frames": 80, "seconds": 5.0}
    )
    prompt = graph(**{"seconds": 1.0, "steps": 2, **size, "seed": new_seed()})
    ended, seconds = cancelled(prompt, 2, pause=0.2 if on_cpu else 0.0)
    assert ended.status == "interrupted" and seconds < SOON
    assert ended.step(SAMPLE) == (2, 2) and not clips()


def test_cancelled_before_the_sampler(graph, run, comfy, new_seed):
    """The encoders have no progress bars either, and look before each of their layers."""

    def stop(kind: str, data: dict, state) -> None:
        if kind == "executing" and data.get("node") == "3":
            comfy.client.interrupt(state.prompt_id)

    ended = run(graph(seconds=14.0, start_seconds=0.1, seed=new_seed()), on_event=stop)
    assert ended.status == "interrupted" and SAMPLE not in ended.started


def test_another_prompt_id_is_not_cancelled(graph, run, comfy, new_seed):
    ended = run(
        graph(seed=new_seed(), steps=2),
        on_event=lambda kind, *_: comfy.client.interrupt("nobody") if kind == "progress" else None,
    )
    assert ended.status == "success"


def test_twenty_cancels(graph, run, film, cancelled, free, clips, comfy, watch, fresh_seed):
    """Each at a random step in one server's life: all end soon, memory stays where it was after the first video, and
    the run that goes on after the last of them makes that video again."""
    chance, steps = np.random.default_rng(fresh_seed), 4
    common = {"seconds": 1.6, "steps": steps, "format": "lossless-mkv"}
    prompts = [graph(**common, seed=int(chance.integers(2**62))) for _ in range(CANCELS)]
    values = [*chance.integers(1, 2 * steps, CANCELS - 1).tolist(), int(chance.integers(steps + 1, 2 * steps))]
    expected = film(prompts[-1])
    (folder,) = clips()
    film(graph(**common, seed=int(chance.integers(2**62))))
    assert not folder.exists(), "its clips have become a video, and so have later ones"
    before = resident_mb(comfy)
    free()  # newer versions of ComfyUI still have the first video in their cache after twenty others
    for prompt, value in zip(prompts, values, strict=True):
        ended, seconds = cancelled(prompt, value)
        assert ended.status == "interrupted" and seconds < SOON, (value, seconds, ended.errors)
    after = resident_mb(comfy)
    print(f"resident memory: {before:.0f} MB before, {after:.0f} MB after")
    assert after - before < max(LEAK_MB, 0.05 * before)
    ended = run(prompts[-1])
    assert ended.status == "success" and first_value(ended) == steps + 1
    shown = watch(comfy.videos(ended)[-1])
    assert np.array_equal(shown.pictures, expected.pictures) and np.array_equal(shown.sound, expected.sound)


def test_networks_stay_until_they_are_freed(graph, film, free, comfy, new_seed):
    seed = new_seed()
    expected = film(graph(seed=seed, format="lossless-mkv")).pictures
    loaded = loads(comfy)
    film(graph(seed=new_seed()))
    assert loads(comfy) == loaded, "a network that is there is used again"
    free()
    again = film(graph(seed=seed, format="lossless-mkv")).pictures
    assert loads(comfy) == loaded + 4 and np.array_equal(again, expected)


@pytest.mark.parametrize("keep", [False, True])
def test_clips_go_when_the_video_is_saved_unless_kept(keep, graph, run, clips, new_seed):
    """They stay while ComfyUI may ask for them again: another Save of the same clips samples nothing."""
    seed = new_seed()
    assert run(graph(seed=seed, keep_clips=keep)).status == "success"
    (folder,) = clips()
    again = run(graph(seed=seed, keep_clips=keep, format="vp9-webm"))
    assert again.status == "success" and SAMPLE not in again.started and folder.is_dir()
    assert run(graph(seed=new_seed())).status == "success"
    assert wait_for(lambda: folder.is_dir() == keep), "kept" if not keep else "gone"


def test_old_leftovers_make_room_for_a_new_run(graph, run, cancelled, clips, new_seed):
    """Of two cancelled runs, touched last two days ago and just now, the first goes when they may take less than 1 GB;
    a file larger than that stands for many clips."""
    for _ in range(2):
        ended, _ = cancelled(graph(seconds=1.6, steps=4, seed=new_seed()), 5)
        assert ended.status == "interrupted"
    old, young = sorted(clips(), key=lambda folder: folder.stat().st_mtime)
    os.truncate(old / "clip_0000.mkv", 2 * 10**9)
    for path in (*old.iterdir(), old):
        os.utime(path, (then := time.time() - 2 * 24 * 3600, then))
    assert run(graph(seed=new_seed(), leftover_gb=0)).status == "success" and old.is_dir()
    assert run(graph(seed=new_seed(), leftover_gb=1)).status == "success"
    assert not old.exists() and young.is_dir()


def test_clips_without_a_video_stay(graph, add_node, run, clips, free, new_seed):
    """Where nothing was saved the clips are all there is: they outlive ComfyUI's cache."""
    prompt = graph(seed=new_seed())
    del prompt[SAVE]
    add_node(prompt, "SaveLatent", samples=[SAMPLE, 1], filename_prefix="latents/last")
    assert run(prompt).status == "success"
    (folder,) = clips()
    free()
    assert run(graph(seed=new_seed())).status == "success" and (folder / "clip_0000.mkv").is_file()
