"""A small part of the attacks of dev/attack, the same in every run, and whether they see what they look for."""

import pytest
from attack import kills, media, pairs, records, weights
from attack.lab import Lab, Worker, chance_for, chosen_kinds
from attack.outcome import (
    ANY,
    BAD,
    DIED,
    FINE,
    GIGABYTE,
    HANG,
    MEMORY,
    REFUSED,
    SAME,
    SILENT,
    TRACEBACK,
    WORDING,
    Outcome,
    judge_film,
    refusal,
    wrong_ending,
)
from attack.report import save, summary, table

SEED = 16
SMALL = {weights: 20, media: 15, records: 10, kills: 2, pairs: 1}
"""Inputs of each class. python3 dev/run.py attack tries hundreds, with new seeds."""


@pytest.fixture(scope="module")
def lab(tiny_checkpoint, tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab"), tiny_checkpoint) as lab:
        yield lab


@pytest.mark.parametrize("attack", SMALL, ids=lambda attack: attack.__name__.rpartition(".")[2])
def test_nothing_breaks(attack, lab):
    outcomes = list(attack.attack(lab, SEED, range(SMALL[attack])))
    assert len(outcomes) == SMALL[attack]
    assert [outcome for outcome in outcomes if outcome.is_fault] == []
    assert any(outcome.verdict == FINE for outcome in outcomes)


# --- that faults are seen ------------------------------------------------------------------------------------------

PLAIN = {"digest": "a", "sound_digest": "b", "spread": 60.0, "mean": 120.0, "frames": 8}


@pytest.mark.parametrize(
    ("expects", "changes", "warned", "verdict"),
    [
        (SAME, {}, False, FINE),
        (SAME, {"digest": "c"}, False, SILENT),
        (SAME, {"digest": "c"}, True, FINE),
        (SAME, {"sound_digest": "c"}, False, SILENT),
        (ANY, {"digest": "c"}, False, FINE),
        (ANY, {"digest": "c", "spread": 0.2, "mean": 0.0}, False, SILENT),
        (ANY, {"digest": "c", "frames": 7}, False, SILENT),
        (BAD, {}, False, SILENT),
        (BAD, {}, True, FINE),
    ],
)
def test_films_are_judged(expects, changes, warned, verdict):
    assert judge_film(expects, PLAIN | changes, PLAIN, warned)[0] == verdict


def test_no_film_is_no_success():
    assert judge_film(ANY, {}, PLAIN, False)[0] == SILENT


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("WARNING:x:y\nerror: x.pth is cut short. Download it again.\n", REFUSED),
        ("error: x.pth is cut short.\nDownload it again.\n", WORDING),
        ("error: \x1b[2J is no file.\n", WORDING),
        (f"error: {'9' * 5000} is too much.\n", WORDING),
        ("error: \n", WORDING),
        ("", WORDING),
    ],
)
def test_refusals_are_one_readable_line(said, verdict):
    assert refusal({"code": 2, "err": said})[0] == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({"traceback": "Traceback\nKeyError: 'x'"}, TRACEBACK),
        ({"hang": "x.py:1 read", "seconds": 60.0}, HANG),
        ({"died": "ended with -11"}, DIED),
        ({"too_large": True, "peak_bytes": 6 * GIGABYTE}, MEMORY),
        ({"code": 0, "peak_bytes": 2 * GIGABYTE}, MEMORY),
        ({"code": 0, "peak_bytes": GIGABYTE // 2}, None),
    ],
)
def test_endings_are_judged(answer, verdict):
    found = wrong_ending(answer, GIGABYTE)
    assert (found[0] if found else None) == verdict


def test_the_watchdog_ends_what_hangs(lab, tmp_path):
    """A run is begun, and the child waits for it longer than it may."""
    worker = Worker(hang_seconds=0.3)
    run = worker.ask(do="start", arguments=lab.generate(tmp_path / "v.mkv"), log=str(tmp_path / "log"))
    answer = worker.ask(do="wait", pid=run["pid"], seconds=30)
    worker.close()
    kills.send(run["pid"], kills.SIGNALS["KILL"])
    assert "wait" in answer["hang"] and answer["seconds"] < 5


def test_the_child_is_started_again(lab):
    lab.worker.process.kill()
    assert "died" in lab.worker.ask(do="command", arguments=["inspect", "nowhere"])
    assert lab.worker.ask(do="command", arguments=["inspect", "nowhere"])["code"] == 2


def test_inputs_depend_on_seed_and_number_alone():
    assert chance_for(1, 2).random() == chance_for(1, 2).random() != chance_for(1, 3).random()
    kinds = chosen_kinds(["a", "b", "c"], 5, 7)
    assert chosen_kinds(["a", "b", "c"], 5, 4) == kinds[:4] and sorted(kinds[:3]) == ["a", "b", "c"]


def test_the_report(tmp_path):
    outcomes = [Outcome("weights", "a", 0, FINE, "", 1.0, 5), Outcome("weights", "b", 1, TRACEBACK, "x\nKeyError: | y")]
    assert summary(outcomes)["faults"] == 1
    assert "| 1 | b | traceback | KeyError: / y |" in table("weights", 3, outcomes)
    save(tmp_path, "weights", 3, outcomes)
    assert {path.name for path in tmp_path.iterdir()} == {"weights-3.json", "weights-3.md"}
