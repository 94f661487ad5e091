"""Damaged checkpoints: each is looked at with `inspect`, then used by `generate`."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import weight_folders, weight_headers, weight_pickles
from .lab import Lab, chance_for, chosen_kinds, size_of
from .outcome import (
    BAD,
    FINE,
    GIGABYTE,
    SAME,
    TURNED_AWAY,
    WORDING,
    Outcome,
    judge_film,
    message_of,
    refusal,
    unreadable,
    wrong_ending,
)

KINDS = weight_headers.KINDS | weight_pickles.KINDS | weight_folders.KINDS


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    plain = untouched_film(lab)
    numbers = list(numbers)
    kinds = chosen_kinds(sorted(KINDS), seed, max(numbers, default=-1) + 1)
    for number in numbers:
        with lab.box(keep) as box:
            yield try_weights(lab, kinds[number], seed, number, box, plain)


def untouched_film(lab: Lab) -> dict[str, Any]:
    """What the checkpoint makes as it is."""
    with lab.box() as box:
        answer = lab.worker.ask(do="command", arguments=lab.generate(box / "v.mkv"))
        plain = lab.film(box / "v.mkv")
    assert plain, answer
    return plain


def try_weights(lab: Lab, name: str, seed: int, number: int, box: Path, plain: dict[str, Any]) -> Outcome:
    folder, kind = box / "checkpoint", KINDS[name]
    shutil.copytree(lab.checkpoint, folder)
    made = kind.make(chance_for(seed, number), folder)
    expects = made if isinstance(made, str) else kind.expects
    bound = GIGABYTE + size_of(folder)
    looked = lab.worker.ask(do="command", arguments=["inspect", "--json", str(folder)])
    used = lab.worker.ask(do="command", arguments=lab.generate(box / "v.mkv", ckpt_dir=folder))
    seconds, peak = (max(answer.get(fact, 0) for answer in (looked, used)) for fact in ("seconds", "peak_bytes"))

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("weights", name, number, verdict, said, seconds, peak)

    for command, answer in (("inspect", looked), ("generate", used)):
        if wrong := wrong_ending(answer, bound):
            return outcome(wrong[0], f"{command}: {wrong[1]}")
    if looked["code"] == 2 and (problem := unreadable(message_of(looked["err"]))):
        return outcome(WORDING, f"inspect: {problem}: {message_of(looked['err'])[:200]!r}")
    if used["code"]:
        verdict, said = refusal(used)
        is_good = expects == SAME and verdict not in (WORDING,)
        return outcome(TURNED_AWAY if is_good else verdict, said)
    warned = "WARNING" in used["err"]
    verdict, said = judge_film(expects, lab.film(box / "v.mkv"), plain, warned)
    if verdict == FINE and expects == BAD:
        said = "taken with a warning"
    return outcome(verdict, said)
