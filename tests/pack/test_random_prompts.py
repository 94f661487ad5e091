"""Prompts by chance, through the API: valid ones make a video, invalid ones are refused in words, the server goes on.

Inputs and their ranges come from the server's own schemas, so what a node gains later is tried as well.
"""

import random

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("server_lives")

PROMPTS = 50
EMBEDDED, DENSE = "embedded demo", "Dense (folder)"
EXPERTS = 8
"""Of the embedded model."""
VOICE, PICTURE, FILM = "chance.wav", "chance.png", "chance.mp4"
WIDGETS = ("INT", "FLOAT", "COMBO", "BOOLEAN", "STRING")
SIDES = (64, 64, 64, 64, 80)
NAN, INF = float("nan"), float("inf")
OUTSIDE = ("../x", "a/../../x", "/etc/x", "../../input/chance.png", "a\0b")

QUICK = {
    "checkpoint": lambda chance: chance.choice((EMBEDDED, DENSE)),
    "prompt": lambda chance: any_text(chance),
    "negative_prompt": lambda chance: any_text(chance),
    "start_seconds": lambda chance: chance.uniform(0, 2),
    "width": lambda chance: chance.choice(SIDES),
    "height": lambda chance: chance.choice(SIDES),
    "max_clips": lambda chance: chance.choice((0, 0, 1, 2)),
    "fps": lambda chance: chance.choice((1.0, 16.0, chance.uniform(1, 20))),
    "seconds": lambda chance: chance.uniform(0.6, 0.9),
    "clip_frames": lambda chance: chance.choice((20, 24)),
    "steps": lambda chance: chance.choice((1, 1, 1, 2)),
    "guidance_scale": lambda chance: chance.choice((1.0, 1.0, 20.0, chance.uniform(1, 20))),
    "seed": lambda chance: chance.choice((0, 2**63 - 1, chance.randrange(2**63))),
    "audio_guidance_scale": lambda chance: chance.choice((0.0, 0.0, 0.0, 1.0, chance.uniform(1, 20))),
    "moe_expert_capacity": lambda chance: chance.choice((0, chance.randint(50, 400), 10_000_000)),
    "filename_prefix": lambda chance: chance.choice(("chance", "chance/%year%/видео", "a b/c.d")),
}
"""Where the whole range would be slow, or fits together only in part."""


@pytest.fixture(scope="module", autouse=True)
def files(dense_checkpoint, write_sound, write_picture, write_film):
    write_sound(VOICE, 0.3)
    write_picture(PICTURE)
    write_film(FILM, 8)


@pytest.fixture(scope="module")
def schemas(comfy) -> dict:
    return comfy.client.object_info()


@pytest.fixture
def luck(fresh_seed) -> random.Random:
    return random.Random(fresh_seed)


def inputs_of(schema: dict) -> dict[str, tuple[str, dict, bool]]:
    """Name -> type, options, and whether it must be given."""
    return {
        name: (kind, options[0] if options else {}, group == "required")
        for group, names in schema["input_order"].items()
        if group != "hidden"
        for name in names
        for kind, *options in [schema["input"][group][name]]
    }


def any_text(chance: random.Random) -> str:
    """Letters, signs and line ends."""
    return "".join(chr(chance.choice((10, 32, 65, 0x1F642, chance.randrange(1, 0xD800)))) for _ in range(9))


def any_value(chance: random.Random, kind: str, options: dict):
    """What a widget lets a person set, often at an end of its range."""
    if kind in ("INT", "FLOAT"):
        low, high = options["min"], options["max"]
        between = chance.randint(low, high) if kind == "INT" else chance.uniform(low, high)
        return chance.choice((options["default"], low, high, between, between))
    return chance.choice((False, True) if kind == "BOOLEAN" else options["options"])


def valid_changes(chance: random.Random, schemas: dict, demo: dict) -> dict:
    """Inputs for `graph` that fit together."""
    kinds = [*(node["class_type"] for node in demo.values()), "WanS2VExperts", "WanS2VNoise"]
    nodes = [inputs_of(schemas[kind]) for kind in kinds]
    known = {name: entry for inputs in nodes for name, entry in inputs.items() if entry[0] in WIDGETS}
    made = {name: QUICK[name](chance) if name in QUICK else any_value(chance, *known[name][:2]) for name in known}
    made["moe_top_k"] = chance.randint(0, EXPERTS)
    if made["keep_clips"]:
        made["format"] = "lossless-mkv"  # two of h264 differ in bits when the cores are busy
    if made["moe_overflow"] == "drop":
        made["moe_expert_capacity"] = chance.randint(50, 400)
    if chance.random() < 0.3:
        preset = chance.choice(inputs_of(schemas["WanS2VSamplingPreset"])["preset"][1]["options"])
        links = {"guidance_scale": 1, "shift": 2, "solver": 3}
        made |= {name: ("WanS2VSamplingPreset", {"preset": preset}, output) for name, output in links.items()}
    if chance.random() < 0.1:
        made["pose_video"] = ("LoadVideo", {"file": FILM})
    return made


@pytest.mark.parametrize("number", range(PROMPTS))
def test_valid_prompts_make_videos(number, luck, schemas, demo, graph, film, run, watch, comfy):
    changes = valid_changes(luck, schemas, demo)
    print(changes)
    shown = film(graph(**changes))
    if changes["keep_clips"]:  # the sampler runs again, and finds its clips
        ended = run(graph(**changes | {"offload": "always" if changes["offload"] == "auto" else "auto"}))
        assert ended.status == "success" and not ended.previews, "nothing was sampled"
        again = watch(comfy.videos(ended)[-1])
        assert np.array_equal(again.pictures, shown.pictures)
    assert shown.fps == pytest.approx(changes["fps"], rel=1e-3)
    if changes["clip_plan"] == "audio" and not changes["max_clips"]:
        assert len(shown.pictures) == max(1, round(changes["seconds"] * changes["fps"]))


def one_node(chance: random.Random, **changes) -> dict:
    """The quickest prompt that the one node allows."""
    files = {"checkpoint": DENSE, "picture": PICTURE, "voice": VOICE, "prompt": any_text(chance)}
    chosen = {"preset": "quick look", "size": "demo (256x256)", "seed": chance.randrange(2**63)}
    saved = {"format": "h264-mp4", "filename_prefix": "one/chance"}
    return {"1": {"class_type": "WanS2VTalkingVideo", "inputs": files | chosen | saved | changes}}


def wrong_value(chance: random.Random, kind: str, options: dict, name: str):
    """What no widget lets a person set."""
    if kind == "STRING" and name == "filename_prefix":
        return chance.choice((*OUTSIDE, ""))
    if kind in ("STRING", "BOOLEAN"):  # ComfyUI makes a text or a truth of everything but lists
        return chance.choice(([], [1, 2, 3]))
    wrong = ("nope", "", None, {}, {"a": 1}, [], [1, 2, 3], {"__value__": ["nope"]})
    if kind == "COMBO":
        return chance.choice((*wrong, 5, True, NAN, *OUTSIDE))
    beyond = 10 ** chance.uniform(0, 12)
    ends = (options["min"] - beyond, options["max"] + beyond)
    return chance.choice((*wrong, *ends, *ends, *ends, NAN, INF, -INF))


def wrong_link(chance: random.Random, prompt: dict, kind: str, schemas: dict):
    """What a socket cannot be given."""
    outputs = {number: schemas[node["class_type"]]["output"] for number, node in prompt.items()}
    others = [[number, i] for number in outputs for i, given in enumerate(outputs[number]) if given != kind]
    somewhere = chance.choice(list(prompt))
    return chance.choice(("a word", 5, True, {"a": 1}, ["999", 0], [somewhere, 99], [], *others))


def spoil(chance: random.Random, prompt: dict, schemas: dict) -> str:
    """Make one input of one of our nodes wrong -> what was done."""
    ours = [number for number, node in prompt.items() if inputs_of(schemas[node["class_type"]]) and "S2V" in str(node)]
    node = prompt[chance.choice(ours)]
    name, (kind, options, is_needed) = chance.choice(list(inputs_of(schemas[node["class_type"]]).items()))
    if is_needed and chance.random() < 0.1:
        del node["inputs"][name]
        return f"{node['class_type']} without {name}"
    is_link = kind not in WIDGETS
    made = wrong_link(chance, prompt, kind, schemas) if is_link else wrong_value(chance, kind, options, name)
    node["inputs"][name] = made
    return f"{node['class_type']}.{name}={made!r}"


def loaders(graph) -> dict:
    """A prompt with a loader for each network, instead of the one for all of them."""
    kinds = {"model": "Model", "text_encoder": "TextEncoder", "audio_encoder": "AudioEncoder", "vae": "VAE"}
    prompt = graph(**{socket: (f"WanS2VLoad{kind}", {"name": EMBEDDED}) for socket, kind in kinds.items()})
    return {number: node for number, node in prompt.items() if node["class_type"] != "WanS2VLoadCheckpoint"}


@pytest.mark.parametrize("number", range(PROMPTS))
def test_invalid_prompts_are_refused_in_words(number, luck, schemas, demo, graph, run, message_of):
    bases = (one_node(luck), loaders(graph), graph(**valid_changes(luck, schemas, demo)))
    prompt = luck.choice(bases)
    mistake = spoil(luck, prompt, schemas)
    print(mistake)
    ended = run(prompt)
    if ended.status != "rejected":
        assert message_of(ended)
        return
    kinds = {error["type"] for node in ended.node_errors.values() for error in node["errors"]}
    assert kinds, (ended.errors, mistake)
    is_dead_link = "['999', 0]" in mistake or ", 99]" in mistake  # ComfyUI stumbles over these itself
    assert is_dead_link or not any(kind.startswith("exception_during") for kind in kinds), ended.node_errors


@pytest.mark.parametrize("number", range(2))
def test_one_node_with_valid_inputs(number, luck, film):
    changes = {"checkpoint": luck.choice((EMBEDDED, DENSE)), "format": luck.choice(("h264-mp4", "lossless-mkv"))}
    print(changes)
    assert len(film(one_node(luck, **changes)).pictures) == round(0.3 * 16)
