"""Fixtures of the nodes' tests: one real ComfyUI for all of them, with this pack linked in.

python3 dev/run.py test sets COMFYUI_PATH and REQUIRE_COMFYUI. Without the first one there is nothing to test against;
the second turns the skip into a failure, so that CI is never green on nothing. COMFYUI_DEVICE=gpu, which
python3 dev/run.py gpu sets, lets the servers run on this machine's GPU; tests ask the fixture `device` where they run.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from comfy_server import ComfyServer, sigterm_as_interrupt
from filelock import FileLock  # which torch needs
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACK = "wan_s2v"
SMALL = {
    "width": 64,
    "height": 64,
    "size_rule": "exact",
    "clip_frames": 20,
    "steps": 1,
    "guidance_scale": 1.0,
    "seconds": 1.0,
}
"""What makes a graph quick: one clip of 17 frames on a CPU takes about a second."""
BEFORE_THE_SAMPLER = ("WanS2VModelPair", "WanS2VExperts", "WanS2VNoise")
"""Nodes with settings that few need; the demo has none of them."""
OUR_ERROR = re.compile(r"\.errors\.(ConfigError|CheckpointError|BackendUnavailable|OutOfMemory)$")


@pytest.fixture(scope="session")
def extra_models(tmp_path_factory) -> Path:
    """A folder of models that the server knows through extra_model_paths alone."""
    folder = tmp_path_factory.mktemp("extra")
    for name in ("vae", "diffusion_models"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="session")
def start_comfy(extra_models):
    """Start a server, given more arguments of ComfyUI's command line -> a context with the server that runs."""
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        if os.environ.get("REQUIRE_COMFYUI"):
            pytest.fail("REQUIRE_COMFYUI is set and COMFYUI_PATH is not. Run python3 dev/run.py test.")
        pytest.skip("COMFYUI_PATH is not set. Run python3 dev/run.py test.")
    sigterm_as_interrupt()
    paths = {"elsewhere": {"base_path": str(extra_models), "vae": "vae", "diffusion_models": "diffusion_models"}}
    config = extra_models / "extra_model_paths.yaml"
    config.write_text(json.dumps(paths), encoding="utf-8")  # JSON is YAML
    variables = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}

    def start(*more: str) -> ComfyServer:
        device = [] if os.environ.get("COMFYUI_DEVICE") == "gpu" else ["--cpu"]
        arguments = [*device, "--extra-model-paths-config", str(config), *more]
        packs = {PACK: ROOT, "odd_values.py": Path(__file__).with_name("odd_values.py")}
        return ComfyServer(Path(comfyui), packs, arguments=arguments, environment=variables)

    return start


@pytest.fixture(scope="session")
def comfy(start_comfy):
    """A running server; its `base` holds models, input, output and temp."""
    with start_comfy() as server:
        assert server.import_problems() == []
        yield server


@pytest.fixture(scope="session")
def device(comfy) -> str:
    """The kind of device that the server computes on: cpu, or cuda."""
    return comfy.client.get("/system_stats")["devices"][0]["type"]


@pytest.fixture(scope="session")
def start_with_card(comfy):
    """As `start_comfy`, for a server that believes in a card and cannot run anything: see pretended_card.py."""
    packs = {**comfy.packs, "pretended_card.py": Path(__file__).with_name("pretended_card.py")}

    def start(*more: str) -> ComfyServer:
        return ComfyServer(comfy.comfyui, packs, arguments=(*comfy.arguments, *more), environment=comfy.environment)

    return start


@pytest.fixture(scope="session")
def dense_checkpoint(comfy, random_checkpoint) -> str:
    """A model without experts, unlike the embedded one: random weights -> its name in the menus."""
    return random_checkpoint(comfy, "Dense", 0)


@pytest.fixture(scope="session")
def second_checkpoint(comfy, random_checkpoint) -> str:
    """As the dense one, with other random weights."""
    return random_checkpoint(comfy, "Second", 1)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """Put a checkpoint with random weights into a server's models; all workers of pytest-xdist make each seed once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def put(comfy, name: str, seed: int) -> str:
        made = shared / f"random_checkpoint_{seed}"
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                part = made.with_suffix(".part")
                maker = [sys.executable, ROOT / "demo" / "tiny_checkpoint.py", part, "--seed", str(seed)]
                subprocess.run(maker, check=True, capture_output=True)
                part.rename(made)
        shutil.copytree(made, comfy.base / "models" / "diffusion_models" / name)
        return f"{name} (folder)"

    return put


LONGEST_FIRST = (
    *("test_page", "test_workflows", "test_bad_inputs", "test_random_prompts"),
    *("test_one_node", "test_forecast"),
)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker is left with one while the others have ended."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else 99)


@pytest.fixture(scope="session")
def pack_nodes(comfy) -> list[str]:
    """The ids of this pack's nodes, as the server lists them."""
    return comfy.pack_nodes()[PACK]


@pytest.fixture(scope="session")
def run(comfy):
    """Run a prompt in API format -> comfy_client.Run; takes the options of ComfyClient.run."""
    return comfy.client.run


@pytest.fixture(scope="session")
def chance() -> np.random.Generator:
    """Random numbers that are new in every run; the seed is printed when a test fails."""
    seed = int(np.random.SeedSequence().entropy % 2**63)
    print(f"chance is seeded with {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def new_seed(chance):
    """Seeds that no other test uses, so that nothing comes out of ComfyUI's cache by accident."""
    return lambda: int(chance.integers(2**62))


@pytest.fixture
def fresh_seed() -> int:
    """A seed that is new in every run, or that of the variable SEED; printed when a test fails."""
    seed = int(os.environ.get("SEED") or np.random.SeedSequence().entropy % 2**63)
    print(f"SEED={seed} repeats it")
    return seed


@pytest.fixture(scope="session")
def demo() -> dict:
    """The workflow of the demo in API format."""
    return json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def graph(demo, comfy):
    """Make a prompt of the demo's, shrunk: keyword arguments set inputs by their names, which are unique in it.

    A value that is a tuple (class_type, inputs, output=0) becomes a node of its own, whose inputs may be such tuples.
    Inputs of the nodes that stand before the sampler add these, with their defaults for the others.
    """
    schemas = comfy.client.object_info()

    def make(**changes) -> dict:
        prompt, later = copy.deepcopy(demo), {}
        for name, value in (SMALL | changes).items():
            known = [node for node in prompt.values() if name in known_inputs(schemas, node["class_type"])]
            if not known:
                later[name] = value
                continue
            (node,) = known
            node["inputs"][name] = linked(prompt, value)
        for kind in BEFORE_THE_SAMPLER:
            own = {name: later.pop(name) for name in known_inputs(schemas, kind) if name in later}
            if own:
                put_before_the_sampler(prompt, schemas, kind, own)
        assert not later, f"no node has {', '.join(later)}"
        return prompt

    return make


def put_before_the_sampler(prompt: dict, schemas: dict, kind: str, changes: dict) -> None:
    """A node that takes a model and gives one, between the sampler and what it had as its model."""
    (sampler,) = [node for node in prompt.values() if node["class_type"] == "WanS2VSample"]
    widgets = {name: options for name, (_, *options) in schemas[kind]["input"]["required"].items()}
    usual = {name: options[0]["default"] for name, options in widgets.items() if options and "default" in options[0]}
    before = sampler["inputs"]["model"]
    sampler["inputs"]["model"] = linked(prompt, (kind, usual | {"model": before} | changes))


def known_inputs(schemas: dict, class_type: str) -> list[str]:
    groups = schemas[class_type]["input_order"].items()
    return [name for group, names in groups if group != "hidden" for name in names]


def linked(prompt: dict, value):
    """A value as the input of a node; tuples are added to the prompt as nodes."""
    if not isinstance(value, tuple):
        return value
    kind, inputs, output = (*value, 0)[:3]
    ready = {name: linked(prompt, inner) for name, inner in inputs.items()}
    number = f"{max(map(int, prompt)) + 1}"
    prompt[number] = {"class_type": kind, "inputs": ready}
    return [number, output]


@pytest.fixture(scope="session")
def add_node():
    """Add a node to a prompt -> its number. Inputs may be tuples as for `graph`."""

    def add(prompt: dict, kind: str, **inputs) -> str:
        return linked(prompt, (kind, inputs))[0]

    return add


@pytest.fixture(scope="session")
def write_sound(comfy, chance):
    """Write a wav of random speech-like noise, or of given samples N C, into the input folder -> its name."""

    def write(name: str, seconds: float = 1.0, channels: int = 1, rate: int = 48000, samples=None) -> str:
        if samples is None:
            times = np.arange(round(seconds * rate)) / rate
            syllables = np.sin(2 * np.pi * 4 * times)[:, None] > -0.3
            samples = 0.3 * chance.standard_normal((len(times), channels)).clip(-3, 3) * syllables
        samples = samples[:, None] if np.ndim(samples) == 1 else samples
        with wave.open(str(comfy.base / "input" / name), "wb") as file:
            file.setnchannels(samples.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        return name

    return write


@pytest.fixture(scope="session")
def write_picture(comfy, chance):
    """Write a random picture into the input folder -> its name."""

    def write(name: str, width: int = 72, height: int = 96, mode: str = "RGB") -> str:
        bands = Image.new(mode, (1, 1)).getbands()
        pixels = chance.integers(0, 256, (height, width, len(bands)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(-1) if len(bands) == 1 else pixels).save(comfy.base / "input" / name)
        return name

    return write


@pytest.fixture(scope="session")
def write_film(comfy, chance):
    """Write a silent film of random pictures into the input folder -> its name."""

    def write(name: str, frames: int = 25, fps: int = 25, width: int = 64, height: int = 96) -> str:
        with av.open(str(comfy.base / "input" / name), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(frames):
                pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        return name

    return write


@dataclass(frozen=True)
class Film:
    """A decoded video file: pictures T H W 3 uint8, sound C N."""

    pictures: np.ndarray
    fps: float
    sound: np.ndarray
    rate: int
    sound_begins: float
    tags: dict[str, str]

    @property
    def sound_seconds(self) -> float:
        return self.sound.shape[1] / self.rate


@pytest.fixture(scope="session")
def watch():
    """Decode all of a video file."""

    def read(path: Path) -> Film:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = float(stream.average_rate)
        with av.open(str(path)) as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
            stream = container.streams.audio[0]
            mixer = av.AudioResampler(format="fltp")
            frames = list(container.decode(stream))
            parts = [part.to_ndarray() for frame in frames for part in mixer.resample(frame)]
            sound = np.concatenate(parts, axis=1)
        return Film(np.stack(pictures), fps, sound, stream.rate, float(frames[0].time), tags)

    return read


def reason(ended) -> str:
    """Why a run did not succeed."""
    said = [f"{error.get('exception_type')}: {error.get('exception_message')}" for error in ended.errors]
    return f"{ended.status}: {said} {ended.node_errors}"


@pytest.fixture(scope="session")
def message_of():
    """The message of a prompt that our code refused, which must be one for people."""

    def read(ended) -> str:
        assert ended.status == "error" and len(ended.errors) == 1, reason(ended)
        (error,) = ended.errors
        assert OUR_ERROR.search(error["exception_type"]), reason(ended)
        message = error["exception_message"].strip()
        assert "\n" not in message and message.endswith("."), message
        return message

    return read


@pytest.fixture(scope="session")
def refused_by_menu():
    """Whether ComfyUI itself refused a value that no menu of ours has: newer versions do, before anything runs."""

    def is_refused(ended) -> bool:
        kinds = {error["type"] for node in ended.node_errors.values() for error in node["errors"]}
        return ended.status == "rejected" and kinds == {"value_not_in_list"}

    return is_refused


@pytest.fixture
def server_lives(comfy):
    """After the test the server is there, and no half-written file."""
    yield
    assert comfy.process.poll() is None, comfy.log(40)
    assert not list(comfy.output.rglob("*.part")), "an unfinished file was left"


@pytest.fixture
def film(comfy, watch, run):
    """Run a prompt that must succeed, and decode the video it saves."""

    def make(prompt: dict) -> Film:
        ended = run(prompt)
        assert ended.status == "success", reason(ended)
        return watch(comfy.videos(ended)[-1])

    return make
