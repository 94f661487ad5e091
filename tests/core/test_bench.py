"""`bench`: its model of the work, its cases through the command line, comparisons, predictions, growth and failures."""

import builtins
import json
import math
import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from pooled_vae import pool
from torch.utils.flop_counter import FlopCounterMode

from wan_s2v_core.acceleration.vae.network import speed_up
from wan_s2v_core.bench import article, run
from wan_s2v_core.bench import ceilings as ceiling_module
from wan_s2v_core.bench import measure as measuring
from wan_s2v_core.bench.article import Run, parts_of
from wan_s2v_core.bench.cases import CASE_KEYS, BenchRequest, Case, NeedsOf, Result, article_flop, list_cases
from wan_s2v_core.bench.ceilings import Ceilings, Rates, allowed_seconds
from wan_s2v_core.bench.comparison import compare
from wan_s2v_core.bench.engine import (
    AccelerationPlan,
    ModelSource,
    loading_of,
    make_inputs,
    random_network,
    with_blocks,
)
from wan_s2v_core.bench.engine import weight_bytes as predicted_bytes
from wan_s2v_core.bench.flops import ForwardShape, forward_flop, masked_flop, shape_of_tokens
from wan_s2v_core.bench.growth import fit_growth
from wan_s2v_core.bench.measure import kind_of_kernel, read_commit
from wan_s2v_core.bench.other_networks import products_dtype, type_name
from wan_s2v_core.bench.prediction import OtherCard, parse_other_card, predict
from wan_s2v_core.bench.random_weights import fill_random, random_tensor
from wan_s2v_core.bench.session import Session
from wan_s2v_core.bench.stages import Stage
from wan_s2v_core.config import S2VModelConfig
from wan_s2v_core.errors import ConfigError
from wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER
from wan_s2v_core.model.dit import S2VTransformer, run_plainly
from wan_s2v_core.model.loading import load
from wan_s2v_core.model.vae import VideoVAE

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = ("--sizes", "64x64", "--clip_frames", "20", "--runs", "2", "--device", "cpu")
SPLIT = {"attention", "linears", "other", "transfers"}


# --- the model of the work ---------------------------------------------------------------------------------------

WIDE = S2VModelConfig(blocks=2, injected_blocks=(0,))
PLAIN_MOTION = replace(TINY, modulates_audio=False, packs_motion=False, injected_blocks=(1, -1, 0))
MIDDLE, LARGE, WITHOUT_MOTION = ForwardShape(832, 480), ForwardShape(1280, 704), ForwardShape(208, 112, 5, False)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (WIDE, MIDDLE),
        *((TINY, shape) for shape in (MIDDLE, LARGE, WITHOUT_MOTION)),
        *((PLAIN_MOTION, shape) for shape in (MIDDLE, WITHOUT_MOTION)),
    ],
)
def test_the_work_is_what_torch_counts(config, shape, monkeypatch):
    model = meta_model(config)
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    inputs, noise = make_inputs(config, shape, META)
    with torch.inference_mode():
        condition = model.condition(inputs)
        with FlopCounterMode(display=False) as counter:
            model(noise, 500.0, condition)
    flop = forward_flop(config, shape)
    assert condition.rope.shape[0] == shape.tokens(config.packs_motion)
    assert condition.frame_index.shape[0] == shape.noisy_tokens()
    # The injectors may compute what they mask, or leave it out.
    assert counter.get_total_flops() in (flop.total, flop.total + masked_flop(config, shape))


def meta_model(config: S2VModelConfig) -> S2VTransformer:
    with torch.device("meta"):
        return S2VTransformer(config)


def test_the_work_of_experts_is_what_torch_counts(make_model, make_inputs):
    config = replace(TINY, num_experts=4, top_k=2)
    inputs, noise = make_inputs(config, frames=5, h=8, w=12)
    model, shape = make_model(config), ForwardShape(96, 64, 5)
    with torch.inference_mode():
        condition = model.condition(inputs)
        with FlopCounterMode(display=False) as counter:
            model(noise, 500.0, condition)
    flop = forward_flop(config, shape)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.addmm"] + counts["aten.mm"] == flop.linears, "attention on a CPU is not known to every torch"


def test_the_released_model_at_real_size():
    """Of the figures that the ceilings were measured beside: 7.1 and 1.9 PFLOP, 79,200 and 35,074 tokens."""
    large, small = (forward_flop(S2VModelConfig(), ForwardShape(*size)) for size in ((1280, 704), (832, 480)))
    assert ForwardShape(1280, 704).tokens() == 79_200 and ForwardShape(832, 480).tokens() == 35_074
    assert large.attention == pytest.approx(5.14e15, rel=0.001) and large.linears == pytest.approx(1.98e15, rel=0.005)
    assert small.attention == pytest.approx(1.01e15, rel=0.005) and small.linears == pytest.approx(0.88e15, rel=0.005)


def test_leaving_attention_out_changes_attention_alone():
    whole, half = (forward_flop(TINY, ForwardShape(256, 256), kept) for kept in (1.0, 0.5))
    assert half.attention == whole.attention / 2 and half.dense_attention == whole.attention
    assert half.total == whole.total - whole.attention / 2
    plan = AccelerationPlan(sparse_keep=0.5, sparse_dense_blocks=1)
    assert plan.kept(4) == pytest.approx((1 + 3 * 0.5) / 4) and plan.kept(1) == 1


@pytest.mark.parametrize("tokens", [400, 5_000, 39_000, 300_000])
def test_shapes_have_about_the_tokens_asked_for(tokens):
    assert shape_of_tokens(tokens).tokens() == pytest.approx(tokens, rel=0.1)


def test_the_article_is_so_many_forwards():
    case = Case("article", "article", 832, 480, 240, "bfloat16", AccelerationPlan(), steps=50, guidance=4.5)
    first, later = (forward_flop(TINY, case.shape(has_motion)).total for has_motion in (False, True))
    assert article_flop(TINY, case) == pytest.approx(100 * first + 200 * later)
    assert article_flop(TINY, replace(case, guidance=1.0)) == pytest.approx(50 * first + 100 * later)
    sparse = replace(case, plan=AccelerationPlan(sparse_keep=0.5, sparse_dense_steps=50))
    assert article_flop(TINY, sparse) == article_flop(TINY, case), "steps that leave nothing out"


# --- through the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, folder):
    """One run of every kind of case, through the command line -> code, entries."""
    from wan_s2v_core.cli import main

    words = ["bench", "--cases", "all", *SMALL, "--ckpt_dir", str(tiny_checkpoint), "--out", str(folder)]
    words += ["--frames", "60", "--steps", "4", "--growth_tokens", "150", "900", "--commit", "abc1234"]
    code = main(words)
    return code, json.loads((folder / "bench.json").read_text())


@pytest.fixture
def replayed(measured, monkeypatch):
    """Cases take what they took in `measured`: for what is done with results."""
    results = {
        entry["case"]: Result(**{part.name: entry[part.name] for part in fields(Result)}) for entry in measured[1]
    }
    for group in run.MEASURE:
        monkeypatch.setitem(run.MEASURE, group, lambda session, case: results[case.name])
    monkeypatch.setattr(run, "draw", lambda entries, folder: [])


def by_name(entries):
    return {entry["case"]: entry for entry in entries}


def test_every_case_has_every_key(measured):
    code, entries = measured
    assert code == 0
    for entry in entries:
        assert tuple(entry) == (*CASE_KEYS, "estimated", "error", "details"), entry["case"]
        assert entry["error"] is None and entry["seconds_total"] > 0
        assert set(entry["split"]) == SPLIT
        assert sum(entry["split"].values()) <= entry["seconds_total"] * 1.001
        assert entry["commit"] == "abc1234" and entry["torch"] == torch.__version__ and "CPU" in entry["gpu"]
        assert entry["peak_bytes"] is None or entry["peak_bytes"] > 1e7
    names = {"forward", "article", "growth", "vae encode", "vae decode", "text encoder", "audio encoder"}
    names |= {f"load {part}" for part in ("dit", "text encoder", "audio encoder", "vae")}
    assert set(by_name(entries)) == names
    assert sum(entry["case"] == "growth" for entry in entries) == 9


def test_a_forward_is_held_against_the_ceilings(measured):
    forward = by_name(measured[1])["forward"]
    details, seconds = forward["details"], forward["seconds_total"]
    assert (forward["width"], forward["height"], forward["frames"]) == (64, 64, 20)
    assert details["tokens"] == ForwardShape(64, 64, 5).tokens() and len(details["seconds"]) == 2
    assert forward["tflops"] == pytest.approx(details["flop"]["total"] / seconds / 1e12)
    assert forward["ceiling_share"] == pytest.approx(details["allowed_seconds"]["total"] / seconds)
    assert details["first_call_seconds"] > 0 and details["kernels"]
    assert forward["split"]["linears"] > 0 and forward["split"]["attention"] > 0
    assert forward["attention_backend"] == "sdpa" and by_name(measured[1])["vae decode"]["attention_backend"] is None


def test_the_article_is_put_together_from_its_parts(measured):
    entry = by_name(measured[1])["article"]
    details = entry["details"]
    assert entry["estimated"] and (entry["frames"], entry["steps"], entry["guidance"]) == (60, 4, 4.5)
    assert details["clips"] == 3 and details["forwards"] == 24 and details["measured_forwards"] == 8
    total = sum(part["times"] * (part["seconds"] + part["moving_seconds"]) for part in details["parts"])
    assert entry["seconds_total"] == pytest.approx(total)
    assert entry["seconds_per_forward"] == pytest.approx(details["dit_seconds"] / 24)
    counts = [(part["name"], part["times"]) for part in details["parts"]]
    assert ("dit", 1) in counts and ("dit", 2) in counts and ("vae encode, 73 frames", 2) in counts
    assert sum(entry["split"].values()) == pytest.approx(entry["seconds_total"])


def test_the_report_says_it_all(measured, folder):
    text = (folder / "bench.md").read_text()
    for title in ("Cases", "Against the ceilings", "Ceilings, measured", "Growth with the tokens", "First use"):
        assert f"## {title}" in text, title
    assert "(estimated)" in text and "**Estimated**" in text and "--growth_tokens 150 900" in text


def test_without_matplotlib_one_line_says_what_to_install(measured, tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    run.Output(tmp_path).finish(measured[1], None, [])
    assert [record.message for record in caplog.records if "matplotlib" in record.message] and (
        sorted(file.name for file in tmp_path.iterdir()) == ["bench.md"]
    )


def test_the_plot_is_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    run.Output(tmp_path).finish(measured[1], None, [])
    assert (tmp_path / "bench.png").stat().st_size > 10_000 and (tmp_path / "bench.svg").read_text().count("<path") > 50


def test_the_demo_runs_and_json_is_one_value(run_cli, tmp_path):
    words = ("bench", "--cases", "load", "--model", "demo", "--json", "--out", tmp_path, "--device", "cpu")
    code, out, err = run_cli(*words, "--precision", "bfloat16")
    entries = json.loads(out)
    assert code == 0, err
    assert {entry["weights"] for entry in entries} == {"embedded demo"}
    assert entries == json.loads((tmp_path / "bench.json").read_text())
    assert [entry["precision"] for entry in entries] == ["bfloat16", "bfloat16", "float32", "float32"], "as they are"


def test_in_full_nothing_is_estimated(run_cli, tiny_checkpoint, tmp_path, monkeypatch):
    pool(monkeypatch)
    words = (
        "bench",
        "--cases",
        "article",
        *SMALL,
        "--ckpt_dir",
        tiny_checkpoint,
        "--out",
        tmp_path,
        "--json",
        "--full",
    )
    code, out, _ = run_cli(*words, "--frames", "60", "--steps", "2", "--guidance", "1", "--offload")
    (entry,) = json.loads(out)
    assert code == 0 and not entry["estimated"]
    assert entry["details"]["forwards"] == entry["details"]["measured_forwards"] == 6
    assert [part["times"] for part in entry["details"]["parts"]] == [1] * len(entry["details"]["parts"])
    assert entry["seconds_total"] >= entry["details"]["dit_seconds"]


# --- what is estimated -------------------------------------------------------------------------------------------


def test_an_estimate_adds_steps_and_clips():
    """From 3 of 10 steps in 2 of 4 clips, with times that are known."""
    stages = [Stage("text_encoder", 1.0), Stage(DIT, 7.0, 0.5, 0.25), Stage("vae decode", 3.0)]
    stages += [Stage("vae encode", 2.0), Stage(DIT, 9.0), Stage("vae decode", 4.0)]
    steps = [(0, 0.0), (0, 2.0), (0, 4.0), (1, 10.0), (1, 13.0), (1, 16.0)]
    case = Case("article", "article", 64, 64, 320, "float32", AccelerationPlan(), steps=10)
    parts = parts_of(Run(stages, 3, steps), case, steps=3, dense=0)
    assert [(part.seconds, part.times) for part in parts] == [
        (1.0, 1), (7.0 + 7 * 2.0, 1), (3.0, 1), (2.0, 3), (9.0 + 7 * 3.0, 3), (4.0, 3)
    ]  # fmt: skip
    assert parts[1].moving_seconds == 0.75


def test_an_estimate_takes_later_steps_where_the_first_ones_leave_nothing_out():
    stages = [Stage(DIT, 20.0)]
    steps = [(0, 0.0), (0, 8.0), (0, 16.0), (0, 18.0)]  # two dense steps, then faster ones
    case = Case("article", "article", 64, 64, 80, "float32", AccelerationPlan(), steps=10)
    (part,) = parts_of(Run(stages, 1, [*steps[:1], (0, 8.0), (0, 10.0), (0, 12.0)]), case, steps=4, dense=2)
    assert part.seconds == 20.0 + 6 * 2.0
    (part,) = parts_of(Run(stages, 1, steps), case, steps=4, dense=3)
    assert part.seconds == 20.0 + 6 * 2.0


def test_too_few_steps_for_an_estimate_are_told(tiny_checkpoint, monkeypatch):
    request = BenchRequest(source=ModelSource(checkpoint=str(tiny_checkpoint)), device="cpu")
    session = SimpleNamespace(request=request)
    plan = AccelerationPlan(sparse_keep=0.5, sparse_dense_steps=4)
    case = Case("article", "article", 64, 64, 240, "float32", plan, steps=50)
    with pytest.raises(ConfigError, match="Use 5 or more, or --full"):
        article.measure_article(session, case)


def test_a_pipeline_gets_a_model_with_nothing_attached(tiny_checkpoint):
    """It attaches the plan itself: twice, tokens would be put into the order of strips twice."""
    request = BenchRequest(source=ModelSource(checkpoint=str(tiny_checkpoint)), device="cpu")
    session = Session(request, torch.device("cpu"))
    case = Case("article", "article", 64, 64, 80, "float32", AccelerationPlan(sparse_keep=0.5))
    model = session.dit(case)
    assert model.run_stack is not run_plainly
    with article.resident_networks(session, case) as networks:
        assert networks.loaded[DIT] is model and model.run_stack is run_plainly
    assert session.dit(case) is model and model.run_stack is not run_plainly, "the next case measures it as planned"
    session.drop()
    assert model.run_stack is run_plainly


# --- against an earlier run --------------------------------------------------------------------------------------


def changed(entries, factor, **facts):
    return [entry | {"seconds_total": entry["seconds_total"] * factor} | facts for entry in entries]


def steady(entries, spread=0.0):
    return [entry | {"details": entry["details"] | {"spread": spread}} for entry in entries]


@pytest.mark.parametrize("factor, slower", [(0.5, 0), (1.0, 0), (1.02, 0), (1.05, 19), (1.09, 19)])
def test_slower_is_what_exceeds_tolerance_and_spread(measured, factor, slower):
    entries = steady(measured[1])
    report = compare(entries, changed(entries, factor))
    assert len(report.regressions) == (slower and len(entries))
    assert all(found.ratio == pytest.approx(factor) for found in report.comparisons)
    noisy = steady(entries, 0.02)
    assert len(compare(noisy, changed(noisy, factor)).regressions) == (factor > 1.07) * len(noisy)


def test_against_a_file_and_the_exit_code(run_cli, tiny_checkpoint, replayed, tmp_path):
    """The same small run against one that claims to have been far faster, far slower, or on another card."""
    words = ("bench", "--cases", "load", *SMALL, "--ckpt_dir", tiny_checkpoint, "--out", tmp_path / "now")
    words += ("--commit", "x")
    code, _, _ = run_cli(*words)
    assert code == 0
    entries = json.loads((tmp_path / "now" / "bench.json").read_text())
    before = tmp_path / "before.json"
    for factor, facts, expected, told in (
        (1e-3, {}, 1, "SLOWER"),
        (1e3, {}, 0, "faster"),
        (1e-3, {"gpu": "another card"}, 0, "Different GPUs"),
    ):
        before.write_text(json.dumps(changed(steady(entries), factor, **facts)))
        code, out, _ = run_cli(*words, "--against", before)
        assert (code, told in out) == (expected, True), factor
    assert "another GPU" in out and "| SLOWER |" not in out


def test_cases_of_one_run_alone_are_named(measured):
    entries = measured[1]
    report = compare(entries[1:], entries[:-1])
    assert len(report.only_before) == len(report.only_after) == 1
    assert report.only_after[0].startswith("forward") and "Only now: forward" in "\n".join(report.lines())


@pytest.mark.parametrize("content", ["", "{}", '[{"case": "forward"}]', "[1]", "\x00"])
def test_a_file_of_something_else_is_told(run_cli, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    words = (
        "bench",
        "--model",
        "demo",
        "--device",
        "cpu",
        "--against",
        tmp_path / "other.json",
        "--out",
        tmp_path / "o",
    )
    code, _, err = run_cli(*words)
    assert code == 2 and "holds no results of bench" in err and not (tmp_path / "o").exists()


# --- what other cards would take ---------------------------------------------------------------------------------

HERE = {"products": "bf16", "square": 800.0, "up": 800.0, "down": 800.0, "outside": 800.0, "attention": 600.0,
        "attention_kernel": "x", "attention_bits": 16, "device_gbs": 4000.0, "to_device_gbs": 50.0}  # fmt: skip


def forward_entry(**details):
    entry = dict.fromkeys(CASE_KEYS) | {"case": "forward", "precision": "bfloat16", "gpu": "here", "width": 64}
    entry |= {"height": 64, "ceiling_share": 0.9, "seconds_total": 10.0, "attention_backend": "sdpa"}
    entry |= {"split": {"attention": 6.0, "linears": 3.0, "other": 0.5, "transfers": 0.1}, "torch": "2", "commit": "c"}
    return entry | {"details": {"tokens": 1000, "ceilings": HERE | details}}


def test_predictions_scale_each_part_by_the_other_cards_ceilings():
    card = parse_other_card("bf16_tflops=400,attention_tflops=200,bandwidth_gbs=1000,to_device_gbs=25")
    (found,) = predict([forward_entry()], card)
    assert found.seconds == pytest.approx(6 * 3 + 3 * 2 + 0.5 * 4 + 0.1 * 2 + 0.4 * 4)
    assert found.to_dict()["prediction"] is True
    (found,) = predict([forward_entry()], parse_other_card("bf16_tflops=400,attention_tflops=300"))
    assert found.seconds == pytest.approx(2 * 9.9 + 0.1), "all parts but copies take twice as long"


def test_predictions_need_the_rates_of_the_case():
    (found,) = predict([forward_entry(products="fp8")], parse_other_card("bf16_tflops=400"))
    assert found.seconds is None and found.missing == "fp8_tflops, attention_tflops"
    assert predict([forward_entry() | {"ceiling_share": None}], parse_other_card("bf16_tflops=400")) == []


def test_predictions_from_a_run_on_the_other_card(tmp_path):
    there = [forward_entry(attention=300.0, square=400.0, up=400.0, down=400.0, device_gbs=2000.0) | {"gpu": "there"}]
    (tmp_path / "there.json").write_text(json.dumps(there))
    card = parse_other_card(str(tmp_path / "there.json"))
    (found,) = predict([forward_entry()], card)
    assert (found.card, found.seconds) == ("there", pytest.approx(2 * 9.9 + 0.1))
    assert isinstance(card, OtherCard)


@pytest.mark.parametrize("text", ["peak=3", "bf16_tflops=fast", "bf16_tflops=0", "bf16_tflops=nan"])
def test_rates_that_are_none_are_told(run_cli, text, tmp_path):
    code, _, err = run_cli("bench", "--model", "demo", "--device", "cpu", "--predict", text, "--out", tmp_path)
    assert code == 2 and "--predict" in err


def test_predictions_are_marked(run_cli, tiny_checkpoint, replayed, tmp_path):
    words = ("bench", "--cases", "forward", *SMALL, "--ckpt_dir", tiny_checkpoint, "--out", tmp_path)
    code, out, _ = run_cli(*words, "--predict", "fp32_tflops=1,attention_tflops=1")
    assert code == 0 and "(prediction)" in out and "Predictions, not measurements" in out
    assert all(found["prediction"] for found in json.loads((tmp_path / "predictions.json").read_text()))


# --- growth ------------------------------------------------------------------------------------------------------


def test_the_fit_recovers_the_model_that_made_the_times():
    rng = random.Random()
    fixed, linear, attention = rng.uniform(0.001, 0.02), rng.uniform(300, 1500), rng.uniform(200, 900)
    config = with_blocks(S2VModelConfig(), 2)
    flops = [forward_flop(config, shape_of_tokens(n)) for n in (5e3, 8e3, 14e3, 23e3, 39e3, 65e3, 1e5, 18e4, 3e5)]
    rest = [flop.total - flop.attention for flop in flops]
    own = [flop.attention for flop in flops]
    times = [fixed + a / linear / 1e12 + b / attention / 1e12 for a, b in zip(rest, own, strict=True)]
    fit = fit_growth(rest, own, times)
    assert fit.fixed_seconds == pytest.approx(fixed, rel=1e-3) and fit.linear_tflops == pytest.approx(linear, rel=1e-3)
    assert fit.attention_tflops == pytest.approx(attention, rel=1e-3) and fit.largest_deviation < 1e-6
    noisy = fit_growth(rest, own, [time * rng.uniform(0.98, 1.02) for time in times])
    assert noisy.largest_deviation < 0.03 and noisy.attention_tflops == pytest.approx(attention, rel=0.1)
    grown = fit_growth(rest, own, [time * (1 + index / 2) for index, time in enumerate(times)])
    assert grown.largest_deviation > 0.05, "times that grow otherwise do not fit"


def test_the_fit_has_no_term_below_zero():
    flops = [1e12, 2e12, 3e12, 4e12, 5e12]
    fit = fit_growth(flops, [flop**2 / 1e12 for flop in flops], [flop / 1e14 for flop in flops])
    assert fit.linear_tflops == pytest.approx(100) and fit.fixed_seconds >= 0
    assert fit.attention_tflops is None or fit.attention_tflops > 1e6


# --- what cannot run ---------------------------------------------------------------------------------------------


def test_a_case_that_fails_is_reported_and_the_others_stay(run_cli, tiny_checkpoint, replayed, tmp_path, monkeypatch):
    def fails(session, case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    monkeypatch.setitem(run.MEASURE, "article", fails)
    words = ("bench", "--cases", "forward", "article", "load", *SMALL, "--ckpt_dir", tiny_checkpoint, "--out", tmp_path)
    code, _, _ = run_cli(*words)
    entries = json.loads((tmp_path / "bench.json").read_text())
    failed = [entry for entry in entries if entry["error"]]
    assert code == 1 and [entry["case"] for entry in failed] == ["article"]
    assert failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"
    assert failed[0]["seconds_total"] is None and tuple(failed[0])[: len(CASE_KEYS)] == CASE_KEYS
    assert all(entry["seconds_total"] for entry in entries if entry["case"] != "article") and len(entries) == 6
    assert "## Not measured" in (tmp_path / "bench.md").read_text()


def test_a_stopped_run_keeps_what_it_measured(run_cli, tiny_checkpoint, replayed, tmp_path, monkeypatch):
    def stops(session, case):
        raise KeyboardInterrupt

    monkeypatch.setitem(run.MEASURE, "load", stops)
    words = ("bench", "--cases", "encoders", "load", *SMALL, "--ckpt_dir", tiny_checkpoint, "--out", tmp_path)
    code, _, err = run_cli(*words)
    names = [entry["case"] for entry in json.loads((tmp_path / "bench.json").read_text())]
    assert code == 130 and names == ["text encoder", "audio encoder"]
    assert "2 of 6 cases" in err and str(tmp_path / "bench.json") in err


def test_what_has_no_room_is_refused_before_anything_is_built(run_cli, tmp_path):
    words = ("bench", "--dry_run", "--device", "cpu", "--memory_gb", "48", "--cases", "forward", "--json")
    code, out, _ = run_cli(*words, "--precision", "float32", "float8-weights", "--sizes", "832x480")
    exact, small = json.loads(out)
    assert code == 1 and small["refusal"] is None
    assert "GB weights" in exact["refusal"] and "48.0 GB" in exact["refusal"] and "float8-weights" in exact["refusal"]
    assert exact["weight_bytes"] == pytest.approx(65.6e9, rel=0.02)
    assert small["weight_bytes"] == pytest.approx(19.11e9, rel=0.01), "as measured on a card"
    assert small["flop"] == pytest.approx(1.9e15, rel=0.02)
    code, _, err = run_cli(
        "bench", "--device", "cpu", "--memory_gb", "1", "--cases", "forward", "--out", tmp_path / "o"
    )
    assert code == 2 and "has 1.0 GB" in err and not (tmp_path / "o").exists()


def test_one_case_without_room_leaves_the_others(run_cli, tiny_checkpoint, replayed, tmp_path):
    words = (
        "bench",
        "--cases",
        "forward",
        *SMALL,
        "--ckpt_dir",
        tiny_checkpoint,
        "--out",
        tmp_path,
        "--memory_gb",
        "1",
    )
    code, _, _ = run_cli(*words, "--sizes", "64x64", "4096x4096")
    entries = json.loads((tmp_path / "bench.json").read_text())
    assert code == 1 and [bool(entry["error"]) for entry in entries] == [False, True]


def test_the_text_of_a_dry_run(run_cli):
    code, out, _ = run_cli("bench", "--dry_run", "--model", "demo", "--device", "cpu", "--cases", "all")
    assert code == 0 and len(out.splitlines()) == 19 and "article 64x64 float32 sdpa" in out


def test_without_a_card_the_demo_is_suggested(run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run_cli("bench", "--out", tmp_path / "o")
    assert code == 2 and "--model demo" in err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--cases", "speed"], "--cases speed is not known"),
        (["--sizes", "100x100"], "multiples of 16"),
        (["--sizes", "wide"], "--sizes wide"),
        (["--way", "float32:auto:0"], "--way float32:auto:0"),
        (["--way", "float32:auto:1:2"], "--way"),
        (["--way", "float32:quick"], "attention='quick' is not known"),
        (["--precision", "int3"], "precision='int3' is not known"),
        (["--model", "3B"], "model='3B' is not known"),
        (["--runs", "0"], "--runs 0"),
        (["--measured_steps", "1"], "--measured_steps 1"),
        (["--frames", "100"], "no number of whole clips"),
        (["--clip_frames", "30"], "clip_frames=30"),
        (["--growth_tokens", "900", "100"], "must rise"),
        (["--guidance", "0.5"], "guidance_scale=0.5"),
    ],
)
def test_what_makes_no_sense_is_told(run_cli, words, told):
    code, _, err = run_cli("bench", "--dry_run", "--model", "demo", "--device", "cpu", *words)
    assert code == 2 and told in err


# --- parts -------------------------------------------------------------------------------------------------------


def test_ways_are_pairs_or_all_combinations():
    source = ModelSource(model="demo")
    ways = BenchRequest(source=source, device="cpu", ways=("float32", "bfloat16:sdpa")).all_ways()
    assert [(way.precision, way.attention) for way in ways] == [("float32", "auto"), ("bfloat16", "sdpa")]
    request = BenchRequest(source=source, device="cpu", precisions=("float32", "bfloat16"), attentions=("auto", "sdpa"))
    assert len(request.all_ways()) == 4
    forwards = [case for case in list_cases(request) if case.group == "forward"]
    others = [case for case in list_cases(request) if case.group != "forward"]
    assert len(forwards) == 2 and len(others) == 4, "sdpa is what auto stands for; what has no attention comes once"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("Memcpy HtoD (Pinned -> Device)", "transfers"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_f32_aligned_32x128_gmem_sm80", "attention"),
        ("attend_kernel_8bit", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", "linears"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm", "linears"),
        ("sm90_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc", "linears"),
        ("aten::addmm", "linears"),
        ("void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<float8_copy", "other"),
        ("convert_rows", "other"),
    ],
)
def test_kernels_by_name(name, kind):
    assert kind_of_kernel(name) == kind


def test_what_the_ceilings_allow():
    flop = forward_flop(TINY, ForwardShape(256, 256))
    rates = Rates(
        "fp8", square=4.0, up=2.0, down=1.0, outside=0.5, attention=3.0, attention_kernel="", attention_bits=8
    )
    allowed = allowed_seconds(flop, rates)
    linears = flop.square / 4 + flop.up / 2 + flop.down + flop.outside / 0.5
    assert allowed.linears == pytest.approx(linears / 1e12)
    assert allowed.total == pytest.approx((linears + flop.attentions / 3) / 1e12)
    assert allowed_seconds(flop, replace(rates, up=None)) is None


def no_kernel(*arguments):
    raise RuntimeError("no such kernel")


def test_ceilings_are_measured_once_and_none_where_there_is_no_kernel(caplog, monkeypatch):
    ceilings = Ceilings(CPU)
    rates = ceilings.rates(TINY, 256, "float32", 16)
    assert min(rates.square, rates.up, rates.down, rates.attention) > 0 and rates.attention_kernel == "sdpa"
    assert ceilings.rates(TINY, 256, "float32", 16) == rates
    monkeypatch.setattr(ceiling_module, "scaled_product", no_kernel)
    rates = ceilings.rates(TINY, 256, "float8", 16)
    assert rates.products == "fp8" and rates.square is None and rates.outside > 0
    assert "no ceiling of" in caplog.text and "no such kernel" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fast_vae_is_held_against_what_it_computes_in(dtype):
    """Its first weights are float32 whatever its products are."""
    vae = VideoVAE(width=8)
    fill_random(vae)
    speed_up(vae, CPU, dtype)
    assert next(vae.parameters()).dtype == torch.float32
    assert products_dtype(vae) == dtype and type_name(vae) == str(dtype).removeprefix("torch.")
    assert products_dtype(torch.nn.Linear(2, 2).bfloat16()) == torch.bfloat16


def test_the_large_ceiling_is_the_fastest_run_of_any_product(monkeypatch):
    """Runs at once and after a second at work, two shapes: what a short network reaches is below the best of them."""
    ceilings, times = Ceilings(CPU), iter([8.0, 4.0, 2.0, 6.0])
    monkeypatch.setattr(ceilings, "_runs", lambda *_: [seconds := next(times), seconds + 1])
    work = [2 * math.prod(side // 16 for side in sides) for sides in ceiling_module.LARGE]
    assert ceilings.large(torch.bfloat16) == pytest.approx(max(work[0] / 4.0, work[1] / 2.0) / 1e12)
    assert ceilings.large(torch.bfloat16), "kept"


@pytest.mark.parametrize("precision", ["bfloat16", "float8-weights"])
def test_random_weights_fill_layers_that_store_their_own(precision, make_inputs, fresh_seed):
    model = random_network(DIT, TINY, loading_of(precision, CPU))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    inputs, noise = make_inputs(TINY)
    with torch.inference_mode():
        assert model(noise, 500.0, model.condition(inputs)).isfinite().all()
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert predicted_bytes(DIT, TINY, loading_of(precision, CPU)) == stored


class Transposed(torch.nn.Module):
    """Stores a weight its own way: turned, as a buffer."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 3, 5
        self.register_buffer("turned", None)

    def take_weight(self, value):
        self.turned = value.t().contiguous()


def test_random_weights_come_in_the_shape_of_a_file(fresh_seed):
    network = torch.nn.Sequential(Transposed())
    fill_random(network, fresh_seed)
    assert torch.equal(network[0].turned.t(), random_tensor("0.weight", (5, 3), fresh_seed, 1, "cpu"))


def test_what_networks_need_is_what_they_take(tiny_checkpoint):
    needs = NeedsOf(BenchRequest(source=ModelSource(checkpoint=str(tiny_checkpoint)), device="cpu"))
    case = Case("encoders", "text encoder", 0, 0, 0, "float32", AccelerationPlan())
    for kind in (TEXT_ENCODER, SPEECH_ENCODER):
        network = load(tiny_checkpoint, kind, torch.float32)
        stored = sum(p.numel() * p.element_size() for p in network.parameters())
        assert needs.weights(kind, case) == pytest.approx(stored, rel=0.01)


def test_the_commit_comes_from_gits_own_files(tmp_path):
    place = tmp_path / "checkout" / "package" / "module.py"
    place.parent.mkdir(parents=True)
    assert read_commit(place) == "unknown"
    git = tmp_path / "checkout" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert read_commit(place) == "unknown", "no commit yet"
    (git / "packed-refs").write_text("# pack-refs\n0123456789abcdef refs/heads/main\n")
    assert read_commit(place) == "0123456"
    (git / "refs" / "heads" / "main").write_text("fedcba9876543210\n")
    assert read_commit(place) == "fedcba9"
    (git / "HEAD").write_text("1111111222222\n")
    assert read_commit(place) == "1111111"


def test_results_round_trip_through_json():
    case = Case("forward", "forward", 64, 64, 80, "float32", AccelerationPlan())
    entry = Result(seconds_total=1.0).to_entry(case, {"weights": "w", "gpu": "g", "torch": "t", "commit": "c"})
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry and set(entry["split"]) == SPLIT
    assert measuring.spread_of([1.0, 1.1, 1.2]) == pytest.approx(0.2 / 2 / 1.1)
