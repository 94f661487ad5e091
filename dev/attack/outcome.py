"""What became of one input, and how that is judged."""

from dataclasses import asdict, dataclass
from typing import Any

FINE, REFUSED, TURNED_AWAY = "fine", "refused", "turned away"
"""Made a right film; refused in one line; refused in one line although the input is a good one."""
TRACEBACK, HANG, MEMORY, SILENT, WORDING, DIED = "traceback", "hang", "memory", "silent", "wording", "died"
DIFFERS, LEFT = "differs", "left behind"
FAULTS = (TRACEBACK, HANG, MEMORY, SILENT, WORDING, DIED, DIFFERS, LEFT)
"""Silent: a black or wrong film without a word. Wording: a refusal that is not one readable line. Differs: a film that
was gone on with is not that of an undisturbed run. Left behind: unfinished files, or a folder that blocks."""
VERDICTS = (FINE, REFUSED, TURNED_AWAY, *FAULTS)

SAME, SAME_OR_REFUSED, BAD, ANY, GOOD = "same", "same or refused", "bad", "any", "good"
"""What an input calls for: the film of the untouched input (if refused, that is noted); that or a refusal; a refusal;
any film with something in it, or a refusal; a film of what its maker says."""

LONGEST_MESSAGE = 2500
LEAST_SPREAD = 1.0
"""Standard deviation over all values of a film, of 255, below which it shows nothing."""
GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class Outcome:
    """Of one input.

    number: with the seed of the attack it makes the same input again.
    said: the refusal, or what is wrong.
    """

    attack: str
    kind: str
    number: int
    verdict: str
    said: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def is_fault(self) -> bool:
        return self.verdict in FAULTS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wrong_ending(answer: dict[str, Any], bound_bytes: float) -> tuple[str, str] | None:
    """Verdict and reason where a command ended as none should: not at all, with a traceback, by a signal, or too large.

    Args:
        answer: of `Worker.ask`.
        bound_bytes: of anonymous memory beyond what the process had before.
    """
    if "hang" in answer:
        return HANG, f"no end after {answer['seconds']:.0f} s, at {answer['hang']}"
    if "too_large" in answer:
        return MEMORY, f"stopped at {answer['peak_bytes'] / GIGABYTE:.1f} GB"
    if "died" in answer:
        return DIED, answer["died"]
    if "traceback" in answer:
        return TRACEBACK, answer["traceback"]
    if answer.get("peak_bytes", 0) > bound_bytes:
        return MEMORY, f"{answer['peak_bytes'] / GIGABYTE:.2f} GB, more than {bound_bytes / GIGABYTE:.2f}"
    return None


def refusal(answer: dict[str, Any]) -> tuple[str, str]:
    """Verdict and message of a command that ended with 1 or 2: whether it says why in one readable line."""
    message = message_of(answer.get("err", ""))
    if not message and answer.get("code") == 1:
        return REFUSED, "exit 1"  # a check that failed; its result is on stdout
    if problem := unreadable(message):
        return WORDING, f"{problem}: {message[:200]!r}"
    return REFUSED, message


def message_of(text: str) -> str:
    """What follows `error:` on stderr, to its end."""
    return text.rsplit("error: ", 1)[1].rstrip("\n") if "error: " in text else ""


def unreadable(message: str) -> str:
    """What is wrong with a message; nothing if it is one printable line of a fair length."""
    if not message.strip():
        return "no message"
    if "\n" in message:
        return "more than one line"
    if not message.isprintable():
        return "not printable"
    return f"{len(message):,} characters" if len(message) > LONGEST_MESSAGE else ""


def judge_film(expects: str, film: dict[str, Any], plain: dict[str, Any], warned: bool) -> tuple[str, str]:
    """Verdict and reason for a run that ended with 0.

    Args:
        film: facts about what it made, of `worker.film`.
        plain: those of the film of the untouched input.
        warned: whether the command has said something about this input.
    """
    if not film:
        return SILENT, "exit 0 without a film"
    is_same = film["digest"] == plain["digest"] and film["sound_digest"] == plain["sound_digest"]
    if warned or (is_same and expects != BAD):
        return FINE, ""
    if expects == BAD:
        return SILENT, "taken" + (" (same film)" if is_same else "")
    if film["spread"] < LEAST_SPREAD:
        return SILENT, f"a film of one colour (mean {film['mean']:.0f})"
    if film["frames"] != plain["frames"]:
        return SILENT, f"{film['frames']} frames for {plain['frames']}"
    return (FINE, "") if expects == ANY else (SILENT, "another film")
