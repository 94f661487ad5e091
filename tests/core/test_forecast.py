"""What a run will take is told before it, by the same plans that it then makes."""

import json

import pytest
import torch

from wan_s2v_core import networks as run_networks
from wan_s2v_core.assets import CHECKPOINT, PORTRAIT, VOICE, embedded
from wan_s2v_core.config import MemoryLimits, SamplingConfig
from wan_s2v_core.forecast import JobFacts, forecast
from wan_s2v_core.geometry import ClipGeometry
from wan_s2v_core.memory.budget import Room
from wan_s2v_core.model import loading
from wan_s2v_core.networks import open_checkpoint
from wan_s2v_core.prepare import plan_loading

STAGES = ["voice", "text", "VAE encode", "sampling", "VAE decode"]


@pytest.fixture
def a_card(monkeypatch):
    """A card of so many GB, simulated."""

    def be(gigabytes: float) -> None:
        room = Room(round(gigabytes * 1e9), None)
        monkeypatch.setattr(run_networks, "room_on", lambda *_: room)

    return be


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*_):
        raise AssertionError("a forecast loads nothing")

    monkeypatch.setattr(loading, "fill", refuse)


def forecast_of(height: int, width: int, limits: MemoryLimits = MemoryLimits(), **facts):  # noqa: B008
    held = open_checkpoint(str(embedded(CHECKPOINT)), plan_loading("auto", torch.device("cpu")), limits=limits)
    job = JobFacts(height, width, 12.0, ClipGeometry(), SamplingConfig(guidance_scale=2.0), **facts)
    return forecast(held, job)


def test_in_main_memory_everything_fits(nothing_loads):
    found = forecast_of(256, 256)
    assert [stage.stage for stage in found] == STAGES
    assert all(stage.error is None and stage.peak_bytes is None for stage in found)


def test_stages_that_fit_and_one_that_may_not(a_card, nothing_loads):
    a_card(6)
    found = {stage.stage: stage for stage in forecast_of(704, 1280, has_pose=True)}
    for name in ("voice", "text", "sampling"):
        assert found[name].error is None and 0 < found[name].peak_bytes < found[name].room_bytes == 6 * 10**9
    assert "tightest form" in found["VAE decode"].error and "GB" in str(found["VAE decode"])


def test_larger_videos_take_more(a_card, nothing_loads):
    a_card(200)
    small, large = (
        {stage.stage: stage.peak_bytes for stage in forecast_of(*size)} for size in ((256, 256), (704, 1280))
    )
    assert small["sampling"] < large["sampling"] and small["VAE decode"] < large["VAE decode"]
    assert small["text"] == large["text"]


def test_a_plan_is_told_in_words_and_in_parts(a_card):
    a_card(20)
    limits = MemoryLimits(resident_blocks=2, slice_tokens=1024)
    sampling = {stage.stage: stage for stage in forecast_of(480, 832, limits)}["sampling"]
    assert (sampling.layers_stay, sampling.slice_tokens, sampling.tile_px) == (2, 1024, None)
    assert f"2 of {sampling.layers} layers stay, 1024 tokens at once" in str(sampling)


def test_a_dry_run_makes_nothing(run_cli, tmp_path, a_card, nothing_loads):
    target = tmp_path / "video.mp4"
    given = "--ckpt_dir", embedded(CHECKPOINT), "--audio", embedded(VOICE), "--image", embedded(PORTRAIT)
    given += "--save_file", target, "--dry_run"
    code, out, _ = run_cli("generate", *given, "--size", "256*256")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == STAGES
    a_card(3)
    code, out, _ = run_cli("generate", *given, "--json", "--size", "1280*704")
    told = json.loads(out)
    assert code == 1 and [stage["stage"] for stage in told] == STAGES and any(stage["error"] for stage in told)
    assert list(tmp_path.iterdir()) == []
