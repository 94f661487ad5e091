"""Small films of finished clips: told while the run goes on, playable, and never a reason for a run to fail."""

import shutil

import pytest

SAMPLE = "6"
FOLDER = "wan_s2v_clips"
MESSAGE = "wan_s2v.clip"
KEPT_RUNS = 8
CLIP_FRAMES = [17, 20, 11]
LINE = "finished clips are not shown"


@pytest.fixture
def told(run):
    """Run a prompt -> its end, and what the page was told of its clips, each with how the run stood then."""

    def follow(prompt: dict, **options):
        messages = []

        def listen(kind: str, data: dict, state) -> None:
            if kind == MESSAGE:
                assert data["node"] == SAMPLE
                messages.append({**data, "step_then": state.step(SAMPLE)})

        return run(prompt, on_event=listen, **options), messages

    return follow


@pytest.fixture
def films(comfy):
    return comfy.base / "temp" / FOLDER


def entries(messages: list[dict]) -> list[dict]:
    return [film for message in messages for film in message.get("films", ())]


def test_each_clip_is_there_to_watch_before_the_next(told, graph, new_seed, comfy, watch, tmp_path):
    ended, messages = told(graph(seconds=3.0, steps=2, seed=new_seed()))
    assert ended.status == "success"
    told_steps = [(message["clip"], message["step"]) for message in messages if "step" in message]
    assert told_steps == [(clip, step) for clip in range(3) for step in (1, 2)]
    between = [message for message in messages if "films" in message]
    assert [message["finished"] for message in between] == [0, 1, 2, 3]
    assert all(message["clips"] == 3 for message in messages)
    assert [message["step_then"] for message in between[1:3]] == [(2, 6), (4, 6)], "before the next clip is begun"
    assert [film["clip"] for film in entries(messages)] == [0, 1, 2]
    for film, frames in zip(entries(messages), CLIP_FRAMES, strict=True):
        file = tmp_path / film["filename"]
        file.write_bytes(comfy.client.view(film["filename"], film["subfolder"], film["type"]))
        shown = watch(file)
        assert len(shown.pictures) == frames and shown.pictures.shape[1:] == (64, 64, 3) and shown.fps == 16
        assert shown.sound_seconds == pytest.approx(frames / 16, abs=0.1) and abs(shown.sound).max() > 0.01


def test_large_pictures_become_small_ones(told, graph, new_seed, films, watch):
    ended, messages = told(graph(width=208, height=512, seed=new_seed()))
    assert ended.status == "success"
    (film,) = entries(messages)
    shown = watch(films / film["subfolder"].removeprefix(f"{FOLDER}/") / film["filename"])
    assert shown.pictures.shape[1:] == (384, 156, 3)


def test_a_run_that_goes_on_tells_the_clips_it_has(told, graph, new_seed, films):
    """After a cancel the films of the first clips are still there, and each is told once."""
    prompt = graph(seconds=3.0, steps=8, seed=new_seed())
    ended, messages = told(prompt, interrupt_on_progress=10)
    assert ended.status == "interrupted" and [film["clip"] for film in entries(messages)] == [0]
    ended, messages = told(prompt)
    assert ended.status == "success"
    assert messages[0]["finished"] == 1 and [film["clip"] for film in messages[0]["films"]] == [0]
    assert [film["clip"] for film in entries(messages)] == [0, 1, 2]
    assert len({film["subfolder"] for film in entries(messages)}) == 1


def test_old_films_make_room(told, graph, new_seed, films):
    for _ in range(KEPT_RUNS + 2):
        ended, messages = told(graph(seed=new_seed(), seconds=0.5))
        assert ended.status == "success"
    left = list(films.iterdir())
    assert len(left) == KEPT_RUNS and films.parent / entries(messages)[0]["subfolder"] in left
    assert {path.suffix for folder in left for path in folder.iterdir()} == {".mp4"}, "no unfinished files"


def test_a_temp_folder_that_takes_nothing_stops_no_run(told, graph, new_seed, films, comfy):
    """As on a full disk: one line in the log for the whole run."""
    shutil.rmtree(films, ignore_errors=True)
    films.write_text("in the way")
    before = comfy.log().count(LINE)
    try:
        ended, messages = told(graph(seconds=3.0, seed=new_seed()))
    finally:
        films.unlink()
    assert ended.status == "success" and comfy.videos(ended)
    assert entries(messages) == [] and messages[-1]["finished"] == 3
    assert comfy.log().count(LINE) == before + 1
    ended, messages = told(graph(seed=new_seed()))
    assert ended.status == "success" and len(entries(messages)) == 1


def test_a_temp_folder_that_is_gone_is_made(told, graph, new_seed, films):
    shutil.rmtree(films.parent)
    ended, messages = told(graph(seed=new_seed()))
    assert ended.status == "success" and len(entries(messages)) == 1
