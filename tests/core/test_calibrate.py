"""The command split: a dense checkpoint is run on a short input and split by what its feed-forwards see."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from wan_s2v_core.acceleration.experts.split import load_split, split_feed_forward, split_layer
from wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from wan_s2v_core.calibrate import sample_tokens
from wan_s2v_core.conditioning.bundle import make_conditioning
from wan_s2v_core.conditioning.image import read_picture
from wan_s2v_core.config import ExpertRouting, SamplingConfig, VideoConfig
from wan_s2v_core.io.audio import read_recording
from wan_s2v_core.io.video import read_frames
from wan_s2v_core.model.checkpoint import DIT
from wan_s2v_core.pipeline import S2VPipeline, open_checkpoint
from wan_s2v_core.prepare import plan_loading

pytestmark = pytest.mark.usefixtures("pooled_vae")
INPUT = ["--audio", embedded(VOICE), "--image", embedded(PORTRAIT), "--device", "cpu"]
SMALL = [*INPUT, "--size", "64x64", "--infer_frames", "20", "--steps", "2"]
ROUNDING_LEVELS = 1
"""Of 255."""


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy, which may get files."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def video_of(run_cli, checkpoint, tmp_path):
    """Run `generate` for a second -> lossless frames."""

    def make(name: str, *flags: str):
        target = tmp_path / f"{name}.mkv"
        more = ["--size", "64*64", "--infer_frames", "20", "--sample_steps", "2", "--base_seed", "5", *flags]
        words = ["generate", "--ckpt_dir", checkpoint, *INPUT, "--audio_seconds", "1", *more, "--save_file", target]
        code, _, err = run_cli(*words)
        assert code == 0, err
        return read_frames(target, 16, 0, 99).int()

    return make


def test_a_checkpoint_is_split_by_what_it_does(run_cli, checkpoint, video_of, caplog):
    """The file is where runs look for it; with all experts it is the dense model, with fewer it is not."""
    whole = video_of("whole")
    code, out, err = run_cli("split", checkpoint, "--experts", "8", "--json", *SMALL)
    assert code == 0, err
    report, (file,) = json.loads(out), checkpoint.glob("experts*")
    assert report["path"] == str(file) and file.name == "experts_8.safetensors"
    assert report["experts"] == 8 and report["tokens"] == 2 * 2 * 96, "of two steps with two branches"
    assert [row["top_k"] for row in report["errors"]] == list(range(1, 9))
    for column in ("median", "worst"):
        errors = [row[column] for row in report["errors"]]
        assert errors == sorted(set(errors), reverse=True) and 0.5 < errors[0] < 1 and errors[-1] < 1e-5
    assert all(row["median"] <= row["worst"] for row in report["errors"])
    written = file.stat().st_mtime_ns
    every, half = (video_of(f"top{top_k}", "--split_experts", "8", "--moe_top_k", top_k) for top_k in ("8", "4"))
    assert (every - whole).abs().max() <= ROUNDING_LEVELS < (half - whole).abs().max()
    assert "is not there" not in caplog.text and file.stat().st_mtime_ns == written


def test_the_errors_are_shown_as_a_table(run_cli, checkpoint):
    code, out, err = run_cli("split", checkpoint, "--experts", "4", *SMALL)
    assert code == 0, err
    first, head, *rows = out.splitlines()
    assert "experts_4.safetensors: 4 experts, from 384 tokens" in first
    assert head.split()[:3] == ["top_k", "median", "worst"] and "6 layers" in head
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"] and rows[-1].split()[1:] == ["0.0%", "0.0%"]
    assert "step 2" in err


def test_the_command_that_a_run_names_works(run_cli, checkpoint, video_of, caplog):
    """A run without the file makes one without statistics and says how to make a better one."""
    video_of("first", "--split_experts", "8")
    (told,) = (record.getMessage() for record in caplog.records if "is not there" in record.getMessage())
    assert load_split(checkpoint / "experts_8.safetensors").top_k_errors() == []
    words = told.partition("python -m wan_s2v_core ")[2].split()
    given = iter((embedded(VOICE), embedded(PORTRAIT)))
    words = [next(given) if word == "FILE" else word for word in words]
    code, _, err = run_cli(*words, "--size", "64x64", "--infer_frames", "20", "--sample_steps", "1", "--device", "cpu")
    assert code == 0, err
    assert len(load_split(checkpoint / "experts_8.safetensors").top_k_errors()) == 8


def test_a_file_is_replaced_on_demand_alone(run_cli, checkpoint):
    file = checkpoint / "experts_8.safetensors"
    file.write_bytes(b"somebody's")
    code, out, _ = run_cli("split", checkpoint, "--json", *SMALL)
    assert code == 2 and "is there already" in json.loads(out)["error"] and "--overwrite" in json.loads(out)["error"]
    assert file.read_bytes() == b"somebody's"
    assert run_cli("split", checkpoint, "--overwrite", *SMALL)[0] == 0
    assert len(load_split(file).layers) == 6
    assert [path.name for path in checkpoint.glob("*experts*")] == [file.name]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--experts", "7"], "split_experts=7 does not divide the 256 neurons"),
        (["--experts", "0"], "split_experts=0 does not divide"),
        (["--steps", "0"], "steps=0"),
        (["--size", "big"], "--size big"),
        (["--infer_frames", "21"], "clip_frames=21"),
        (["--precision", "int3"], "precision='int3'"),
        (["--device", "foo"], "device 'foo'"),
        (["--audio", "no.wav"], "no.wav is not there"),
        (["--image", "no.png"], "no.png is not there"),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_mistakes_are_named(flags, wanted, run_cli, checkpoint):
    code, _, err = run_cli("split", checkpoint, *SMALL, *flags)
    assert code == 2 and wanted in err and "Traceback" not in err, err
    assert not list(checkpoint.glob("*experts*"))


def test_only_dense_folders_are_split(run_cli, checkpoint):
    """The embedded model has learned experts."""
    model = embedded("checkpoint")
    before = set(model.iterdir())
    code, _, err = run_cli("split", model, "--experts", "4", *SMALL)
    assert code == 2 and "has 8 experts already" in err and "only a dense one can be split" in err
    assert set(model.iterdir()) == before
    code, _, err = run_cli("split", checkpoint / "config.json", *SMALL)
    assert code == 2 and "is no folder" in err


def test_statistics_make_the_gate_better(tiny_checkpoint, fresh_seed):
    """On tokens of the same run that it was not made from. Random weights leave little to gain: no group of neurons
    belongs together, and the gate sees all 32 neurons of each."""
    pipeline = S2VPipeline(open_checkpoint(str(tiny_checkpoint), plan_loading("auto", torch.device("cpu"))))
    voice = pipeline.encode_voice(read_recording(embedded(VOICE), 0, 1.25))
    texts = pipeline.encode_prompts("a face", "")
    video = VideoConfig(max_area=64 * 64, clip_frames=20, clips=1)
    job = make_conditioning(read_picture(embedded(PORTRAIT)), voice, *texts, video)
    with torch.inference_mode():
        samples = sample_tokens(pipeline, job, SamplingConfig(steps=6, seed=fresh_seed), None)
        ratios = []
        with pipeline.network(DIT) as model:
            for block, tokens in zip(model.stack.blocks, samples, strict=True):
                tokens = tokens[torch.randperm(len(tokens))]
                others, dense = tokens[:384].float(), block.feed_forward
                errors = []
                for split in (split_layer(dense, 8, samples=tokens[384:]), split_layer(dense, 8)):
                    layer = split_feed_forward(dense, split, 0)
                    layer.routing = ExpertRouting(top_k=4)
                    errors.append((layer(others) - dense(others)).norm())
                ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.995, ratios
