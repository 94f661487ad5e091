"""A server that is ended at any moment of a run and started again: the same prompt makes the same film."""

import contextlib
import copy
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .kills import SIGNALS
from .lab import HANG_SECONDS, Lab, chance_for, remove
from .outcome import DIFFERS, FINE, HANG, LEFT, Outcome
from .servers import Prompt, base_prompt, comfy_server, film_of

LONG = {"seconds": 2.2, "steps": 2, "format": "lossless-mkv"}
STOP_SECONDS = 30.0


def long_prompt(seed: int) -> Prompt:
    """Two clips and the beginning of a third."""
    prompt = base_prompt("talking_video", seed)
    for node in prompt.values():
        node["inputs"].update({name: value for name, value in LONG.items() if name in node["inputs"]})
    return prompt


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    with comfy_server(lab) as server:
        yield from attack_on(lab, server, seed, numbers)


def attack_on(lab: Lab, server: Any, seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
    """On a server that runs already."""
    whole = time.monotonic()
    assert server.client.run(long_prompt(seed)).status == "success", server.log(20)
    whole = time.monotonic() - whole
    for number in numbers:
        yield try_kill(lab, server, seed, number, whole)


def try_kill(lab: Lab, server: Any, seed: int, number: int, whole: float) -> Outcome:
    chance, began, how = chance_for(seed, number), time.monotonic(), list(SIGNALS)[number % len(SIGNALS)]
    prompt = long_prompt(chance.randrange(2**62))

    def outcome(verdict: str, said: str = "") -> Outcome:
        return Outcome("servers", how, number, verdict, said, time.monotonic() - began)

    for _ in range(chance.choice((1, 1, 2))):
        ended = end_at(chance, server, prompt, SIGNALS[how], whole)
        server.process.kill()
        server.process.wait()
        server.start()
        if not ended:
            return outcome(HANG, f"no end {STOP_SECONDS:.0f} s after {how}")
    run = server.client.run(prompt, timeout=4 * HANG_SECONDS)
    if run.status != "success":
        return outcome(LEFT, f"the same prompt: {run.status}: {run.errors}"[:600])
    film = film_of(lab, server, run)
    if parts := [str(path.relative_to(server.base)) for path in server.base.rglob("*.part")]:
        return outcome(LEFT, ", ".join(parts)[:300])
    plain = undisturbed(lab, server, prompt)
    if not plain or any(film.get(fact) != plain[fact] for fact in ("frames", "digest", "sound_digest")):
        return outcome(DIFFERS, f"{film.get('frames')} frames for {plain.get('frames')}")
    return outcome(FINE)


def undisturbed(lab: Lab, server: Any, prompt: Prompt) -> dict[str, Any]:
    """What the prompt makes from its beginning: the folder is emptied, and a setting without effect is another."""
    for path in server.output.iterdir():
        remove(path) if path.is_dir() else path.unlink()
    again = copy.deepcopy(prompt)
    for node in again.values():
        if node["class_type"] == "WanS2VSample":
            node["inputs"]["leftover_gb"] = 51
    return film_of(lab, server, server.client.run(again, timeout=4 * HANG_SECONDS))


def end_at(chance: random.Random, server: Any, prompt: Prompt, number: int, whole: float) -> bool:
    """Send a signal at some moment of a run; whether the server has ended then."""
    runner = threading.Thread(target=run_quietly, args=(server, prompt), daemon=True)
    runner.start()
    time.sleep(chance.uniform(0.1, 1.1) * whole)
    server.process.send_signal(number)
    deadline = time.monotonic() + STOP_SECONDS
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.join(5)
    return server.process.poll() is not None


def run_quietly(server: Any, prompt: Prompt) -> None:
    with contextlib.suppress(OSError):  # it has been ended
        server.client.run(prompt)
