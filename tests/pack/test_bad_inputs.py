"""Mistakes, through the API: each gets one message with the value, the rule and the way out, and the server goes on.

ComfyUI checks numbers against their ranges, links against their types and files of its own loaders; the rest is ours.
"""

import contextlib
import io
import os
import re
import resource
import shutil
import struct
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "assets" / "checkpoint"
SAMPLE, SAVE = "6", "7"
NAN = float("nan")
MB = 1 << 20

pytestmark = pytest.mark.usefixtures("server_lives")


def sound(name: str) -> dict:
    return {"audio": ("LoadAudio", {"audio": name})}


def picture(name: str) -> dict:
    return {"picture": ("LoadImage", {"image": name})}


def pose(name: str) -> dict:
    return {"pose_video": ("LoadVideo", {"file": name})}


def model(name: str) -> dict:
    return {"model": ("WanS2VLoadModel", {"name": name})}


def speed(**changes) -> dict:
    """The demo's model behind Wan S2V Speed."""
    usual = {"attention": "auto", "sparse_keep": 1.0, "sparse_by": "scores", "sparse_dense_steps": 2}
    usual |= {"sparse_dense_blocks": 1, "fused": True, "vae": "auto"}
    return {"model": ("WanS2VSpeed", {"model": ["1", 0], **usual, **changes})}


DENSE = {"checkpoint": "Dense (folder)"}
"""What the fixture `dense_checkpoint` writes; the embedded model has experts."""

OURS = {
    "sound of not-a-numbers": (sound("nan.wav"), "samples are infinite or not a number"),
    "sound of one sample": (sound("dot.wav"), "ms long"),
    "film without sound": (
        {"audio": ("GetVideoComponents", {"video": ("LoadVideo", {"file": "silent.mp4"})}, 1)},
        "holds no sound",
    ),
    "start beyond the end": ({"start_seconds": 5000.0}, "start_seconds=5000"),
    "start is no number": ({"start_seconds": NAN}, "start_seconds=nan"),
    "length is no number": ({"seconds": NAN}, "seconds=nan"),
    "picture of one pixel": (picture("dot.png"), "1x1 px"),
    "picture 20000 px wide": (picture("wide.png"), "20000x20 px"),
    "picture too long for the area": (
        {**picture("long.png"), "size_rule": "picture's aspect"},
        "Crop the picture, or choose a larger size",
    ),
    "width of 100": ({"width": 100}, "size 100x64"),
    "clip frames": ({"clip_frames": 22}, "clip_frames=22"),
    "fps is no number": ({"fps": NAN}, "fps=nan"),
    "shift is no number": ({"shift": NAN}, "shift=nan"),
    "guidance is no number": ({"guidance_scale": NAN}, "guidance_scale=nan"),
    "audio guidance below 1": ({"audio_guidance_scale": 0.5}, "audio_guidance_scale=0.5"),
    "driving video is text": (pose("text.mp4"), "text.mp4"),
    "driving video is cut": (pose("cut.mp4"), "cut.mp4"),
    "solver": ({"solver": "nope"}, "solver='nope'"),
    "spacing": ({"spacing": "nope"}, "spacing='nope'"),
    "noise": ({"noise": "nope"}, "noise='nope'"),
    "precision": ({"precision": "int3"}, "precision='int3'"),
    "fit": ({"fit": "stretch"}, "fit='stretch'"),
    "timing": ({"timing": "late"}, "timing='late'"),
    "clip plan": ({"clip_plan": "none"}, "clip_plan='none'"),
    "size rule": ({"size_rule": "any"}, "size_rule='any'"),
    "device of the text encoder": ({"device": "tpu"}, "device='tpu'"),
    "format": ({"format": "gif"}, "format='gif'"),
    "overflow of experts": ({"moe_overflow": "nope"}, "overflow='nope'"),
    "drop without a capacity": ({"moe_overflow": "drop"}, "drops nothing"),
    "more experts than there are": ({"moe_top_k": 9}, "top_k=9 with 8 experts"),
    "a second model of other sizes": (
        {"low_noise_model": ("WanS2VLoadModel", {"name": "Dense (folder)"})},
        "the models for high and low noise differ in",
    ),
    "a second model that is none": ({"low_noise_model": "second"}, "low_noise_model='second' is no link to a node"),
    "a pair in a pair": (
        {
            "low_noise_model": (
                "WanS2VModelPair",
                {"model": ["1", 0], "low_noise_model": ["1", 0], "noise_boundary": 0.5},
            )
        },
        "low_noise_model is a pair of models already",
    ),
    "boundary is no number": ({"low_noise_model": ["1", 0], "noise_boundary": NAN}, "noise_boundary=nan"),
    "dropout is no number": ({"moe_gate_dropout": NAN}, "gate_dropout=nan"),
    "attention that does not run here": (speed(attention="sage"), "'sage' cannot be used: "),
    "attention of no name": (speed(attention="warp"), "attention='warp' is not known. Use one of: auto, auto8, "),
    "share of attention is no number": (speed(sparse_keep=NAN), "sparse_keep=nan"),
    "share of attention by nothing": (speed(sparse_by="luck"), "sparse_by='luck'"),
    "precision of the VAE": (speed(vae="int3"), "vae='int3'"),
    "nothing to make faster": (speed(model="fast"), "model='fast' is no link to a node"),
    "unknown checkpoint": ({"checkpoint": "nope"}, "'nope' is not among the models"),
    "checkpoint in another folder": ({"checkpoint": "../../input"}, "'../../input' is not among the models"),
    "model at an absolute path": (model("/etc/passwd"), "'/etc/passwd' is not among the models"),
    "model by a path that climbs": (model("wrong/../vae.safetensors"), "is not among the models"),
    "model is a VAE": (model("vae.pth"), "is a Wan 2.1 VAE, not a"),
    "model is cut": (model("cut.safetensors"), "cut.safetensors"),
    "model is text": (model("text.safetensors"), "text.safetensors"),
    "model is empty": (model("empty.safetensors"), "empty.safetensors"),
    "model is one of two shards": (model("part-00001-of-00002.safetensors"), "one of 2 shards"),
    "model of another text width": (model("Wide (folder)"), "text encoder gives embeddings of width"),
    "model with a broken config": (model("Broken (folder)"), "config.json"),
    "checkpoint without its encoders": ({"checkpoint": "Wide (folder)"}, "has the DiT but no umT5 text encoder"),
    "text encoder without its tokenizer": (
        {"text_encoder": ("WanS2VLoadTextEncoder", {"name": "bare/umt5.pth"})},
        "google/umt5-xxl",
    ),
    "name is empty": ({"filename_prefix": ""}, "filename_prefix=''"),
    "folder is a file": ({"filename_prefix": "taken/video"}, "filename_prefix='taken/video'"),
}

REJECTED = {
    "no such sound": (sound("gone.wav"), "custom_validation_failed", "gone.wav"),
    "no such picture": (picture("gone.png"), "custom_validation_failed", "gone.png"),
    "no such driving video": (pose("gone.mp4"), "custom_validation_failed", "gone.mp4"),
    "name climbs out": ({"filename_prefix": "../../x"}, "custom_validation_failed", "filename_prefix='../../x'"),
    "name climbs out later": (
        {"filename_prefix": "a/../../../x"},
        "custom_validation_failed",
        "filename_prefix='a/../../../x'",
    ),
    "name at an absolute path": ({"filename_prefix": "/abs/x"}, "custom_validation_failed", "filename_prefix='/abs/x'"),
    "name of dots": ({"filename_prefix": "a/.."}, "custom_validation_failed", "filename_prefix='a/..'"),
    "name with a zero byte": ({"filename_prefix": "a\0b"}, "custom_validation_failed", "a\\x00b has a null character"),
    "name too long": ({"filename_prefix": "x" * 300}, "custom_validation_failed", "filename_prefix xxx"),
    "wrong socket": ({"vae": ["2", 1]}, "return_type_mismatch", "WAN_S2V_VAE"),
    "no steps": ({"steps": 0}, "value_smaller_than_min", "steps"),
    "too many steps": ({"steps": 10**9}, "value_bigger_than_max", "steps"),
    "steps in words": ({"steps": "many"}, "invalid_input_type", "steps"),
    "guidance below 1": ({"guidance_scale": 0.5}, "value_smaller_than_min", "guidance_scale"),
    "negative seed": ({"seed": -1}, "value_smaller_than_min", "seed"),
    "seed of 65 bits": ({"seed": 2**64}, "value_bigger_than_max", "seed"),
    "fps of 0.5": ({"fps": 0.5}, "value_smaller_than_min", "fps"),
    "fps of 1000": ({"fps": 1000.0}, "value_bigger_than_max", "fps"),
    "clip of 8 frames": ({"clip_frames": 8}, "value_smaller_than_min", "clip_frames"),
    "width of 32": ({"width": 32}, "value_smaller_than_min", "width"),
    "negative length": ({"seconds": -1.0}, "value_smaller_than_min", "seconds"),
}

COMFYS_OWN = {
    "sound is text": sound("text.wav"),
    "sound is empty": sound("empty.wav"),
    "sound without a sample": sound("none.wav"),
    "mp3 is cut": sound("cut.mp3"),
    "picture is text": picture("text.png"),
    "picture is cut": picture("cut.png"),
}
"""Files that ComfyUI's LoadAudio and LoadImage read, and refuse or take in their own way."""

FINE = {
    "silence": sound("silence.wav"),
    "nine channels": sound("nine.wav"),
    "eight kilohertz": sound("low.wav"),
    "picture with transparency": {
        "picture": (
            "JoinImageWithAlpha",
            {
                "image": ("LoadImage", {"image": "alpha.png"}),
                "alpha": ("LoadImage", {"image": "alpha.png"}, 1),
            },
        )
    },
    "transparent picture file": picture("alpha.png"),
    "grey picture": picture("grey.png"),
    "picture of 16 px": picture("small.png"),
    "tall picture": picture("tall.png"),
    "prompt of 3000 words": {"prompt": "a person talks and sings, " * 600},
    "empty prompts": {"prompt": "", "negative_prompt": ""},
    "prompt of signs": {"prompt": "说话的人 🙂 \u202e\x07 <extra_id_0> </s> (word:1.3)"},
    "negative prompt zeroed out": {"negative": ("ConditioningZeroOut", {"conditioning": ["4", 0]})},
    "short driving video": pose("silent.mp4"),
    "highest seed": {"seed": 2**63 - 1},
    "one frame a second": {"fps": 1.0, "seconds": 3.0},
    "less sound than a frame": {"seconds": 0.05},
    "name in other letters": {"filename_prefix": "видео/Größe %width%"},
}


@pytest.fixture(scope="module", autouse=True)
def files(comfy, dense_checkpoint, write_sound, write_picture, write_film, chance):
    """Everything that the cases name."""
    folder, models = comfy.base / "input", comfy.base / "models"
    write_sound("dot.wav", samples=np.zeros(1))
    write_sound("none.wav", samples=np.zeros((0, 1)))
    write_sound("silence.wav", samples=np.zeros(48000))
    write_sound("nine.wav", 1.0, channels=9)
    write_sound("low.wav", 1.0, rate=8000)
    samples = chance.standard_normal(24000).astype("<f4")
    samples[chance.integers(24000)] = NAN
    (folder / "nan.wav").write_bytes(float_wav(samples))
    (folder / "cut.mp3").write_bytes(mp3(chance)[:2000])
    write_picture("dot.png", 1, 1)
    write_picture("small.png", 16, 16)
    write_picture("wide.png", 20000, 20)
    write_picture("long.png", 8000, 20)
    write_picture("tall.png", 20, 900)
    write_picture("alpha.png", mode="RGBA")
    write_picture("grey.png", mode="L")
    whole = (folder / write_picture("cut.png", 100, 100)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    whole = (folder / write_film("silent.mp4", 5)).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.wav", "text.png", "text.mp4"):
        (folder / name).write_text("this is neither sound nor picture")
    (folder / "empty.wav").write_bytes(b"")
    (comfy.output / "taken").write_text("a file where a folder would be")
    make_models(models / "diffusion_models", models / "text_encoders")


def make_models(dits: Path, texts: Path) -> None:
    for folder in (dits, texts):
        folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(CHECKPOINT.glob("*.safetensors"))
    shutil.copy(CHECKPOINT / "Wan2.1_VAE.pth", dits / "vae.pth")
    (dits / "cut.safetensors").write_bytes(shards[0].read_bytes()[: 500 * 1024])
    (dits / "text.safetensors").write_text("this is no model")
    (dits / "empty.safetensors").write_bytes(b"")
    shutil.copy(shards[0], dits / "part-00001-of-00002.safetensors")
    config = (CHECKPOINT / "config.json").read_text(encoding="utf-8")
    changes = {"Wide": re.sub(r'"text_dim": (\d+)', lambda found: f'"text_dim": 2{found[1]}', config), "Broken": "{"}
    for name, text in changes.items():
        shutil.copytree(CHECKPOINT, dits / name, ignore=shutil.ignore_patterns("*.pth", "google", "wav2vec2*"))
        (dits / name / "config.json").write_text(text, encoding="utf-8")
    (texts / "bare").mkdir()  # a folder that no other test puts a tokenizer into
    shutil.copy(CHECKPOINT / "models_t5_umt5-xxl-enc-bf16.pth", texts / "bare" / "umt5.pth")


def float_wav(samples: np.ndarray, rate: int = 24000) -> bytes:
    """A mono wav with float samples, which may be no numbers."""
    data = samples.tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def mp3(chance, rate: int = 24000) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp3") as container:
        stream = container.add_stream("mp3", rate=rate)
        frame = av.AudioFrame.from_ndarray(
            chance.standard_normal((1, rate)).astype(np.float32) / 10, format="fltp", layout="mono"
        )
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


@pytest.mark.parametrize("mistake", OURS)
def test_mistakes_are_named(mistake, graph, run, message_of, refused_by_menu):
    changes, wanted = OURS[mistake]
    ended = run(graph(**changes))
    if not refused_by_menu(ended):
        message = message_of(ended)
        assert wanted in message, message


@pytest.mark.parametrize("mistake", REJECTED)
def test_comfyui_refuses_before_running(mistake, graph, run):
    changes, kind, named = REJECTED[mistake]
    ended = run(graph(**changes))
    assert ended.status == "rejected" and not ended.started
    (error,) = [error for node in ended.node_errors.values() for error in node["errors"]]
    assert error["type"] == kind and named in f"{error['message']} {error['details']}"


@pytest.mark.parametrize("mistake", COMFYS_OWN)
def test_files_that_comfyuis_loaders_read(mistake, graph, run):
    """Only that it ends: the message, or what is made of half a file, is theirs."""
    assert run(graph(**COMFYS_OWN[mistake])).status in ("error", "success")


@pytest.mark.parametrize("case", FINE)
def test_unusual_inputs_work(case, graph, film):
    shown = film(graph(**FINE[case]))
    changes = FINE[case]
    seconds, fps = changes.get("seconds", 1.0), changes.get("fps", 16.0)
    assert len(shown.pictures) == max(1, round(seconds * fps))


@contextlib.contextmanager
def largest_file(process_id: int, size: int):
    """Files of another process cannot grow beyond so many bytes, as on a full disk."""
    before = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
    resource.prlimit(process_id, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process_id, resource.RLIMIT_FSIZE, before)


def test_disk_full_while_clips_are_kept(graph, run, comfy, new_seed, message_of):
    prompt = graph(seed=new_seed())
    with largest_file(comfy.process.pid, MB):
        message = message_of(run(prompt))
    assert "clip 1 cannot be kept" in message and "Free some space" in message
    assert run(prompt).status == "success"


def test_disk_full_while_the_video_is_saved(graph, run, comfy, write_sound, new_seed, message_of):
    """The clips are there already: with room, saving alone runs again."""
    prompt = graph(**sound(write_sound("big.wav", 2.0, channels=8, rate=96000)), seconds=0.0, seed=new_seed())
    common = {"filename_prefix": "full", "format": "lossless-mkv"}
    assert run(prompt).status == "success"
    prompt[SAVE]["inputs"] |= common
    with largest_file(comfy.process.pid, MB):
        message = message_of(run(prompt))
    assert "cannot grow" in message and "free some space" in message
    assert not list(comfy.output.glob("full*"))
    again = run(prompt)
    assert again.status == "success" and set(again.started) == {SAVE}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_is_read_only(graph, run, comfy, message_of):
    folder = comfy.output / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        message = message_of(run(graph(filename_prefix="locked/video")))
    finally:
        folder.chmod(0o700)
    assert "must be writable" in message


def test_the_server_still_works(graph, film, new_seed):
    assert len(film(graph(seed=new_seed())).pictures) == 16
