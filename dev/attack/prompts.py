"""Prompts and queries by chance, to a real server: each ends in a film, or in words of ours or of ComfyUI."""

import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import films, sounds, stills, value_pack
from .kinds import Kinds
from .lab import HANG_SECONDS, Lab, anonymous_bytes, chance_for, chosen_kinds
from .outcome import (
    ANY,
    BAD,
    DIED,
    FINE,
    GIGABYTE,
    GOOD,
    HANG,
    LEAST_SPREAD,
    LEFT,
    MEMORY,
    REFUSED,
    SILENT,
    TRACEBACK,
    TURNED_AWAY,
    WORDING,
    Outcome,
    unreadable,
)
from .servers import DENSE, WORKFLOWS, Prompt, base_prompt, comfy_server, film_of, inputs_of

KINDS = Kinds()
"""Of changes to a prompt: (chance, prompt, schemas, input folder)."""
QUERIES = Kinds()
"""Of queries to the pack's routes: (chance, input folder) -> path and query."""
OUR_ERROR = re.compile(r"(^|\.)(ConfigError|CheckpointError|BackendUnavailable|OutOfMemory|OutsideError)$")
PACK_FILES = "custom_nodes/wan_s2v/"
NAN, INF = float("nan"), float("inf")
TEXTS = (
    "",
    " ",
    "x" * 200_000,
    "\0",
    "\x1b[2J",
    "\u202e",
    "肖像",
    "\ud800",
    "%s%n",
    "{0}",
    "${HOME}",
    "<script>",
    "NaN",
    "-1",
    "1e999",
    "None",
)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**40,
    -(10**40),
    0.1,
    -0.0,
    1e308,
    NAN,
    INF,
    -INF,
    [],
    {},
    [[]],
    {"a": {}},
)
OUTSIDE = ("../voice.wav", "/etc/passwd", "..", ".", "", "a/../../../x.wav", "\\..\\x", "~", "voice.wav\0", "x" * 5000)
OUTSIDE += ("voice.wav [output]", "voice.wav [temp]", "voice.wav [x]", "/dev/zero", "C:\\x.wav", "//x", "%2e%2e/x")
OUTSIDE += ("outside.wav", "pipe.wav", "folder")
LOADED = {"LoadAudio": "audio", "LoadImage": "image", "LoadVideo": "file"}
KIND_OF_VALUE = {"sound": "AUDIO", "picture": "IMAGE"}
FLAWLESS = (
    "plain",
    "mapping",
    "more keys",
    "float64",
    "float16",
    "bfloat16",
    "int16",
    "int32",
    "rate as a float",
    "rate as a tensor",
    "transparent",
    "a view",
    "with a gradient",
    "two axes",
    "one axis",
)
"""Values that mean one thing only."""
HOPELESS = (
    "no number",
    "one infinity",
    "no sample",
    "no channel",
    "a batch of none",
    "rate of 0",
    "rate of -1",
    "rate of 1",
    "no rate",
    "no waveform",
    "none of them",
    "no pixel",
    "infinite",
    "on meta",
    "int16 as float",
    "int32 as float",
    "too loud",
    "nothing",
)


def ours(chance: random.Random, prompt: Prompt) -> dict[str, Any]:
    return prompt[chance.choice([number for number, node in prompt.items() if node["class_type"].startswith("WanS2V")])]


def any_input(
    chance: random.Random, prompt: Prompt, schemas: dict[str, Any], links: bool | None = None
) -> tuple[dict[str, Any], str]:
    """A node of ours and the name of one of its inputs; those that are linked, or not, if that is asked for."""
    for _ in range(200):
        node = ours(chance, prompt)
        known = inputs_of(schemas, node["class_type"])
        names = [name for name in known if links is None or isinstance(node["inputs"].get(name), list) == links]
        if names:
            return node["inputs"], chance.choice(sorted(names))
    raise AssertionError("no such input")


# --- values --------------------------------------------------------------------------------------------------------


@KINDS.add(GOOD)
def nothing_changed(chance, prompt, schemas, folder):
    pass


@KINDS.add(ANY)
def a_value_of_another_kind(chance, prompt, schemas, folder):
    inputs, name = any_input(chance, prompt, schemas, links=False)
    inputs[name] = chance.choice((*ODD, *TEXTS))


@KINDS.add(ANY)
def an_end_of_a_range(chance, prompt, schemas, folder):
    """Just inside, just outside and far outside, of all numbers whose size does not make a run long."""
    slow = ("width", "height", "steps", "clip_frames", "fps", "seconds")
    for _ in range(100):
        node = ours(chance, prompt)
        numbers = {
            name: options
            for name, (kind, options) in inputs_of(schemas, node["class_type"]).items()
            if kind in ("INT", "FLOAT")
        }
        if numbers:
            break
    else:
        return
    name = chance.choice(sorted(numbers))
    low, high = numbers[name].get("min", 0), numbers[name].get("max", 1)
    values = [low, low - 1, high + 1, high * 10**6, -high]
    node["inputs"][name] = chance.choice(values if name in slow else [*values, high])


@KINDS.add(ANY)
def a_choice_that_is_none(chance, prompt, schemas, folder):
    inputs, name = any_input(chance, prompt, schemas, links=False)
    inputs[name] = chance.choice(
        (*OUTSIDE, "auto", "none", "Dense", DENSE + " ", DENSE.upper(), "../Dense (folder)", 5)
    )


@KINDS.add(ANY)
def texts_of_all_kinds(chance, prompt, schemas, folder):
    for node in prompt.values():
        for name in ("prompt", "negative_prompt"):
            if name in node["inputs"]:
                node["inputs"][name] = chance.choice(TEXTS)


@KINDS.add(ANY)
def a_name_for_the_video(chance, prompt, schemas, folder):
    for node in prompt.values():
        if "filename_prefix" in node["inputs"]:
            names = (
                "%date:yyyy%",
                "%seed%" * 300,
                "a/b/c/d",
                "CON",
                "x.mp4",
                "%batch_num%",
                "é" * 200,
                "video/",
                "a\nb",
                " ",
                "*?<>|",
            )
            node["inputs"]["filename_prefix"] = chance.choice((*OUTSIDE, *TEXTS[:8], *names))


# --- links ---------------------------------------------------------------------------------------------------------


@KINDS.add(ANY)
def a_link_to_another_output(chance, prompt, schemas, folder):
    inputs, name = any_input(chance, prompt, schemas)
    inputs[name] = [chance.choice(sorted(prompt)), chance.choice((0, 1, 2, 3, 4, 7))]


@KINDS.add(ANY)
def a_link_of_another_form(chance, prompt, schemas, folder):
    inputs, name = any_input(chance, prompt, schemas)
    number = chance.choice(sorted(prompt))
    forms = (
        [number],
        [number, 0, 0],
        [number, "0"],
        [number, -1],
        [number, 10**20],
        [number, 0.5],
        [number, None],
        [None, 0],
    )
    inputs[name] = chance.choice(
        (*forms, [number, True], ["999", 0], [[number, 0], 0], [int(number), 0], {"node": number})
    )


@KINDS.add(ANY)
def a_circle(chance, prompt, schemas, folder):
    first, second = (chance.choice(sorted(prompt)) for _ in range(2))
    for number, other in ((first, second), (second, first)):
        names = sorted(prompt[number]["inputs"]) or ["x"]
        prompt[number]["inputs"][chance.choice(names)] = [other, 0]


@KINDS.add(ANY)
def nodes_less_or_renamed(chance, prompt, schemas, folder):
    number = chance.choice(sorted(prompt))
    ways = (
        lambda: prompt.pop(number),
        lambda: prompt.update({"__proto__": prompt.pop(number)}),
        lambda: prompt[number].pop("class_type"),
        lambda: prompt[number].pop("inputs"),
        lambda: prompt[number].update(class_type=chance.choice(("Nope", None, 5, "", [], "WanS2V", "WanS2VSample "))),
        lambda: prompt[number].update(inputs=chance.choice((None, [], 5, "x"))),
        lambda: prompt.update({number: chance.choice((None, [], "x", 5))}),
        lambda: prompt[number].update(_meta=5, is_changed=NAN),
    )
    chance.choice(ways)()


@KINDS.add(ANY)
def classes_exchanged(chance, prompt, schemas, folder):
    one, other = (chance.choice(sorted(prompt)) for _ in range(2))
    prompt[one]["class_type"], prompt[other]["class_type"] = prompt[other]["class_type"], prompt[one]["class_type"]


@KINDS.add(ANY)
def inputs_less_or_more(chance, prompt, schemas, folder):
    node = ours(chance, prompt)
    for name in chance.sample(sorted(node["inputs"]), chance.randint(0, min(3, len(node["inputs"])))):
        del node["inputs"][name]
    for name in chance.sample(
        ("cls", "self", "kwargs", "model", "x y", "", "__class__", "seed2", "unique_id", "prompt"), 3
    ):
        node["inputs"].setdefault(name, chance.choice((5, "x", None, [])))


# --- files ---------------------------------------------------------------------------------------------------------


@KINDS.add(ANY)
def names_that_lead_elsewhere(chance, prompt, schemas, folder):
    """Also links out of the input folder, pipes, folders and what is not there."""
    make_traps(folder)
    places = [(node["inputs"], LOADED[node["class_type"]]) for node in prompt.values() if node["class_type"] in LOADED]
    places += [
        (node["inputs"], name)
        for node in prompt.values()
        for name in ("voice", "picture")
        if isinstance(node["inputs"].get(name), str)
    ]
    places += [
        (node["inputs"], name)
        for node in prompt.values()
        for name in ("checkpoint", "name")
        if isinstance(node["inputs"].get(name), str)
    ]
    if places:
        inputs, name = chance.choice(places)
        inputs[name] = chance.choice(OUTSIDE)


def make_traps(folder: Path) -> None:
    outside = folder.parent / "outside.wav"
    if not outside.exists():
        sounds.plain_wav(outside, sounds.tone(660, 16000))
        (folder / "outside.wav").symlink_to(outside)
        os.mkfifo(folder / "pipe.wav")
        (folder / "folder").mkdir()


@KINDS.add(ANY)
def files_of_all_kinds(chance, prompt, schemas, folder):
    """For the one node, which reads them itself, and for ComfyUI's loaders."""
    what = chance.choice(
        (
            ("voice", "LoadAudio", sounds.KINDS),
            ("picture", "LoadImage", stills.KINDS),
            ("pose", "LoadVideo", films.KINDS),
        )
    )
    slow = ("very long", "bombs", "very large", "too large", "lead", "names that")
    kinds = [kind for name, kind in what[2].items() if not any(word in name for word in slow)]
    box = folder / f"made{chance.randrange(10**9)}"
    box.mkdir()
    path, _ = chance.choice(kinds).make(chance, box)
    name = str(path.relative_to(folder))
    for node in prompt.values():
        if node["class_type"] == what[1]:
            node["inputs"][LOADED[what[1]]] = name
        elif isinstance(node["inputs"].get(what[0]), str):
            node["inputs"][what[0]] = name


# --- values of other packs -----------------------------------------------------------------------------------------


@KINDS.add(ANY)
def sounds_of_other_packs(chance, prompt, schemas, folder):
    return given(chance, prompt, schemas, "AUDIO", [name for name in value_pack.VALUES if name.startswith("sound")])


@KINDS.add(ANY)
def pictures_of_other_packs(chance, prompt, schemas, folder):
    return given(chance, prompt, schemas, "IMAGE", [name for name in value_pack.VALUES if name.startswith("picture")])


@KINDS.add(ANY)
def values_of_no_such_kind(chance, prompt, schemas, folder):
    inputs, name = any_input(chance, prompt, schemas, links=True) if has_links(prompt) else (None, "")
    if inputs is not None:
        prompt["900"] = {"class_type": "AttackValue", "inputs": {"what": chance.choice(sorted(value_pack.VALUES))}}
        inputs[name] = ["900", 0]


def has_links(prompt: Prompt) -> bool:
    return any(isinstance(value, list) for node in prompt.values() for value in node["inputs"].values())


@KINDS.add(ANY)
def networks_of_another_kind(chance, prompt, schemas, folder):
    """Through a node that passes everything on."""
    inputs, name = any_input(chance, prompt, schemas, links=True) if has_links(prompt) else (None, "")
    if inputs is not None:
        prompt["901"] = {
            "class_type": "AttackPass",
            "inputs": {"value": [inputs[name][0], chance.choice((0, 1, 2, 3))]},
        }
        inputs[name] = ["901", 0]


def given(chance: random.Random, prompt: Prompt, schemas: dict[str, Any], kind: str, names: list[str]) -> str | None:
    """Give a value to every input of ours of that type -> what it calls for."""
    what = chance.choice(names)
    prompt["900"] = {"class_type": "AttackValue", "inputs": {"what": what}}
    reached = False
    for node in list(prompt.values()):
        for name, (wanted, _) in (
            inputs_of(schemas, node["class_type"]).items() if node["class_type"] in schemas else ()
        ):
            if wanted == kind and node["class_type"].startswith("WanS2V") and name in node["inputs"]:
                node["inputs"][name] = ["900", 0]
                reached = True
    name = what.split(": ", 1)[1]
    return (
        None
        if not reached
        else f"{GOOD}: {what}"
        if name in FLAWLESS
        else f"{BAD}: {what}"
        if name in HOPELESS
        else f"{ANY}: {what}"
    )


# --- queries -------------------------------------------------------------------------------------------------------


@QUERIES.add(ANY)
def a_query_for_the_timeline(chance, folder):
    make_traps(folder)
    names = ("fps", "clip_frames", "timing", "clip_plan", "start_from_picture", "max_clips", "start_seconds", "seconds")
    query = {"audio": chance.choice(("voice.wav", "face.png", *OUTSIDE))} if chance.random() < 0.8 else {"demo": "1"}
    return "/wan_s2v/timeline", query | {name: odd_text(chance) for name in chance.sample(names, chance.randint(0, 3))}


@QUERIES.add(ANY)
def a_query_for_the_memory(chance, folder):
    names = (
        "checkpoint",
        "width",
        "height",
        "size_rule",
        "clip_frames",
        "preset",
        "guidance_scale",
        "audio_guidance_scale",
    )
    names += (
        "has_pose",
        "seconds",
        "resident_blocks",
        "slice_tokens",
        "vae_tile",
        "vram_limit_gb",
        "profile",
        "weights",
    )
    names += (
        "attention",
        "sparse_keep",
        "fused",
        "vae_precision",
        "text_device",
        "text_precision",
        "precision",
        "model",
        "vae",
    )
    query = {name: odd_text(chance) for name in chance.sample(names, chance.randint(1, 4))}
    return "/wan_s2v/memory", query | ({"audio": chance.choice(OUTSIDE)} if chance.random() < 0.3 else {})


def odd_text(chance: random.Random) -> str:
    text = str(chance.choice((*ODD, *TEXTS, *OUTSIDE, DENSE, "auto", "9" * 5000, "1_0", "٣", " 5 ", "0x10", "1e5")))
    return text[:6000]  # a longer line is refused by every server


# --- the attack ----------------------------------------------------------------------------------------------------


def attack(lab: Lab, seed: int, numbers: Iterable[int], keep: bool = False) -> Iterator[Outcome]:
    with comfy_server(lab) as server:
        yield from attack_on(lab, server, seed, numbers)


def attack_on(lab: Lab, server: Any, seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
    """On a server that runs already."""
    numbers, schemas = list(numbers), server.client.object_info()
    kinds = chosen_kinds(sorted(KINDS | QUERIES), seed, max(numbers, default=-1) + 1)
    for number in numbers:
        chance, name = chance_for(seed, number), kinds[number]
        if name in QUERIES:
            yield try_query(server, name, number, *QUERIES[name].make(chance, server.base / "input"))
            continue
        prompt = base_prompt(chance.choice(WORKFLOWS), chance.randrange(2**62))
        expects = KINDS[name].make(chance, prompt, schemas, server.base / "input") or KINDS[name].expects
        yield try_prompt(lab, server, name, number, prompt, expects)


class Watch(threading.Thread):
    """The most anonymous memory of a process beyond what it had, until `stop`."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.before, self.over = pid, anonymous_bytes(pid), threading.Event()
        self.most = self.before
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, anonymous_bytes(self.pid))

    def stop(self) -> int:
        self.over.set()
        self.join()
        return self.most - self.before


def try_prompt(lab: Lab, server: Any, name: str, number: int, prompt: Prompt, expects: str) -> Outcome:
    before, watch, began = len(server.log()), Watch(server.process.pid), time.monotonic()
    run = server.client.run(prompt, timeout=HANG_SECONDS * 3)
    peak, seconds = watch.stop(), time.monotonic() - began
    verdict, said = judged(lab, server, run, expects, server.log()[before:])
    if verdict in (FINE, REFUSED) and peak > 2 * GIGABYTE:
        verdict, said = MEMORY, f"{peak / GIGABYTE:.1f} GB"
    if server.process.poll() is not None:
        verdict, said = DIED, server.log(8)
        server.start()
    elif parts := list(server.output.rglob("*.part")):
        verdict, said = LEFT, parts[0].name
        parts[0].unlink()
    detail = expects.partition(": ")[2]
    return Outcome("prompts", f"{name}{f' ({detail})' if detail else ''}", number, verdict, said, seconds, peak)


COMFYUIS_OWN = "graph.DependencyCycleError"
"""What ComfyUI says of links in a circle, in the name of a node that waits in it and has not been called."""


def judged(lab: Lab, server: Any, run: Any, expects: str, log: str) -> tuple[str, str]:
    """Verdict and reason for the end of a prompt."""
    expects = expects.partition(": ")[0]
    if run.status in ("timeout", "connection_lost"):
        return (HANG, f"at {run.title(run.running)}") if run.status == "timeout" else (DIED, server.log(8))
    if run.status == "success":
        return judged_film(film_of(lab, server, run), expects, log)
    if run.status == "rejected":
        return rejected(run)
    (*_, error) = run.errors or [{}]
    message, kind = str(error.get("exception_message", "")).strip(), str(error.get("exception_type", ""))
    where = "".join(error.get("traceback") or [])
    if OUR_ERROR.search(kind):
        problem = unreadable(message)
        return (
            (WORDING, f"{problem}: {message[:200]!r}")
            if problem
            else (TURNED_AWAY if expects == GOOD else REFUSED, message)
        )
    of_our_node = str(error.get("node_type", "")).startswith("WanS2V") and kind != COMFYUIS_OWN
    is_ours = PACK_FILES in where or of_our_node
    return (
        (TRACEBACK, f"{where[-2500:]}\n{kind}: {message[:300]}")
        if is_ours
        else (REFUSED, f"ComfyUI: {kind}: {message[:200]}")
    )


def judged_film(film: dict[str, Any], expects: str, log: str) -> tuple[str, str]:
    if not film:
        return FINE, "no video was asked for"
    told = re.search(r"full scale|not finite|limited|channel|one of \d|scaled", log)
    if expects == BAD and not told:
        return SILENT, "taken"
    if film["spread"] < LEAST_SPREAD:
        return SILENT, f"a film of one colour (mean {film['mean']:.0f})"
    if not film["loudness"] <= 1:
        return SILENT, f"sound at {film['loudness']:.2f} of full scale"
    return FINE, ""


def rejected(run: Any) -> tuple[str, str]:
    """Not taken: ComfyUI says why. It may stumble over a prompt itself, but not in a file of ours."""
    errors = [error for node in run.node_errors.values() for error in node["errors"]]
    texts = [f"{error.get('type')}: {error.get('message')}: {error.get('details')}" for error in errors]
    texts += [f"{error.get('exception_type')}: {error.get('exception_message')}" for error in run.errors]
    traces = "".join(str(error.get("extra_info", {}).get("traceback", "")) for error in errors)
    said = "; ".join(texts)
    return (TRACEBACK, f"{traces[-2000:]}\n{said}") if PACK_FILES in traces else (REFUSED, "ComfyUI: " + said[:300])


def try_query(server: Any, name: str, number: int, path: str, query: dict[str, str]) -> Outcome:
    """What a route of the pack answers: JSON, and never an error of the server itself."""
    from comfy_client import HttpError

    began, watch = time.monotonic(), Watch(server.process.pid)
    text = urllib.parse.urlencode(query, errors="surrogatepass")
    try:
        answer = server.client.get(f"{path}?{text}")
        said = str(answer.get("error", ""))
        problem = unreadable(said) if said else ""
        verdict, said = (WORDING, f"{problem}: {said[:200]}") if problem else (REFUSED if said else FINE, said)
    except HttpError as error:
        verdict, said = (TRACEBACK if error.status >= 500 else REFUSED), f"HTTP {error.status}: {text[:200]}"
        if verdict == TRACEBACK:
            said += "\n" + server.log(12)
    except OSError as error:
        verdict, said = (HANG if "timed out" in str(error) else DIED), f"{text[:200]}: {error}"
    peak = watch.stop()
    if verdict in (FINE, REFUSED) and peak > GIGABYTE * 1.5:
        verdict, said = MEMORY, f"{peak / GIGABYTE:.1f} GB: {text[:200]}"
    return Outcome("prompts", name, number, verdict, said, time.monotonic() - began, peak)
