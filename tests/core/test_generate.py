"""The whole job on the tiny checkpoint: files in, a playable video out, and one clear message for what cannot work."""

import json
import shutil
import wave
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan_s2v_core import cli
from wan_s2v_core import render as rendering
from wan_s2v_core.cli import make_parser, sampling_of
from wan_s2v_core.config import NOISE_BOUNDARY, PRESETS, AccelerationPlan, SamplingConfig, VideoConfig, preset_lines
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io import weights
from wan_s2v_core.io.clip_store import ClipStore
from wan_s2v_core.io.video import VideoWriter, probe_video, read_frames
from wan_s2v_core.model.checkpoint import DIT, PART_LABELS
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.sampling.schedule import make_schedule

RATE = 22050


pytestmark = pytest.mark.usefixtures("pooled_vae")


def write_wav(path, samples, rate=RATE):
    """samples: N or N C, -1..1."""
    data = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if data.ndim == 1 else data.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A voice of 2.3 s in stereo, a picture, and a driving video of half that length."""
    folder = tmp_path_factory.mktemp("media")
    times = np.arange(int(2.3 * RATE)) / RATE
    voice = 0.4 * np.sin(2 * np.pi * 220 * times) * (np.sin(2 * np.pi * 3 * times) > 0)
    write_wav(folder / "voice.wav", np.stack([voice, 0.5 * voice], axis=1))
    noise = np.random.default_rng().integers(0, 255, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "face.png")
    with VideoWriter(folder / "pose.mp4", 64, 96, 25) as writer:
        writer.write(torch.randint(0, 255, (28, 96, 64, 3), dtype=torch.uint8))
    return folder


@pytest.fixture
def inputs(media, tmp_path):
    """Copies of them, in the folder where videos go."""
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
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


def test_a_voice_and_a_picture_become_a_video(command, run_cli, inputs, real_vae):
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


FLAGS = {  # flag -> what is given, and the settings that it changes
    "ckpt_dir": ("other", {"checkpoint": "other"}),
    "audio": ("other.wav", {"audio": "other.wav"}),
    "image": ("other.png", {"image": "other.png"}),
    "prompt": ("a face", {"prompt": "a face"}),
    "negative_prompt": ("a wall", {"negative_prompt": "a wall"}),
    "save_file": ("other.mkv", {"save_file": "other.mkv"}),
    "size": ("96*80", {"max_area": 96 * 80}),
    "pose_video": ("pose.mp4", {"pose_video": "pose.mp4"}),
    "num_clip": (3, {"clips": 3}),
    "infer_frames": (40, {"clip_frames": 40}),
    "preset": ("ComfyUI template", {"steps": 20, "shift": 8.0, "guidance_scale": 6.0}),
    "sample_steps": (7, {"steps": 7}),
    "sample_shift": (5, {"shift": 5.0}),
    "sample_solver": ("dpm++", {"solver": "dpm++"}),
    "sample_guide_scale": (2, {"guidance_scale": 2.0}),
    "base_seed": (4, {"seed": 4}),
    "start_from_ref": (True, {"starts_from_reference": True}),
    "offload_model": ("True", {"offload": "always"}),
    "convert_model_dtype": (True, {"precision": "bfloat16"}),
    "t5_cpu": (True, {"text_on_cpu": True}),
    "audio_guide_scale": (2, {"audio_guidance_scale": 2.0}),
    "spacing": ("karras", {"spacing": "karras"}),
    "timesteps": ("1000,500", {"timesteps": (1000.0, 500.0)}),
    "audio_start": (0.5, {"audio_start": 0.5}),
    "audio_seconds": (1, {"audio_seconds": 1.0}),
    "fps": (25, {"fps": 25.0}),
    "fit": ("pad", {"fit": "pad"}),
    "timing": ("reference", {"timing": "reference"}),
    "clip_plan": ("reference", {"clip_plan": "reference"}),
    "device": ("cpu:0", {"device": "cpu:0"}),
    "precision": ("float16", {"precision": "float16"}),
    "noise": ("reference", {"noise": "reference"}),
    "colour_match": (0.5, {"colour_match": 0.5}),
    "hear_past": (True, {"hears_past": True}),
    "no_metadata": (True, {"metadata": False}),
    "keep_clips": (True, {"keep_clips": True}),
    "cache_dir": ("kept", {"cache_dir": "kept"}),
    "moe_top_k": (2, {"top_k": 2}),
    "moe_expert_capacity": (64, {"expert_capacity": 64}),
    "moe_overflow": ("drop", {"overflow": "drop"}),
    "moe_gate_dropout": (0.1, {"gate_dropout": 0.1, "gate_dropout_seed": 3}),
    "noise_expert": ("low", {"noise_expert": "low", "noise_boundary": NOISE_BOUNDARY}),
    "noise_boundary": (0.8, {"noise_boundary": 0.8}),
    "attention": ("sdpa", {"attention": "sdpa"}),
    "sparse_keep": (0.5, {"sparse_keep": 0.5}),
    "sparse_by": ("distance", {"sparse_by": "distance"}),
    "sparse_dense_steps": (1, {"sparse_dense_steps": 1}),
    "sparse_dense_blocks": (0, {"sparse_dense_blocks": 0}),
    "fused": (False, {"fused": False}),
    "vae_precision": ("float32", {"vae": "float32"}),
    "vram_limit_gb": (8, {"vram_limit_gb": 8.0}),
    "resident_blocks": (2, {"resident_blocks": 2}),
    "slice_tokens": (256, {"slice_tokens": 256}),
    "t5_precision": ("float8-weights", {"text_precision": "float8-weights"}),
    "vae_tile": (384, {"tile_px": 384}),
    "weights": ("mapped", {"weights": "mapped"}),
}
BESIDE = {"preset": {"sample_steps": None}, "moe_overflow": {"moe_expert_capacity": 9}}
"""What the command has otherwise, with and without a flag that needs it."""
NO_SETTINGS = {"task", "dry_run", "json", "verbose", "run"}
"""What has one value, or decides what is told of a run."""


def flat(settings):
    """Name and value of all settings, those inside of others too."""
    for name, value in settings.items():
        yield from flat(value) if isinstance(value, dict) else [(name, value)]


@pytest.fixture
def settings_of(run_cli, command, monkeypatch):
    """All settings that `generate` hands to a run, by their names, which are unique."""

    def ask(**changes):
        told = []

        def keep(*given):
            told.extend(pair for part in given if hasattr(part, "to_dict") for pair in flat(part.to_dict()))
            return 0

        with monkeypatch.context() as patch:
            patch.setattr(cli, "make_video", keep)
            code, _, err = run_cli(*command(**changes))
        assert code == 0 and len(dict(told)) == len(told) > 50, err
        return dict(told)

    return ask


def test_every_flag_of_generate_is_looked_at():
    known = vars(make_parser().parse_args(["generate", "--ckpt_dir", "m", "--audio", "a.wav"])).keys()
    assert known == FLAGS.keys() | NO_SETTINGS | cli.NOT_YET.keys()


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_its_settings_and_no_others(flag, settings_of):
    value, expected = FLAGS[flag]
    beside = BESIDE.get(flag, {})
    before, after = settings_of(**beside), settings_of(**{**beside, flag: value})
    assert {name: after[name] for name in after if after[name] != before[name]} == expected


TOGETHER = {
    "as many as go together": dict(
        pose_video="pose.mp4", start_from_ref=True, sample_solver="dpm++", sample_shift=5, spacing="karras",
        sample_guide_scale=3, audio_guide_scale=2.0, audio_start=0.5, audio_seconds=1.0, fit="pad", fps=25,
        colour_match=1, noise="reference", hear_past=True, attention="auto8", sparse_keep=0.5, sparse_by="distance",
        sparse_dense_steps=1, sparse_dense_blocks=0, fused=False, vae_precision="float32", convert_model_dtype=True,
        t5_cpu=True, offload_model="True", task="s2v-14B", ulysses_size=1, cache_dir="kept", keep_clips=True,
        num_clip=3, prompt="a face", negative_prompt="a wall", weights="mapped",
    ),
    "others": dict(
        clip_plan="reference", timing="reference", sample_guide_scale=1, sample_solver="euler", attention="sdpa",
        precision="bfloat16", t5_precision="float8-weights", fit="reference", no_metadata=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", TOGETHER.values(), ids=TOGETHER)
def test_flags_reach_the_networks(flags, command, run_cli, inputs, settings_of, monkeypatch, real_vae):
    """What was asked for is what the pipeline runs with, and a video comes out."""
    flags = {name: inputs / value if name in ("pose_video", "cache_dir") else value for name, value in flags.items()}
    asked, used, generate = settings_of(**flags), {}, S2VPipeline.generate

    def watched(self, job, sampling, *given):
        networks = self.networks
        for part in (job.video, sampling, networks.loading.acceleration, networks.limits):
            used.update(part.to_dict())
        used["offload"], used["device"] = networks.offload, str(networks.device)
        used["precision"] = str(networks.loading.dtype(DIT)).removeprefix("torch.")
        assert (job.pose is None) == (asked["pose_video"] is None)
        return generate(self, job, sampling, *given)

    monkeypatch.setattr(S2VPipeline, "generate", watched)
    code, out, err = run_cli(*command(**flags))
    assert code == 0, err
    assert len(used) > 30 and used == {name: asked[name] for name in used}
    report = json.loads(out)
    whole_clips = flags.get("clip_plan") == "reference"
    assert report["frames"] == (2 * 20 - 3 if whole_clips else round(report["fps"] * flags["audio_seconds"]))
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


def render_small(folder, checkpoint, name="out.mp4", stop=None, seed=3, acceleration=None, **changes):
    """A video of 37 frames in 2 clips of what is in a folder -> the report, and the steps that were told."""
    files = (str(checkpoint), str(folder / "voice.wav"), str(folder / "face.png"), str(folder / name))
    video, sampling = VideoConfig(max_area=64 * 64, clip_frames=20), SamplingConfig(steps=2, seed=seed)
    seen = []

    def tell(clip, clips, step):
        seen.append((clip, step))
        if (clip, step) == stop:
            raise KeyboardInterrupt

    request = rendering.RenderRequest(*files, **changes)
    made = rendering.render(request, video, sampling, tell, acceleration=acceleration)
    return made, seen


@pytest.fixture
def make(inputs, tiny_checkpoint):
    """`render_small` of the inputs; keyword arguments change its request, and what it samples."""
    return partial(render_small, inputs, tiny_checkpoint)


def kept_pictures(folder):
    return torch.cat([read_frames(path, 16, 0, 99) for path in sorted(folder.glob("*.mkv"))])


@pytest.fixture(scope="module")
def stopped(media, tiny_checkpoint):
    """The clips of a run that was stopped in its second clip."""
    with pytest.raises(KeyboardInterrupt):
        render_small(media, tiny_checkpoint, stop=(2, 1))
    return (media / "out.mp4.clips").rename(media.with_name(f"{media.name} stopped"))


@pytest.fixture
def cut_short(stopped, inputs):
    """A copy of them, where that run left them."""
    return Path(shutil.copytree(stopped, inputs / "out.mp4.clips"))


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
