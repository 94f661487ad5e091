"""benchmarks/errors.py on the embedded demo: what it compares, block by block, is what it says."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

from wan_s2v_core.config import AccelerationPlan

QUICK = ("--model", "demo", "--size", "256x256", "--latent_frames", "4", "--device", "cpu")


@pytest.fixture
def errors(monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])  # it adds the root, for when it is run as a file
    spec = importlib.util.spec_from_file_location("errors_benchmark", ROOT / "benchmarks" / "errors.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    allows = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield module
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allows


def test_ways_that_are_exact_have_no_error(errors, monkeypatch, tmp_path):
    """float32 again, and in the order of strips, which is undone before the stream is compared."""
    in_strips = AccelerationPlan("sdpa", sparse_keep=0.3, sparse_dense_blocks=100)
    ways = {"again": ("float32", errors.PLAIN), "in strips": ("float32", in_strips)}
    monkeypatch.setattr(errors, "WAYS", ways | {"on a card": ("float32", AccelerationPlan(attention="hopper"))})
    assert errors.main([*QUICK, "--every", "3", "--out", str(tmp_path)]) == 1, "the two to be compared are missing"
    _, again, strips, card = json.loads((tmp_path / "errors.json").read_text())["entries"]
    assert list(again["blocks"]) == ["0", "2", "5"], "every third, the first and the last"
    assert set(again["blocks"].values()) == {0.0} and again["output"] == 0
    assert all(error < 1e-4 for error in [*strips["blocks"].values(), strips["output"]]), strips
    assert "needs an NVIDIA card" in card["cannot"]


def test_each_way_has_its_error(errors, tmp_path, capsys):
    assert errors.main([*QUICK, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "errors.json").read_text())
    first, *ways = report["entries"]
    assert first["way"] == "float32" and [way["way"] for way in ways] == list(errors.WAYS)
    plain, ours, float8, sparse, int8 = (way["output"] for way in ways)
    assert 0.003 < plain < 0.1 and report["ratio"] == ours / plain < 1.5
    assert plain < int8 < float8 < sparse < 1
    assert all(len(way["blocks"]) == report["blocks"] == 6 for way in ways)
    assert ways[2]["blocks"]["0"] == ways[3]["blocks"]["0"] and ways[2]["blocks"]["1"] < ways[3]["blocks"]["1"], (
        "the first block is dense"
    )
    told = capsys.readouterr().out
    assert "256x256" in told and "says nothing about pictures" in told and f"{plain:.5f}" in told


@pytest.mark.parametrize(("blocks", "shown"), [(40, [0, 9, 19, 29, 39]), (6, [0, 2, 3, 5]), (1, [0])])
def test_blocks_that_are_shown(blocks, shown, errors):
    assert errors.shown_blocks(blocks) == shown


def test_too_far_off_is_a_failure(errors, monkeypatch, tmp_path):
    """Were our bfloat16 as far off as float8, the exit status would tell."""
    monkeypatch.setitem(errors.WAYS, errors.EXACT_BF16, ("float8", AccelerationPlan()))
    assert errors.main([*QUICK, "--latent_frames", "3", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "errors.json").read_text())["ratio"] > 1.5
