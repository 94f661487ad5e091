"""Experts in a whole run: dense checkpoints and those with experts, through the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.io.video import read_frames
from wan_s2v_core.model.checkpoint import dit_name, official_dit_config
from wan_s2v_core.model.dit import S2VTransformer

pytestmark = pytest.mark.usefixtures("pooled_vae")
ROUNDING_LEVELS = 1
"""Of 255."""


@pytest.fixture
def video_of(run_cli, tmp_path):
    """Run `generate` on a checkpoint with a second of the embedded voice -> lossless frames and what was told."""

    def make(checkpoint, name="out", **flags):
        given = {
            "ckpt_dir": checkpoint, "audio": embedded(VOICE), "image": embedded(PORTRAIT),
            "audio_seconds": 1.2, "size": "64*64",
            "infer_frames": 20, "sample_steps": 2, "sample_guide_scale": 1, "base_seed": 5, "device": "cpu",
            "save_file": tmp_path / f"{name}.mkv",
        } | flags  # fmt: skip
        words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
        code, out, err = run_cli("generate", "--json", *words)
        assert code == 0, err
        return read_frames(json.loads(out)["path"], 16, 0, 99)

    return make


@pytest.fixture(scope="session")
def routed_checkpoint(tiny_maker, tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with eight learned experts, of which a token sees three."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("routed") / "checkpoint"))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    config = replace(tiny_maker.DIT_CONFIG, num_experts=8, top_k=3, feed_forward_width=32)
    model = S2VTransformer(config)
    fill_random(model)
    tiny_maker.write_shards(folder, tiny_maker.bfloat16_weights(model, dit_name))
    tiny_maker.write_json(folder / "config.json", official_dit_config(config))
    return folder


def test_a_dense_model_says_that_experts_do_not_apply(video_of, tiny_checkpoint, caplog):
    """The flags of articles run as they stand and change nothing."""
    plain = video_of(tiny_checkpoint, "plain")
    assert not caplog.records
    told = video_of(tiny_checkpoint, "told", moe_expert_capacity=256, moe_gate_dropout=0.1, moe_top_k=4)
    assert torch.equal(plain, told)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith("Not applicable: this checkpoint is one dense DiT") and "research split" in warning


def test_a_native_model_routes_and_reports(video_of, routed_checkpoint, caplog):
    plain = video_of(routed_checkpoint, "plain")
    assert "expert   tokens" in caplog.text
    spilled = video_of(routed_checkpoint, "spilled", moe_expert_capacity=64)
    assert (spilled.int() - plain.int()).abs().max() <= ROUNDING_LEVELS
    for name, flags in {
        "dropped": {"moe_expert_capacity": 20, "moe_overflow": "drop"},
        "hidden": {"moe_gate_dropout": 0.5},
        "fewer": {"moe_top_k": 1},
    }.items():
        assert not torch.equal(video_of(routed_checkpoint, name, **flags), plain), name


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--moe_top_k", "0"], "top_k=0"),
        (["--moe_expert_capacity", "0"], "expert_capacity=0"),
        (["--moe_overflow", "wait"], "overflow='wait'"),
        (["--moe_overflow", "drop"], "without expert_capacity drops nothing"),
        (["--moe_gate_dropout", "1.5"], "gate_dropout=1.5"),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_settings_that_cannot_work_are_named(flags, wanted, run_cli, tiny_checkpoint, tmp_path):
    words = ["--ckpt_dir", tiny_checkpoint, "--audio", embedded(VOICE), "--save_file", tmp_path / "out.mp4"]
    code, _, err = run_cli("generate", *words, *flags)
    assert code == 2 and wanted in err, err
    assert not (tmp_path / "out.mp4").exists()
