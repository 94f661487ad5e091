"""Two runs of `generate` for one video at once: the film of one of them, a line from the other."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .kills import LONG, Runs
from .lab import Lab, chance_for
from .outcome import (
    DIED,
    DIFFERS,
    FINE,
    HANG,
    LEFT,
    TRACEBACK,
    WORDING,
    Outcome,
    message_of,
    unreadable,
)

WAYS = ("the same command", "another seed", "other steps", "one clip less", "clips kept", "another prompt, one cache")
CHANGES: dict[str, dict[str, Any]] = {
    "the same command": {},
    "another seed": {"base_seed": 2},
    "other steps": {"sample_steps": 1},
    "one clip less": {"num_clip": 1},
    "clips kept": {"keep_clips": True},
    "another prompt, one cache": {"prompt": "A person talks."},
}
"""What is different in the second of them."""


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    runs = Runs(lab)
    plain: dict[str, dict[str, Any]] = {}
    whole = 0.0
    try:
        for number in numbers:
            way = WAYS[number % len(WAYS)]
            for name in (WAYS[0], way):
                if name not in plain:
                    plain[name], seconds = alone(lab, runs, name)
                    whole = max(whole, seconds)
            with lab.box(keep) as box:
                yield try_pair(lab, runs, seed, number, box, whole, (plain[WAYS[0]], plain[way]))
    finally:
        runs.close()


def command(lab: Lab, folder: Path, way: str) -> list[str]:
    return lab.generate(folder / "v.mkv", **(LONG | CHANGES[way]), cache_dir=folder.parent / "kept")


def alone(lab: Lab, runs: Runs, way: str) -> tuple[dict[str, Any], float]:
    """The film of a run that nothing disturbs, and its seconds."""
    with lab.box() as box:
        (box / "run").mkdir()
        began = time.monotonic()
        code = runs.wait(runs.start(command(lab, box / "run", way), box / "log"))
        film = lab.film(box / "run" / "v.mkv")
        assert code == 0 and film, (box / "log").read_text()
        return film, time.monotonic() - began


def try_pair(
    lab: Lab, runs: Runs, seed: int, number: int, box: Path, whole: float, plain: tuple[dict[str, Any], ...]
) -> Outcome:
    way, chance, began, folder = WAYS[number % len(WAYS)], chance_for(seed, number), time.monotonic(), box / "run"
    folder.mkdir()
    logs = (box / "first.log", box / "second.log")
    commands = (command(lab, folder, WAYS[0]), command(lab, folder, way))

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("pairs", way, number, verdict, said, time.monotonic() - began)

    first = runs.start(commands[0], logs[0])
    time.sleep(chance.choice((0.0, chance.uniform(0, 0.2), chance.uniform(0, whole), chance.uniform(0.7, 1.1) * whole)))
    second = runs.start(commands[1], logs[1])
    codes = tuple(runs.wait(pid) for pid in (first, second))
    for code, log in zip(codes, logs, strict=True):
        if wrong := wrong_rival(code, log):
            return outcome(*wrong)
    if 0 not in codes:
        said = " / ".join(message_of(log.read_text(errors="replace")) for log in logs)
        return outcome(LEFT, f"neither made it: {said}")
    film = lab.film(folder / "v.mkv")
    of = [index for index, code in enumerate(codes) if code == 0 and is_same(film, plain[index])]
    if not of:
        return outcome(DIFFERS, f"exits {codes}, {film.get('frames')} frames, of neither")
    return after_pair(lab, runs, folder, box, commands, plain, codes, outcome)


def after_pair(lab, runs, folder, box, commands, plain, codes, outcome) -> Outcome:
    """What lies there then, and whether the one that was told to wait can go on."""
    kept = "keep_clips" in " ".join(commands[1])
    if parts := sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part")):
        return outcome(LEFT, ", ".join(parts))
    clips = [path.name for path in folder.iterdir() if path.name != "v.mkv"]
    if clips and not kept:
        return outcome(LEFT, ", ".join(sorted(clips)))
    loser = codes.index(2) if 2 in codes else 0
    log = box / "again.log"
    code = runs.wait(runs.start(commands[loser], log))
    if code and not kept:
        return outcome(LEFT, f"then alone: exit {code}: {message_of(log.read_text(errors='replace'))}")
    film = lab.film(folder / "v.mkv")
    if not code and not is_same(film, plain[loser]):
        return outcome(DIFFERS, f"then alone: {film.get('frames')} frames")
    return outcome(FINE, f"exits {codes}")


def is_same(film: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(film.get(fact) == other[fact] for fact in ("frames", "digest", "sound_digest"))


def wrong_rival(code: int | None, log: Path) -> tuple[str, str] | None:
    text = log.read_text(errors="replace")
    if code is None:
        return HANG, "no end"
    if "Traceback" in text:
        return TRACEBACK, text[-3000:]
    if code == 2 and (problem := unreadable(message_of(text))):
        return WORDING, f"{problem}: {message_of(text)[:200]}"
    return None if code in (0, 2) else (DIED, f"exit {code}: {text[-300:]}")
