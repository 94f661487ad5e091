"""What is deleted of clips that runs left behind: the oldest of ours, and nothing else."""

import json
import os
import time
from pathlib import Path

import pytest

from wan_s2v_core.io.clip_folders import OUR_FOLDER, RECENT_SECONDS, delete_leftovers, new_folder

SIZE = 1000
"""Bytes of a folder of clips."""
DAY = 24 * 3600


@pytest.fixture
def leave(tmp_path):
    """A folder of clips as a run leaves it, last touched so many days ago."""

    def make(days: float, keep_clips: bool = False, name: str = "") -> Path:
        folder = tmp_path / name if name else new_folder(tmp_path)
        folder.mkdir()
        settings = json.dumps({"keep_clips": keep_clips})
        (folder / "settings.json").write_text(settings)
        for name in ("clip_0000.safetensors", "motion.safetensors", ".clip_0001.1a2b3c4d.part"):
            (folder / name).write_bytes(bytes(100))
        (folder / "clip_0000.mkv").write_bytes(bytes(SIZE - 300 - len(settings)))
        return aged(folder, days)

    return make


def aged(folder: Path, days: float) -> Path:
    """Set when it was last touched."""
    then = time.time() - days * DAY
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))
    return folder


def test_names_of_new_folders_are_known(tmp_path):
    names = {new_folder(tmp_path).name for _ in range(50)}
    assert len(names) == 50 and all(OUR_FOLDER.fullmatch(name) for name in names)


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (999, 0), (1000, 1), (2500, 2), (4000, 4)])
def test_the_oldest_go_first(limit, kept, leave, tmp_path):
    folders = [leave(days) for days in (5, 2, 9, 3)]
    oldest_last = [folders[index] for index in (1, 3, 0, 2)]
    deleted = delete_leftovers(tmp_path, limit)
    assert set(deleted) == set(oldest_last[kept:]) and set(tmp_path.iterdir()) == set(oldest_last[:kept])


def test_younger_ones_and_those_in_use_stay_and_count(leave, tmp_path):
    recent, used, old = leave(0.5 * RECENT_SECONDS / DAY), leave(8), leave(9)
    assert delete_leftovers(tmp_path, 3 * SIZE, {used}) == []
    assert delete_leftovers(tmp_path, 2 * SIZE, {used}) == [old]
    assert delete_leftovers(tmp_path, 0, {used}) == [] and recent.is_dir() and used.is_dir()


def test_a_new_clip_makes_a_folder_young(leave, tmp_path):
    folder = leave(9)
    (folder / "clip_0001.safetensors").write_bytes(b"new")
    assert delete_leftovers(tmp_path, 0) == []


def add_notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def add_folder(folder: Path) -> None:
    (folder / "clip_0007.mkv").mkdir()


def link_a_clip(folder: Path) -> None:
    (folder / "clip_0009.mkv").symlink_to(folder / "clip_0000.mkv")


def break_settings(folder: Path) -> None:
    (folder / "settings.json").write_text("{")


def lose_settings(folder: Path) -> None:
    (folder / "settings.json").unlink()


def forget_what_to_keep(folder: Path) -> None:
    (folder / "settings.json").write_text("{}")


@pytest.mark.parametrize(
    "change", [add_notes, add_folder, link_a_clip, break_settings, lose_settings, forget_what_to_keep]
)
def test_what_is_not_ours_in_every_file_stays(change, leave, tmp_path):
    folder, ours = leave(9), leave(9)
    change(folder)
    aged(folder, 9)
    before = sorted(folder.iterdir())
    assert delete_leftovers(tmp_path, 0) == [ours] and sorted(folder.iterdir()) == before


def test_kept_and_renamed_and_other_things_stay(leave, tmp_path):
    stay = {leave(9, keep_clips=True), leave(9, name="my best video"), tmp_path / "20260101_000000_abcdef"}
    (tmp_path / "20260101_000000_abcdef").write_text("a file")
    elsewhere = leave(9, name="elsewhere")
    (tmp_path / "20260101_000000_fedcba").symlink_to(elsewhere)
    assert delete_leftovers(tmp_path, 0) == []
    assert stay <= set(tmp_path.iterdir()) and (elsewhere / "clip_0000.mkv").is_file()


def test_clips_that_two_runs_share_count_once(leave, tmp_path):
    first, second = leave(9), leave(8)
    (second / "clip_0000.mkv").unlink()
    os.link(first / "clip_0000.mkv", second / "clip_0000.mkv")
    aged(second, 8)
    aged(first, 9)
    assert delete_leftovers(tmp_path, 2 * SIZE - 400) == []
    assert delete_leftovers(tmp_path, SIZE) == [first] and (second / "clip_0000.mkv").stat().st_size > 0


def test_no_folder_is_no_work(tmp_path):
    assert delete_leftovers(tmp_path / "none", 0) == []
