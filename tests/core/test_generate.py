"""The whole job on the tiny checkpoint: files in, a playable video out, and one clear message for what cannot work."""

import json
import wave
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from wan_s2v_core import render as rendering
from wan_s2v_core.cli import make_parser, sampling_of
from wan_s2v_core.config import PRESETS, AccelerationPlan, SamplingConfig, VideoConfig, preset_lines
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io import weights
from wan_s2v_core.io.clip_store import ClipStore
from wan_s2v_core.io.video import VideoWriter, probe_video, read_frames
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.sampling.schedule import make_schedule

RATE = 22050


def write_wav(path, samples, rate=RATE):
    """samples: N or N C, -1..1."""
    data = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if data.ndim == 1 else data.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path


@pytest.fixture
def inputs(tmp_path):
    """A voice of 2.3 s in stereo, a picture, and a driving video of half that length."""
    times = np.arange(int(2.3 * RATE)) / RATE
    voice = 0.4 * np.sin(2 * np.pi * 220 * times) * (np.sin(2 * np.pi * 3 * times) > 0)
    write_wav(tmp_path / "voice.wav", np.stack([voice, 0.5 * voice], axis=1))
    noise = np.random.default_rng().integers(0, 255, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "face.png")
    with VideoWriter(tmp_path / "pose.mp4", 64, 96, 25) as writer:
        writer.write(torch.randint(0, 255, (28, 96, 64, 3), dtype=torch.uint8))
    return tmp_path


@pytest.fixture
def command(inputs, tiny_checkpoint):
    """`generate` in its smallest form; keyword arguments replace or add flags, None removes one."""

    def make(**changes):
        flags = {
            "ckpt_dir": tiny_checkpoint,
            "audio": inputs / "voice.wav",
            "image": inputs / "face.png",
            "save_file": inputs / "out.mp4",
            "size": "64*64",
            "infer_frames": 20,
            "sample_steps": 2,
            "base_seed": 3,
            "device": "cpu",
        } | changes
        words = ["generate", "--json"]
        for flag, value in flags.items():
            words += [] if value is None else [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return words

    return make


def test_a_voice_and_a_picture_become_a_video(command, run_cli, inputs):
    code, out, err = run_cli(*command())
    assert code == 0, err
    report = json.loads(out)
    assert set(report) == {"path", "frames", "fps", "width", "height", "clips", "audio_seconds", "seconds"}
    assert (report["frames"], report["fps"], report["clips"]) == (37, 16.0, 2)
    assert (report["width"], report["height"]) == (64, 64) and report["audio_seconds"] == pytest.approx(2.3, abs=1e-3)
    facts = probe_video(report["path"])
    assert facts.frames == 37 and (facts.width_px, facts.height_px) == (64, 64)
    assert facts.seconds == pytest.approx(37 / 16, abs=0.01)
    assert facts.audio_seconds == pytest.approx(37 / 16, abs=0.05)
    assert not list(inputs.glob("*.clips")), "the clips have become the video"


def test_each_weights_file_is_opened_once(command, run_cli, inputs, monkeypatch):
    opened = Counter()

    def watch(name):
        plain = getattr(weights, name)
        monkeypatch.setattr(weights, name, lambda path: opened.update([path]) or plain(path))

    watch("_open_safetensors")
    watch("_open_pickle")
    code, _, err = run_cli(*command(num_clip=1, sample_steps=1, cache_dir=inputs / "kept"))
    assert code == 0, err
    assert len(opened) >= len(PART_LABELS) and set(opened.values()) == {1}, opened


def test_timesteps_are_the_steps(command):
    """Whatever the preset says."""
    flags = {"sample_steps": None, "preset": "quick look", "timesteps": "1000,750,500"}
    sampling = sampling_of(make_parser().parse_args([str(word) for word in command(**flags)]), 0)
    assert sampling.timesteps == make_schedule(sampling).timesteps == (1000, 750, 500) and sampling.steps == 3


def test_text_form_ends_with_the_path(command, run_cli, inputs):
    words = [word for word in command(num_clip=1) if word != "--json"]
    code, out, err = run_cli(*words)
    assert code == 0 and out.splitlines()[-1] == str(inputs / "out.mp4")
    assert "clip 1 of 1, step 2" in err


def test_same_seed_same_video_and_clips_can_be_kept(command, run_cli, inputs):
    """The kept clips are lossless: two runs agree to the bit, and the video shows what they hold."""
    shown = []
    for name in ("a", "b"):
        code, _, err = run_cli(*command(save_file=inputs / f"{name}.mp4", keep_clips=True))
        assert code == 0, err
        folder = inputs / f"{name}.mp4.clips"
        assert {path.name for path in folder.iterdir()} == {
            "settings.json", "motion.safetensors",
            "clip_0000.mkv", "clip_0000.safetensors", "clip_0001.mkv", "clip_0001.safetensors",
        }  # fmt: skip
        shown.append(torch.cat([read_frames(folder / f"clip_000{n}.mkv", 16, 0, 99) for n in range(2)]))
    assert torch.equal(*shown) and len(shown[0]) == 37
    settings = json.loads((inputs / "a.mp4.clips" / "settings.json").read_text(encoding="utf-8"))
    assert settings["sampling"]["seed"] == 3 and settings["video"]["clip_frames"] == 20


@pytest.mark.parametrize(
    "flags",
    [
        {"pose_video": "pose.mp4"},
        {"start_from_ref": True},
        {"clip_plan": "reference", "timing": "reference"},
        {"sample_solver": "dpm++", "sample_shift": 5, "spacing": "karras"},
        {"sample_guide_scale": 1},
        {"colour_match": 1},
        {"audio_guide_scale": 2.0},
        {"audio_start": 0.5, "audio_seconds": 1.0},
        {"fit": "pad", "fps": 25},
        {"attention": "sdpa", "fused": False, "vae_precision": "float32"},
        {"attention": "auto8"},
        {"sparse_keep": 0.5, "sparse_by": "distance", "sparse_dense_steps": 1, "sparse_dense_blocks": 0},
        {"convert_model_dtype": True, "t5_cpu": True, "offload_model": "True", "task": "s2v-14B", "ulysses_size": 1},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_options_work(flags, command, run_cli, inputs):
    flags = {name: inputs / value if name == "pose_video" else value for name, value in flags.items()}
    code, out, err = run_cli(*command(**flags))
    assert code == 0, err
    report = json.loads(out)
    seconds = flags.get("audio_seconds", 2.3)
    if flags.get("clip_plan") == "reference":
        assert report["frames"] == 2 * 20 - 3
    else:
        assert report["frames"] == round(report["fps"] * seconds)
    assert probe_video(report["path"]).frames == report["frames"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, SamplingConfig()),
        ({"preset": "ComfyUI template"}, SamplingConfig(steps=20, shift=8.0, guidance_scale=6.0)),
        ({"preset": "reference 720p", "sample_steps": 3}, SamplingConfig(steps=3, shift=5.0)),
        (
            {"preset": "embedded demo", "sample_shift": 5, "sample_guide_scale": 0.5, "sample_solver": "euler"},
            SamplingConfig(steps=10, shift=5.0, guidance_scale=1.0, solver="euler"),
        ),
        ({"preset": "quick look", "colour_match": 0.5}, SamplingConfig(steps=8, colour_match=0.5)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_preset_gives_way_to_flags(flags, expected):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    options = make_parser().parse_args(["generate", "--ckpt_dir", "m", "--audio", "a.wav", *words])
    assert sampling_of(options, seed=0) == expected


def test_presets_are_told_where_they_are_chosen(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(line in told for line in preset_lines()) and len(preset_lines()) == len(PRESETS)


@pytest.fixture
def make(inputs, tiny_checkpoint):
    """`render` of a video of 37 frames in 2 clips; keyword arguments change its request, and what it samples."""

    def run(name="out.mp4", stop=None, seed=3, acceleration=None, **changes):
        files = (str(tiny_checkpoint), str(inputs / "voice.wav"), str(inputs / "face.png"), str(inputs / name))
        video, sampling = VideoConfig(max_area=64 * 64, clip_frames=20), SamplingConfig(steps=2, seed=seed)
        seen = []

        def tell(clip, clips, step):
            seen.append((clip, step))
            if (clip, step) == stop:
                raise KeyboardInterrupt

        request = rendering.RenderRequest(*files, **changes)
        made = rendering.render(request, video, sampling, tell, acceleration=acceleration)
        return made, seen

    return run


def kept_pictures(folder):
    return torch.cat([read_frames(path, 16, 0, 99) for path in sorted(folder.glob("*.mkv"))])


@pytest.fixture
def cut_short(make, inputs):
    """A run that was stopped in its second clip."""
    with pytest.raises(KeyboardInterrupt):
        make(stop=(2, 1))
    return inputs / "out.mp4.clips"


def test_a_run_that_was_stopped_goes_on(cut_short, make, inputs, caplog):
    assert probe_video(cut_short / "clip_0000.mkv").frames == 17
    assert not (inputs / "out.mp4").exists()
    written = (cut_short / "clip_0000.mkv").stat().st_mtime_ns
    made, seen = make(keep_clips=True)
    assert seen == [(2, 1), (2, 2)] and made.frames == probe_video(made.path).frames == 37 and made.clips == 2
    assert "going on after clip 1 of 2" in caplog.text
    assert (cut_short / "clip_0000.mkv").stat().st_mtime_ns == written, "the finished clip is as it was"
    make("whole.mp4", keep_clips=True)
    assert torch.equal(kept_pictures(cut_short), kept_pictures(inputs / "whole.mp4.clips"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"seed": 4}, {"prompt": "another"}, {"precision": "bfloat16"}),
        {"acceleration": AccelerationPlan(sparse_keep=0.5)},
    ],
)
def test_clips_of_something_else_are_not_gone_on_with(changes, cut_short, make):
    before = {path.name: path.read_bytes() for path in cut_short.iterdir()}
    with pytest.raises(ConfigError, match="earlier run"):
        make(**changes)
    assert {path.name: path.read_bytes() for path in cut_short.iterdir()} == before


def test_clips_that_were_to_be_kept_are_kept(make, inputs):
    make(keep_clips=True)
    _, seen = make()
    assert not seen and probe_video(inputs / "out.mp4").frames == 37
    assert len(kept_pictures(inputs / "out.mp4.clips")) == 37


def test_later_clips_of_another_video_are_set_apart(make, inputs, caplog):
    """A driving video that is another one in the second clip."""
    pictures = torch.randint(0, 255, (60, 96, 64, 3), dtype=torch.uint8)
    with VideoWriter(inputs / "a.mkv", 64, 96, 16, preset="lossless-mkv") as writer:
        writer.write(pictures)
    pictures[30:] = 255 - pictures[30:]
    with VideoWriter(inputs / "b.mkv", 64, 96, 16, preset="lossless-mkv") as writer:
        writer.write(pictures)
    make(pose_video=str(inputs / "a.mkv"), keep_clips=True)
    first = kept_pictures(inputs / "out.mp4.clips")
    _, seen = make(pose_video=str(inputs / "b.mkv"), keep_clips=True)
    assert seen == [(2, 1), (2, 2)] and "later clips there are of another video" in caplog.text
    assert torch.equal(kept_pictures(inputs / "out.mp4.clips.1"), first)
    make("whole.mp4", pose_video=str(inputs / "b.mkv"), keep_clips=True)
    second = kept_pictures(inputs / "out.mp4.clips")
    assert torch.equal(second, kept_pictures(inputs / "whole.mp4.clips")) and not torch.equal(first, second)


def test_the_seed_of_a_stopped_run_is_gone_on_with(command, run_cli, inputs, monkeypatch, caplog):
    """Without --base_seed each run draws one, but for a run that did not end."""
    words = command(base_seed=None)

    def stop(store, *_):
        if len(store.clip_frames) == 1:
            raise KeyboardInterrupt
        add(store, *_)

    add = ClipStore.add
    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "add", stop)
        code, _, err = run_cli(*words)
    assert code == 130 and "out.mp4.clips" in err
    code, out, err = run_cli(*words)
    assert code == 0 and json.loads(out)["frames"] == 37, err
    assert "going on after clip 1 of 2" in caplog.text


BAD = {
    "missing audio": ({"audio": "no.wav"}, "no.wav"),
    "audio is text": ({"audio": "text.wav"}, "text.wav"),
    "audio is empty": ({"audio": "empty.wav"}, "empty.wav"),
    "audio of one sample": ({"audio": "dot.wav"}, "0.05 ms long"),
    "audio start past the end": ({"audio_start": 99}, "99"),
    "audio of no length": ({"audio_seconds": 0}, "0"),
    "audio is a picture": ({"audio": "face.png"}, "face.png"),
    "missing picture": ({"image": "no.png"}, "no.png is not there"),
    "picture is text": ({"image": "text.wav"}, "cannot be read as a picture"),
    "missing checkpoint": ({"ckpt_dir": "nowhere"}, "nowhere"),
    "missing driving video": ({"pose_video": "no.mp4"}, "no.mp4"),
    "driving video without pictures": ({"pose_video": "voice.wav"}, "voice.wav"),
    "size is no size": ({"size": "big"}, "--size big"),
    "size too small": ({"size": "32*32"}, "max_area=1024"),
    "clip frames": ({"infer_frames": 81}, "clip_frames=81"),
    "preset": ({"preset": "best"}, "preset='best' is not known. Use one of: reference 480p"),
    "colour match": ({"colour_match": 2}, "colour_match=2.0"),
    "no steps": ({"sample_steps": 0}, "steps=0"),
    "shift": ({"sample_shift": -1}, "shift=-1"),
    "solver": ({"sample_solver": "heun"}, "solver='heun'"),
    "spacing": ({"spacing": "log"}, "spacing='log'"),
    "timesteps that rise": ({"sample_steps": None, "timesteps": "500,750"}, "timesteps 500.0, 750.0 do not fall"),
    "timesteps that are none": ({"timesteps": "1000,,500"}, "--timesteps: 1000,,500: write numbers as 1000,750"),
    "timesteps and steps": ({"timesteps": "1000,750,500"}, "steps=2 with 3 timesteps, which say it themselves"),
    "guidance": ({"audio_guide_scale": 0.2}, "audio_guidance_scale=0.2"),
    "frames per second": ({"fps": 0}, "fps=0"),
    "fit": ({"fit": "stretch"}, "fit='stretch'"),
    "timing": ({"timing": "late"}, "timing='late'"),
    "clip plan": ({"clip_plan": "none"}, "clip_plan='none'"),
    "number of clips": ({"num_clip": 0}, "clips=0"),
    "precision": ({"precision": "int3"}, "precision='int3'"),
    "attention": ({"attention": "nonsense"}, "attention='nonsense' is not known. Use one of: auto, auto8, "),
    "attention of a card": (
        {"attention": "hopper"},
        "attention 'hopper' cannot be used: it needs an NVIDIA card. Usable here: auto, sdpa.",
    ),
    "no attention": ({"sparse_keep": 0}, "sparse_keep=0.0: the share of attention that is kept lies between 0 and 1."),
    "more than all attention": ({"sparse_keep": 1.5}, "Use such as 0.5, or 1 for all of it."),
    "dense steps": ({"sparse_dense_steps": -1}, "sparse_dense_steps=-1 must be 0 or more."),
    "dense blocks": ({"sparse_dense_blocks": -2}, "sparse_dense_blocks=-2 must be 0 or more."),
    "folder to save to": ({"save_file": "nowhere/out.mp4"}, "nowhere"),
    "kind of video": ({"save_file": "out.avi"}, "out.avi ends in no known kind"),
    "device": ({"device": "foo"}, "device 'foo' cannot be used"),
    "seed": ({"base_seed": 2**64}, "seed=18446744073709551616"),
    "checkpoint is a file": ({"ckpt_dir": "face.png"}, "is no folder"),
    "several cards": ({"ulysses_size": 4}, "--ulysses_size is not included"),
    "sharding": ({"dit_fsdp": True}, "multi-GPU runner"),
    "speech synthesis": ({"enable_tts": True}, "--enable_tts"),
    "text to speak": ({"tts_text": "hello"}, "bring the voice as a file"),
    "prompt extension": ({"use_prompt_extend": True}, "write the longer prompt yourself"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_named(mistake, command, run_cli, inputs):
    (inputs / "text.wav").write_text("this is not a sound")
    (inputs / "empty.wav").write_bytes(b"")
    write_wav(inputs / "dot.wav", np.zeros(1))
    changes, message = BAD[mistake]
    files = ("audio", "image", "ckpt_dir", "pose_video", "save_file")
    changes = {name: inputs / value if name in files else value for name, value in changes.items()}
    code, out, err = run_cli(*command(**changes))
    assert code == 2 and "Traceback" not in err
    error = json.loads(out)["error"]
    assert message in error and error.endswith("."), error
    assert not (inputs / "out.mp4").exists() and not list(inputs.glob("*.clips"))
