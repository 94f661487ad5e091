"""A dense checkpoint is run on a short input, split by what its feed-forwards see, and written as one with experts."""

import json
from pathlib import Path

import pytest
import torch

from wan_s2v_core.acceleration.quantization import LINEARS, swap_linears
from wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from wan_s2v_core.conditioning.bundle import make_conditioning
from wan_s2v_core.conditioning.image import read_picture
from wan_s2v_core.config import ExpertRouting, SamplingConfig, VideoConfig
from wan_s2v_core.io.audio import read_recording
from wan_s2v_core.io.video import read_frames
from wan_s2v_core.model.checkpoint import DIT
from wan_s2v_core.model.loading import files_of, find_part, load_transformer
from wan_s2v_core.model.official import OFFICIAL_FILES
from wan_s2v_core.networks import open_checkpoint
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading
from wan_s2v_core.research import __main__ as research
from wan_s2v_core.research import calibrate
from wan_s2v_core.research.calibrate import sample_tokens
from wan_s2v_core.research.split import plan_split, split_feed_forward, split_layer

pytestmark = pytest.mark.usefixtures("pooled_vae")
INPUT = ["--audio", embedded(VOICE), "--image", embedded(PORTRAIT), "--device", "cpu"]
SMALL = [*INPUT, "--size", "64x64", "--infer_frames", "20", "--steps", "2"]
ROUNDING_LEVELS = 1
"""Of 255."""


@pytest.fixture
def checkpoint(tiny_checkpoint) -> Path:
    return Path(tiny_checkpoint)


@pytest.fixture
def run_research(run_cli):
    """Run the command line of what is research -> exit code, stdout, stderr."""
    return lambda *words: run_cli(*words, command=research.run)


@pytest.fixture
def make_split(checkpoint):
    """The dense model split into so many experts, without statistics."""
    return lambda experts: plan_split(load_transformer(checkpoint, torch.float32), experts)


@pytest.fixture
def video_of(run_cli, checkpoint, tmp_path):
    """Run `generate` for a second -> lossless frames."""

    def make(name: str, *flags: str, of: Path = checkpoint):
        target = tmp_path / f"{name}.mkv"
        more = ["--size", "64*64", "--infer_frames", "20", "--sample_steps", "2", "--base_seed", "5", *flags]
        words = ["generate", "--ckpt_dir", of, *INPUT, "--audio_seconds", "1", *more, "--save_file", target]
        code, _, err = run_cli(*words)
        assert code == 0, err
        return read_frames(target, 16, 0, 99).int()

    return make


def test_a_split_checkpoint_loads_as_one_with_experts(run_research, checkpoint, video_of, caplog, tmp_path):
    """With all experts it is the dense model, with fewer it is not. The other networks take no more disk."""
    whole, out = video_of("whole"), tmp_path / "made" / "split"
    code, told, err = run_research("split", checkpoint, out, "--experts", "8", "--json", *SMALL)
    assert code == 0, err
    report = json.loads(told)
    assert report["path"] == str(out) and [path.name for path in out.parent.iterdir()] == ["split"]
    assert report["experts"] == 8 and report["tokens"] == 2 * 2 * 96, "of two steps with two branches"
    assert [row["top_k"] for row in report["errors"]] == list(range(1, 9))
    for column in ("median", "worst"):
        errors = [row[column] for row in report["errors"]]
        assert errors == sorted(set(errors), reverse=True) and 0.5 < errors[0] < 1 and errors[-1] < 1e-5
    assert all(row["median"] <= row["worst"] for row in report["errors"])
    others = [file.relative_to(checkpoint) for kind in OFFICIAL_FILES for file in files_of(checkpoint, kind)]
    assert others and all((out / name).samefile(checkpoint / name) for name in others)
    caplog.clear()
    every, spilled = (video_of(name, "--moe_expert_capacity", n, of=out) for name, n in (("all", "9999"), ("50", "50")))
    assert (every - whole).abs().max() <= ROUNDING_LEVELS >= (spilled - whole).abs().max()
    assert "expert   tokens" in caplog.text and "100.0%" in caplog.text
    half = video_of("half", "--moe_top_k", "4", of=out)
    assert (half - whole).abs().max() > ROUNDING_LEVELS


def test_shards_hold_what_fits_and_all_of_it(checkpoint, make_split, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SHARD_BYTES", 800_000)
    calibrate.write_checkpoint(checkpoint, make_split(4), tmp_path / "split")
    shards = list((tmp_path / "split").glob("*.safetensors"))
    assert len(shards) > 2 and sum(shard.stat().st_size > 850_000 for shard in shards) == 0
    part = find_part(tmp_path / "split", DIT)
    assert not (report := part.compare(part.build())).missing and not report.unexpected and not report.wrong_shape
    assert {entry.dtype for name, entry in part.weights.entries.items() if ".experts." in name} == {torch.bfloat16}


@pytest.mark.parametrize("linears", [None, *LINEARS])
def test_a_split_is_as_exact_as_the_dense_model(linears, checkpoint, make_split, make_inputs, tiny_maker, tmp_path):
    """Also with 8-bit weights, which each expert has scales of its own for."""
    calibrate.write_checkpoint(checkpoint, make_split(4), tmp_path / "split")
    inputs, noise = make_inputs(tiny_maker.DIT_CONFIG)
    prepare = linears and (lambda network: swap_linears(network, linears))
    with torch.inference_mode():
        exact, dense, split = (
            model(noise, 500.0, model.condition(inputs))
            for model in (
                load_transformer(checkpoint, torch.float32),
                load_transformer(checkpoint, torch.float32, prepare=prepare),
                load_transformer(tmp_path / "split", torch.float32, prepare=prepare),
            )
        )
    error, own = ((found - exact).norm() / exact.norm() for found in (dense, split))
    assert own < 1e-5 if linears is None else own < 1.2 * error


def test_the_errors_are_shown_as_a_table(run_research, checkpoint, tmp_path):
    code, out, err = run_research("split", checkpoint, tmp_path / "split", "--experts", "4", *SMALL)
    assert code == 0, err
    first, head, *rows = out.splitlines()
    assert "split: 4 experts, from 384 tokens" in first
    assert head.split()[:3] == ["top_k", "median", "worst"] and "6 layers" in head
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"] and rows[-1].split()[1:] == ["0.0%", "0.0%"]
    assert "step 2" in err


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--experts", "7"], "experts=7 does not divide the 256 neurons"),
        (["--experts", "0"], "experts=0 does not divide"),
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
def test_mistakes_are_named(flags, wanted, run_research, checkpoint, tmp_path):
    code, _, err = run_research("split", checkpoint, tmp_path / "split", *SMALL, *flags)
    assert code == 2 and wanted in err and "Traceback" not in err, err
    assert not (tmp_path / "split").exists()


def test_only_dense_folders_are_split_into_new_ones(run_research, checkpoint, tmp_path):
    """The embedded model has learned experts."""
    code, _, err = run_research("split", embedded("checkpoint"), tmp_path / "split", "--experts", "4", *SMALL)
    assert code == 2 and "has 8 experts already" in err and "dense one" in err
    code, _, err = run_research("split", checkpoint / "config.json", tmp_path / "split", *SMALL)
    assert code == 2 and "is no folder" in err
    code, out, _ = run_research("split", checkpoint, checkpoint, "--json", *SMALL)
    assert code == 2 and "is there already" in json.loads(out)["error"]


def test_a_failed_write_leaves_nothing(checkpoint, make_split, tmp_path, monkeypatch):
    def fails(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrate, "link_or_copy", fails)
    with pytest.raises(OSError):
        calibrate.write_checkpoint(checkpoint, make_split(2), tmp_path / "out" / "split")
    assert not list((tmp_path / "out").iterdir())


def test_files_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def fails(*_) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(calibrate.os, "link", fails)
    (tmp_path / "one").write_bytes(b"weights")
    calibrate.link_or_copy(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"weights" and not (tmp_path / "two").samefile(tmp_path / "one")


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
                for split in (split_layer(dense, 8, tokens[384:]), split_layer(dense, 8)):
                    layer = split_feed_forward(dense, split)
                    layer.routing = ExpertRouting(top_k=4)
                    errors.append((layer(others) - dense(others)).norm())
                ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.995, ratios
