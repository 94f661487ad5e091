"""The judging of the embedded model: what is made, how figures are put together, and that one failure is only one."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture(scope="module")
def evaluate():
    sys.path.insert(0, str(DEMO))
    try:
        yield importlib.import_module("evaluate")
    finally:
        sys.path.remove(str(DEMO))


def result(evaluate, **known) -> dict:
    return dict.fromkeys((*evaluate.MEASURES, "swapped_correlation", "seconds"), 1.0) | known


def test_medians_are_over_what_could_be_measured(evaluate):
    results = [
        result(evaluate, lip_sync_correlation=0.9, lip_sync_lag_ms=-62.5, swapped_correlation=-0.3),
        result(evaluate, lip_sync_correlation=0.7, lip_sync_lag_ms=None, swapped_correlation=0.1),
        result(evaluate, lip_sync_correlation=0.8, lip_sync_lag_ms=0.0, swapped_correlation=0.2),
        {"error": "it broke"},
    ]
    found = evaluate.summary(results)
    assert (found["videos"], found["failed"], found["least_correlation"]) == (3, 1, 0.7)
    assert (found["lip_sync_correlation"], found["lip_sync_lag_ms"], found["swapped_correlation"]) == (0.8, 31.25, 0.2)
    assert evaluate.summary([{"error": "it broke"}])["lip_sync_correlation"] is None


def test_every_setting_is_tried_on_every_scene_against_the_plain_one(evaluate):
    plain, varied = evaluate.knob_tasks(2, evaluate.KNOBS, evaluate.PLAIN)
    assert len(varied) == 2 * sum(map(len, evaluate.KNOBS.values())) and len(plain) == 2
    assert {task.against for task in varied} == {task.name for task in plain}
    assert len({(task.name, task.scene) for task in varied}) == len(varied), "no file is written twice"


def test_a_voice_is_long_enough(evaluate):
    voices = [np.full(round(seconds * 16000), number) for number, seconds in enumerate((10.5, 11.0, 10.2))]
    assert len(evaluate.held_out_voice(voices, 4, evaluate.CLIP_SECONDS)) == 11 * 16000
    long = evaluate.held_out_voice(voices, 1, evaluate.LONG_SECONDS)
    assert len(long) == 30 * 16000 and np.unique(long).tolist() == [0, 1, 2]


def test_a_failure_is_told_and_not_raised(evaluate, tmp_path):
    place = evaluate.Place(tmp_path, tmp_path, tmp_path / "absent.npz", "cpu")
    assert "absent.npz" in evaluate.run(evaluate.Task("made", 0, 4.8), place)["error"]


def test_tables_name_every_setting(evaluate, tmp_path):
    knobs = {
        knob: [{**settings, **evaluate.summary([result(evaluate)])} for settings in all_settings]
        for knob, all_settings in evaluate.KNOBS.items()
    }
    (tmp_path / "knobs.json").write_text(json.dumps({"plain": evaluate.summary([result(evaluate)]), "knobs": knobs}))
    table = evaluate.table(tmp_path / "knobs.json")
    for settings in (one for all_settings in evaluate.KNOBS.values() for one in all_settings):
        assert f"| {evaluate.described(settings)} |" in table
