"""Runs that are killed, files that are damaged, two runs at once: nothing finished is lost, and no film is another one
than it would have been."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_generate import command, cut_short, inputs, kept_pictures, make, media, stopped  # noqa: F401  (fixtures)

from wan_s2v_core import cli, pipeline
from wan_s2v_core.config import ExpertRouting, SamplingConfig
from wan_s2v_core.errors import CheckpointError, ConfigError
from wan_s2v_core.io import locks
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.io.clip_store import (
    ClipStore,
    check_unused,
    clip_path,
    find_earlier,
    motion_path,
    remove_clips,
    save_checked,
    write_settings,
)
from wan_s2v_core.io.digest import file_digest
from wan_s2v_core.io.encodings import EncodingStore
from wan_s2v_core.io.records import read_record, write_record
from wan_s2v_core.io.video import VideoWriter, read_header
from wan_s2v_core.io.video_clips import check_earlier, earlier_seed
from wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.sampling.clips import clip_noise

ROOT = Path(__file__).resolve().parents[2]
KILLED = 9
pytestmark = pytest.mark.usefixtures("pooled_vae")


def leftovers(box: Path, name: str) -> list[str]:
    return sorted(path.name for path in box.iterdir() if name in path.name and path.name != name)


# --- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["plain", "apart"])
def test_killed_at_any_write_it_goes_on_to_the_same_film(scene, inputs, tiny_checkpoint, fresh_seed):  # noqa: F811
    """Also while clips are removed, and while those of another video are set apart: see killed_runs.py."""
    words = [
        sys.executable,
        str(Path(__file__).with_name("killed_runs.py")),
        inputs,
        tiny_checkpoint,
        fresh_seed,
        scene,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


def unfinished(folder: Path) -> None:
    """As a run leaves it that was killed while it wrote its first clip."""
    folder.mkdir()
    (folder / "settings.json").write_text('{"sampling": {"seed": 99}}')
    (folder / ".clip_0000.1a2b3c4d.part").write_bytes(b"half")
    (folder / "clip_0000.mkv").write_bytes(b"a film without latents")


def test_a_folder_without_a_finished_clip_is_used(make, inputs):  # noqa: F811
    unfinished(inputs / "out.mp4.clips")
    made, _ = make()
    assert made.frames == 37 and leftovers(inputs, "out.mp4") == []


@pytest.mark.parametrize("name", ["notes.txt", "clip_0000.mp4", "clip_0001.mkv/"])
def test_what_is_not_ours_is_never_cleared(name, make, inputs):  # noqa: F811
    folder = inputs / "out.mp4.clips"
    unfinished(folder)
    foreign = folder / name
    foreign.mkdir() if name.endswith("/") else foreign.write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ConfigError, match=f"it holds {foreign.name}"):
        make()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_clips_that_became_a_video_are_in_nobodys_way(cut_short, make):  # noqa: F811
    """A run that was killed while it removed them, and then another film of the same name."""
    settings = json.loads((cut_short / "settings.json").read_text())
    write_settings(cut_short, {**settings, "saved": True})
    assert make(seed=4)[0].frames == 37 and not cut_short.exists()


def test_half_a_folder_is_still_known_for_what_it_is(cut_short):  # noqa: F811
    """Settings are the last that is removed."""
    names = [path.name for path in cut_short.iterdir()]
    removed = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", watched)
        remove_clips(cut_short)
    assert sorted(removed) == sorted(names) and removed[-1] == "settings.json" and not cut_short.exists()


# --- two at once ---------------------------------------------------------------------------------------------------


def test_a_second_run_is_told_at_once(command, run_cli, inputs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(CheckpointNetworks, "use", lambda *_: pytest.fail("a network is loaded"))
    with locks.held(inputs / "out.mp4.clips"):
        code, out, _ = run_cli(*command())
    assert code == 2 and "another run is at work in" in json.loads(out)["error"]
    assert not leftovers(inputs, "out.mp4")


def test_a_lock_dies_with_its_process(tmp_path):
    folder = tmp_path / "clips"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        locks.lock_of(folder).acquire()
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1)
    with pytest.raises(ConfigError, match="another run"), locks.held(folder):
        pass
    os.kill(child, KILLED)
    os.waitpid(child, 0)
    with locks.held(folder):
        assert list(tmp_path.iterdir()) == [locks.lock_of(folder).path]
    assert not list(tmp_path.iterdir())


def test_no_lock_where_the_disk_has_none(tmp_path, monkeypatch):
    """Runs go on there, and files that somebody may be writing stay."""

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".v.1a2b3c4d.part").write_bytes(b"half")
    with locks.held(tmp_path / "clips"), locks.written(tmp_path / "v.mkv") as partial:
        partial.write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".v.1a2b3c4d.part", "v.mkv"]


def test_files_under_way_are_cleared_unless_somebody_writes_them(tmp_path):
    dead, live, other = (tmp_path / f".{name}.part" for name in ("v.1a2b3c4d", "v.0a0b0c0d", "w.1a2b3c4d"))
    for path in (dead, live, other):
        path.write_bytes(b"half")
    with live.open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with VideoWriter(tmp_path / "v.mp4", 64, 64, 16) as writer:
            writer.write(torch.zeros(4, 64, 64, 3, dtype=torch.uint8))
    assert sorted(tmp_path.iterdir()) == sorted([live, other, tmp_path / "v.mp4"])


@pytest.mark.parametrize(("rank", "made"), [("0", True), ("1", False), ("7", False)])
def test_of_several_processes_the_first_makes_the_film(rank, made, command, inputs, capsys, caplog):  # noqa: F811
    assert cli.main([str(word) for word in command(num_clip=1, sample_steps=1)], rank, "8") == 0
    assert (inputs / "out.mp4").is_file() == made
    told = capsys.readouterr()
    assert made or (not told.out and told.err.count("\n") == 1 and f"process {rank} of 8" in told.err)


def test_torchrun_is_known_where_it_starts_the_command(tmp_path):
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    words = [sys.executable, str(ROOT / "generate.py"), "--ckpt_dir", "m", "--audio", "a.wav"]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "process 1 of 2" in ended.stderr and not list(tmp_path.iterdir())


STOPPED_AT_IMPORT = """
import os, runpy, signal, sys

class Stop:
    def find_spec(self, name, *rest):
        if name == stopped:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if name != "torch":
                    raise
                raise ImportError("as libraries make it of a Ctrl-C")

stopped = sys.argv.pop(1)
sys.meta_path.insert(0, Stop())
del sys.argv[0]
by_path = sys.argv[0].endswith(".py")
(runpy.run_path if by_path else runpy.run_module)(sys.argv[0], run_name="__main__")
"""
MOMENTS = [
    ("argparse", ["wan_s2v_core", "--help"]),
    ("wan_s2v_core.cli", ["wan_s2v_core", "inspect", "none"]),
    ("wan_s2v_core.config", [str(ROOT / "generate.py"), "--ckpt_dir", "m"]),
    ("torch", ["wan_s2v_core", "inspect", "none"]),
]


def test_an_error_that_a_library_made_of_ctrl_c(capsys):
    assert cli.main(["inspect", "none"], stopped=lambda: True) == 130 and cli.main(["inspect", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: stopped.\nerror: none")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("module", "words"), MOMENTS)
def test_ctrl_c_while_a_command_is_loaded(module, words, as_json):
    words = [sys.executable, "-c", STOPPED_AT_IMPORT, module, *words, *["--json"] * as_json]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "error: stopped.\n")
    assert ended.stdout == as_json * '{"error": "stopped."}\n'


# --- damaged -------------------------------------------------------------------------------------------------------

KEYS = ["a" * 64, "b" * 64, "c" * 64]
SIZE = 16, 32
"""Height and width."""


def film_of(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (8, *SIZE, 3), dtype=torch.uint8, generator=generator)


def fill(folder: Path, keys: list[str] = KEYS) -> ClipStore:
    """A folder with the clips of `keys`, going on with what is there."""
    earlier = find_earlier([folder], keys, lambda _: (8, *SIZE))
    settings = {"keep_clips": False, "clips": 3, "sampling": {"seed": 5}}
    store = ClipStore(folder, 16.0, Recording(torch.zeros(1, 24000), 16000), settings, keys, earlier)
    for index in range(len(store.clip_frames), len(keys)):
        latents = torch.full((1, 16, 2, SIZE[0] // 8, SIZE[1] // 8), float(index))
        store.add(film_of(index), latents, torch.full((1, 3, 9, *SIZE), float(index)))
    return store


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "clips"
    fill(folder)
    return folder


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def grow(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + chance.choice([1, 8, 10**11]))


def random_bytes(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.randrange(200)))


def pipe(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(path: Path, chance: random.Random) -> None:
    other = chance.choice([found for found in path.parent.iterdir() if found.suffix == path.suffix])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def lying_header(path: Path, chance: random.Random) -> None:
    """As safetensors files are: a length and JSON, of any kind."""
    text = chance.choice([b"{}", b"[" * 9000, b'{"__metadata__":5}', b'{"latents":{"dtype":"F32"}}', b"\xff" * 9])
    path.write_bytes(struct.pack("<Q", chance.choice([len(text), 2**63, 10**8])) + text)


def any_json(path: Path, chance: random.Random) -> None:
    """For settings: each of the wrong kind somewhere."""
    values = [None, True, -1, 2**70, 1e300, "x", [], {}, [[]], {"seed": "x"}, {"seed": -5}]
    names = ("keep_clips", "clips", "sampling", "routing", "saved", "request")
    path.write_text(json.dumps({name: chance.choice(values) for name in names}))


def deep(path: Path, chance: random.Random) -> None:
    path.write_text('{"a":' * 50_000)


def redone(path: Path, chance: random.Random) -> None:
    """Written by our own function, with a right digest, but other tensors or facts."""
    name, film = ("motion_video", None) if "motion" in path.name else ("latents", path.with_suffix(".mkv"))
    tensor, facts = load_file(path)[name], {"key": KEYS[int(path.stem[-1])] if film else KEYS[-1]}
    if film:
        facts |= {"frames": "8", "height": str(SIZE[0]), "width": str(SIZE[1]), "film_bytes": str(film.stat().st_size)}
        facts |= {"film": file_digest(film), "clip": str(int(path.stem[-1]))}
        wrong = ["frames", "height", "width", "film_bytes", "film"]
        facts[chance.choice(wrong)] = chance.choice(["", "0", "-8", "7", "9" * 5000, "8.0", "x", "\u0668"])
    else:
        shapes = [(1,), (1, 3, 9, 8, 8), (3, 9, *SIZE)]
        tensor = chance.choice([*(torch.zeros(shape) for shape in shapes), tensor * float("nan"), tensor.long()])
    save_checked(path, name, tensor, facts)


def undigested(path: Path, chance: random.Random) -> None:
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, {"key": KEYS[0], "digest": "0" * 64})


ANY = [cut, flip, grow, random_bytes, pipe, swap, lambda path, _: path.unlink()]
RECORDS = [*ANY, lying_header, redone, undigested]
EDITS = {".mkv": ANY, ".safetensors": RECORDS, ".json": [*ANY[:5], any_json, deep]}


def test_no_edit_by_hand_changes_a_film_or_stops_a_run(good, tmp_path, fresh_seed):
    chance = random.Random(fresh_seed)
    expected = [film_of(index) for index in range(3)]
    for number in range(70):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        path = chance.choice(sorted(path for path in folder.iterdir()))
        edit = chance.choice(EDITS[path.suffix])
        edit(path, chance)
        what = number, path.name, getattr(edit, "__name__", "")
        store = fill(folder)
        assert all(map(torch.equal, store.stored, expected)), what
        assert [store.stored.latents(index).amax().item() for index in range(3)] == [0, 1, 2], what
        motion = store.stored.motion_video()
        assert motion is None or (motion.shape[3:] == SIZE and motion.unique().tolist() == [2.0]), what
        assert earlier_seed(tmp_path / "none.mp4") is None
        shutil.rmtree(folder)


def test_damaged_records_of_others_stop_nobody(good, tmp_path, fresh_seed):
    """A server looks at the folders of all runs for the beginning of its video."""
    chance = random.Random(fresh_seed)
    for number, path in enumerate(sorted(good.iterdir())):
        for edit in EDITS[path.suffix]:
            folder = Path(shutil.copytree(good, tmp_path / f"{number} {len(list(tmp_path.iterdir()))}"))
            edit(folder / path.name, chance)
    found = find_earlier([*sorted(tmp_path.iterdir()), good, good / "settings.json", good / "none"], KEYS)
    assert found.clips == 3


def test_a_film_that_changes_after_it_was_found_is_told(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "clips"))
    stored = fill(folder).stored
    flip(clip_path(folder, 1), random.Random(1))
    with pytest.raises(ConfigError, match=r"clip_0001.mkv is damaged.*Run it again"):
        list(stored)


def test_a_finished_clip_of_another_video_is_refused(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "clips"))
    clip_path(folder, 0, ".safetensors").unlink()
    check_unused(folder, KEYS)
    with pytest.raises(ConfigError, match=r"made another video \(clip_0001.safetensors\)"):
        check_unused(folder, ["x", "y", "z"])
    for index in (1, 2):
        flip(clip_path(folder, index, ".safetensors"), random.Random(1))
    check_unused(folder, ["x", "y", "z"])


@pytest.mark.parametrize("kind", ["a link that leads nowhere", "no folder"])
def test_what_stands_where_clips_go_is_told_before_the_run(kind, tmp_path):
    folder = tmp_path / "clips"
    folder.write_bytes(b"x") if kind == "no folder" else folder.symlink_to(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"clips is {kind}.*Delete it"):
        check_earlier(folder, SamplingConfig(), ExpertRouting())
    assert os.path.lexists(folder) and not (tmp_path / "none").exists()


def test_a_flipped_bit_in_an_encoding_is_made_anew(tmp_path, caplog):
    store, made = EncodingStore(tmp_path), {"prompt": torch.randn(1, 3, 4)}
    store.get("text", "a" * 64, lambda: made)
    (path,) = tmp_path.iterdir()
    flip(path, random.Random(0))
    again = {"prompt": torch.randn(1, 3, 4)}
    assert store.get("text", "a" * 64, lambda: again) is again and "made anew" in caplog.text
    os.replace(path, path.with_name(f"text-{'b' * 32}.safetensors"))
    assert store.get("text", "b" * 64, lambda: made) is made, "an encoding under another's name is none"


def test_records_are_what_was_written(tmp_path):
    path, tensor = tmp_path / "r.safetensors", torch.randn(2, 3)
    write_record(path, {"t": tensor}, {"a": "1"})
    assert torch.equal(read_record(path).tensors["t"], tensor) and read_record(path).facts == {"a": "1"}
    for facts, other in (({"a": "2"}, tensor), ({"a": "1"}, tensor + 1), ({}, tensor)):
        digest = load_metadata(path)["digest"]
        save_file({"t": other}, tmp_path / "x.safetensors", {**facts, "digest": digest})
        assert read_record(tmp_path / "x.safetensors") is None
    write_record(path, {"t": tensor / 0}, {})
    assert read_record(path) is None, "no numbers to go on with"


def load_metadata(path: Path) -> dict[str, str]:
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TEXT_ENCODER, "reading the prompt: the umT5 text encoder gives"),
        (SPEECH_ENCODER, "hearing the voice: the wav2vec 2.0 audio encoder gives"),
        (DIT, "sampling clip 1 of 2, step 1 of 2: the S2V DiT gives"),
        (VAE, "encoding 1 frames: the Wan 2.1 VAE gives"),
    ],
)
def test_broken_weights_make_no_film(kind, message, value, make, inputs, monkeypatch, real_vae):  # noqa: F811
    spoil(monkeypatch, kind, value, "encoder" if kind == VAE else "")
    with pytest.raises(CheckpointError, match=message):
        make()
    assert leftovers(inputs, "out.mp4") == [] and not (inputs / "out.mp4").exists()


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_broken_decoder_makes_no_film(value, make, inputs, monkeypatch, real_vae):  # noqa: F811
    spoil(monkeypatch, VAE, value, "decode")
    with pytest.raises(CheckpointError, match=r"decoding clip 1 of 2: the Wan 2\.1 VAE gives"):
        make()
    assert leftovers(inputs, "out.mp4") == []


def test_a_later_clip_is_not_kept_and_those_before_are(make, inputs, monkeypatch):  # noqa: F811
    check = pipeline.check_pixels

    def second(video, *given):
        spoiled = torch.full_like(video, 1.0) if "clip 2" in given[-1] else video
        check(spoiled, *given)

    monkeypatch.setattr(pipeline, "check_pixels", second)
    with pytest.raises(CheckpointError, match=r"decoding clip 2 of 2: .* nothing is to be seen"):
        make()
    assert sorted(path.name for path in (inputs / "out.mp4.clips").glob("clip*")) == [
        "clip_0000.mkv",
        "clip_0000.safetensors",
    ]


def spoil(monkeypatch, kind: str, value: float, part: str = "") -> None:
    """A network with weights of one value, in its last layer or in that of a part of it."""
    use = CheckpointNetworks.use

    @contextlib.contextmanager
    def spoiled(self, name, *given):
        with use(self, name, *given) as network:
            weights = [
                tensor for title, tensor in network.named_parameters() if part in title and "decode" not in title
            ] or [tensor for title, tensor in network.named_parameters() if part in title]
            if name == kind:
                with torch.inference_mode():
                    weights[-1].fill_(value)
            yield network

    monkeypatch.setattr(CheckpointNetworks, "use", spoiled)


# --- what is given -------------------------------------------------------------------------------------------------


def numeric_flags() -> list[str]:
    words = ["generate", "--ckpt_dir", "m", "--audio", "a"]
    parser = cli.make_parser()
    options = parser.parse_args(words)
    (commands,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)
    actions = commands.choices["generate"]._actions
    return [
        action.dest for action in actions if action.type in (cli.whole, cli.number) and hasattr(options, action.dest)
    ]


def test_there_are_numbers_to_try():
    assert len(numeric_flags()) > 20


@pytest.mark.parametrize("flag", numeric_flags())
def test_no_number_ends_in_a_traceback(flag, command, run_cli, inputs):  # noqa: F811
    for value in ("9" * 5000, "9" * 20, "1e308", "-1e308", "nan", "inf", "", "x" * 5000):
        code, out, err = run_cli(*command(**{flag: value, "image": "none.png"}))
        error = json.loads(out)["error"]
        assert code == 2 and error.endswith(".") and len(error) < 500 and "\n" not in error, (value, error)
        assert err.count("\n") == 1 and "none.png" not in error, error
    assert not leftovers(inputs, "out.mp4")


@pytest.mark.parametrize(
    "value", ["9" * 5000 + "x9", "99999x99999", "1*" + "1" * 5000, "1e9*9", "-5x5", "\u0664x\u0664"]
)
def test_sizes_are_sizes(value, command, run_cli):  # noqa: F811
    code, out, _ = run_cli(*command(size=value))
    assert code == 2 and len(json.loads(out)["error"]) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a\udcff"}, "prompt is not valid Unicode at character 2"),
        ({"negative_prompt": "\ud800"}, "negative_prompt is not valid Unicode"),
        ({"prompt": "x" * 200_000}, "has 200,000 characters"),
        ({"save_file": "\udcff.mp4"}, "not valid Unicode"),
        ({"save_file": "x" * 5000 + ".mp4"}, "5,004 characters"),
        ({"save_file": "\u753b" * 80 + ".mp4"}, "is too long: a name may have 231 bytes"),
        ({"save_file": "a/" * 2047 + "v.mp4"}, "is too long|4,0.. characters"),
        ({"audio": "y" * 300}, "is too long"),
        ({"image": "a/" * 3000}, "characters; at most 4,095"),
        ({"ckpt_dir": "z" * 5000}, "5,000 characters"),
        ({"base_seed": -7}, "--base_seed -7 is below -1, which draws a new one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_and_words_are_looked_at_before_anything_runs(changes, message, command, run_cli):  # noqa: F811
    code, out, err = run_cli(*command(**changes))
    error = json.loads(out)["error"]
    assert code == 2 and re.search(message, error) and len(error) < 500 and err.count("\n") == 1, error


def test_long_names_of_many_bytes_work(make, inputs):  # noqa: F811
    name = "\u753b" * 75 + ".mkv"
    make(name)
    assert (inputs / name).is_file() and leftovers(inputs, name) == []


def test_seeds_reach_as_far_as_those_of_comfyui():
    shape = (1, 16, 1, 2, 2)
    last, first = (clip_noise(shape, seed, clip, "cpu") for seed, clip in ((2**64 - 1, 1), (0, 0)))
    assert torch.equal(last, first), "behind the last comes the first"
    assert not torch.equal(clip_noise(shape, 2**64 - 1, 0, "cpu"), first)


def test_a_video_tells_names_but_no_folders(make, inputs, tiny_checkpoint):  # noqa: F811
    make(keep_clips=True, prompt="somebody", cache_dir=str(inputs / "kept"))
    tags = read_header(inputs / "out.mp4").tags
    told = json.loads(tags["comment"])
    assert told["request"]["audio"] == "voice.wav" and told["request"]["checkpoint"] == tiny_checkpoint.name
    assert told["video"]["clip_frames"] == 20 and told["loading"]["precision"] == "float32"
    assert tags["clip_frames"] == "[17, 20]", "what quality reads"
    files = [path for path in (inputs / "out.mp4.clips").iterdir() if path.suffix != ".mkv"]
    for text in (tags["comment"].encode(), *(path.read_bytes() for path in files)):
        assert os.fsencode(inputs) not in text and os.fsencode(tiny_checkpoint) not in text
    make("quiet.mp4", metadata=False)
    assert not {"comment", "clip_frames"} & set(read_header(inputs / "quiet.mp4").tags)


def test_motion_of_another_length_is_made_again(good, tmp_path):
    """By a version with other clips, say: it is decoded from latents then."""
    folder = Path(shutil.copytree(good, tmp_path / "clips"))
    save_checked(motion_path(folder), "motion_video", torch.zeros(1, 3, 5, *SIZE), {"key": KEYS[-1]})
    assert fill(folder).stored.motion_video().shape[2] == 5, "generate_clips compares it with what it needs"
