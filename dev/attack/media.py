"""Sound, pictures and driving videos: each is read as the project reads it, then used by `generate`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import films, sounds, stills
from .kinds import Kind
from .lab import Lab, chance_for, chosen_kinds, size_of
from .outcome import (
    BAD,
    FINE,
    GIGABYTE,
    GOOD,
    REFUSED,
    SILENT,
    TURNED_AWAY,
    Outcome,
    judge_film,
    refusal,
    wrong_ending,
)
from .sounds import Tone
from .stills import Shown
from .weights import untouched_film

SOURCES = {"sound": sounds.KINDS, "picture": stills.KINDS, "pose": films.KINDS}
FLAGS = {"sound": "audio", "picture": "image", "pose": "pose_video"}
BOUND_BYTES = {"sound": 300_000_000, "picture": 64_000_000 * 4 * 3, "pose": 64_000_000 * 4 * 3}
"""Decoded size at the bounds: half a second of a sound; 64 megapixels as RGBA, three times while they are fitted."""
LEAST_HEARD, FULL_SCALE = 1e-4, 1.0
TONE_TOLERANCE_HZ = 12.0


@dataclass(frozen=True)
class Source:
    """Which input a kind is for."""

    what: str
    kind: Kind


KINDS = {f"{what}: {name}": Source(what, kind) for what, kinds in SOURCES.items() for name, kind in kinds.items()}


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    plain = untouched_film(lab)
    numbers = list(numbers)
    kinds = chosen_kinds(sorted(KINDS), seed, max(numbers, default=-1) + 1)
    for number in numbers:
        with lab.box(keep) as box:
            yield try_media(lab, kinds[number], seed, number, box, plain)


def try_media(lab: Lab, name: str, seed: int, number: int, box: Path, plain: dict[str, Any]) -> Outcome:
    what, kind = KINDS[name].what, KINDS[name].kind
    folder = box / "input"
    folder.mkdir()
    path, expected = kind.make(chance_for(seed, number), folder)
    bound = GIGABYTE + BOUND_BYTES[what] + size_of(folder)
    read = lab.worker.ask(do="read", what=what, path=str(path))
    used = lab.worker.ask(do="command", arguments=lab.generate(box / "v.mkv", **{FLAGS[what]: path}))
    seconds, peak = (max(answer.get(fact, 0) for answer in (read, used)) for fact in ("seconds", "peak_bytes"))

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("media", name, number, verdict, said, seconds, peak)

    for step, answer in (("reading", read), ("generate", used)):
        if wrong := wrong_ending(answer, bound):
            return outcome(wrong[0], f"{step}: {wrong[1]}")
    if used["code"]:
        verdict, said = refusal(used)
        return outcome(TURNED_AWAY if kind.expects == GOOD and verdict == REFUSED else verdict, said)
    if kind.expects == BAD:
        return outcome(SILENT, "taken")
    warned = "WARNING" in used["err"] or "WARNING" in read["err"]
    if read["code"] == 0 and not warned and (wrong_facts := wrong_in(what, read["found"], expected)):
        return outcome(SILENT, wrong_facts)
    film = lab.film(box / "v.mkv")
    if problem := wrong_film(what, film, plain, expected):
        return outcome(FINE if warned else SILENT, problem)
    return outcome(FINE)


def wrong_in(what: str, found: dict[str, Any], expected: Tone | Shown) -> str:
    """How what was read differs from what is in the file; nothing if it does not."""
    return wrong_sound(found, expected) if isinstance(expected, Tone) else wrong_picture(found, expected)


def wrong_sound(found: dict[str, Any], expected: Tone) -> str:
    if not found["peak"] < float("inf") or found["peak"] > 8 * FULL_SCALE:
        return f"a peak of {found['peak']:.3g}"
    if expected.seconds is not None and abs(found["seconds"] - expected.seconds) > 0.12:
        return f"{found['seconds']:.2f} s for {expected.seconds:.2f} s"
    if expected.tone_hz is not None:
        if found["heard"] < LEAST_HEARD:
            return f"silence for a tone of {expected.tone_hz:.0f} Hz"
        if abs(found["tone_hz"] - expected.tone_hz) > TONE_TOLERANCE_HZ:
            return f"{found['tone_hz']:.0f} Hz for {expected.tone_hz:.0f} Hz"
    if expected.loudness is not None and not 0.65 < found["heard"] / expected.loudness < 1.5:
        return f"heard at {found['heard']:.4f} for {expected.loudness:.4f}"
    return ""


def wrong_picture(found: dict[str, Any], expected: Shown) -> str:
    if found.get("frames") == 0:
        return "no picture"
    if expected.size is not None and (found["height"], found["width"]) != expected.size:
        return f"{found['width']}x{found['height']} px for {expected.size[1]}x{expected.size[0]}"
    for place, wanted in enumerate(expected.colours or ()):
        if (
            max(abs(one - other) for one, other in zip(found["colours"][place], wanted, strict=True))
            > expected.tolerance
        ):
            return f"quarter {place + 1} is {found['colours'][place]} for {list(wanted)}"
    return ""


def wrong_film(what: str, film: dict[str, Any], plain: dict[str, Any], expected: Tone | Shown) -> str:
    """What is wrong with a film that was made without a word; sounds may be shorter than the half second asked for."""
    if what != "sound":
        if film and film["sound_digest"] != plain["sound_digest"]:
            return "another sound"
        shape = {**plain, "digest": "", "sound_digest": ""}
        verdict, said = judge_film("any", film, shape, False)
        return said if verdict != FINE else ""
    if not film:
        return "exit 0 without a film"
    if film["spread"] < 1:
        return f"a film of one colour (mean {film['mean']:.0f})"
    if not 1 <= film["frames"] <= plain["frames"] or abs(film["sound_seconds"] - film["frames"] / 16) > 0.08:
        return f"{film['frames']} frames and {film['sound_seconds']:.2f} s of sound"
    if isinstance(expected, Tone) and expected.tone_hz is not None and not film["loudness"] > LEAST_HEARD:
        return "a silent film"
    return f"sound at {film['loudness']:.2f} of full scale" if film["loudness"] > FULL_SCALE else ""
