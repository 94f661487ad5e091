"""What is too old, missing or slow on this computer is said in one line with the cure, before anything loads."""

import copy
import importlib.metadata
import importlib.util
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_s2v_core import libraries, prepare
from wan_s2v_core.acceleration.quantization import swap_linears
from wan_s2v_core.config import S2VModelConfig
from wan_s2v_core.libraries import COMFYUI_FLOOR, FLOORS, is_older, library_problem
from wan_s2v_core.model.loading import place, type_of
from wan_s2v_core.networks import open_checkpoint
from wan_s2v_core.prepare import PRECISIONS, plan_loading

ROOT = Path(__file__).resolve().parents[2]
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
TITAN_RTX, AMPERE = (7, 5), (8, 6)


# --- versions ----------------------------------------------------------------------------------------------------


def test_floors_are_those_that_are_declared():
    text = (ROOT / "pyproject.toml").read_text()
    declared = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)",$', text, flags=re.M))
    assert declared == FLOORS
    assert f'requires-comfyui = ">={COMFYUI_FLOOR}"' in text


@pytest.mark.parametrize(
    ("own", "floor", "older"),
    [
        ("2.13.0+cpu", "2.7", False),
        ("2.7.0a0+git1234", "2.7", False),
        ("2.6.1", "2.7", True),
        ("4.51", "4.51.0", False),
        ("0.3.9", "0.3.64", True),
        ("14.0.0rc1", "14.0.0", False),
        ("", "1.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(own, floor, older):
    assert is_older(own, floor) == older


def versions_but(**changes):
    """What `importlib.metadata.version` would say of an environment; None: not installed."""

    def installed(name):
        if (found := changes.get(name, "999")) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    return installed


def test_what_is_here_will_do():
    assert library_problem() is None and library_problem(COMFYUI_FLOOR) is None


@pytest.mark.parametrize("name", FLOORS)
def test_a_library_that_is_too_old_is_one_line_with_the_cure(name):
    problem = library_problem(installed=versions_but(**{name: "0.0.1"}))
    assert problem.startswith(f"{name} is 0.0.1, {FLOORS[name]} or newer is needed")
    assert f'pip install --upgrade "{name}>={FLOORS[name]}"' in problem and "\n" not in problem


def test_several_problems_are_told_at_once(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    problem = library_problem(installed=versions_but(diffusers="0.30.0", av=None))
    assert problem.startswith("av is not installed, 14.0.0 or newer is needed; diffusers is 0.30.0, 0.35.0 or newer")


def test_the_command_line_says_it(monkeypatch, run_cli, tmp_path):
    monkeypatch.setattr("wan_s2v_core.cli.library_problem", lambda: "torch is 1.0. Update it.")
    assert run_cli("inspect", tmp_path) == (2, "", "error: torch is 1.0. Update it.\n")


@pytest.mark.parametrize("old", ["a library", "ComfyUI"])
def test_comfyui_is_told_instead_of_a_failed_import(old, monkeypatch, caplog):
    """One line, and no entry point, by which ComfyUI sees that the pack is not loaded."""
    if old == "ComfyUI":
        monkeypatch.setitem(sys.modules, "comfyui_version", type(sys)("comfyui_version"))
        sys.modules["comfyui_version"].__version__ = "0.3.1"
    else:
        monkeypatch.setattr(importlib.metadata, "version", versions_but(diffusers="0.30.0"))
    spec = importlib.util.spec_from_file_location(
        "pack_of_this_test", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, spec.name, pack)
    try:
        spec.loader.exec_module(pack)
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    (record,) = caplog.records
    assert "or newer is needed" in record.getMessage() and not record.exc_info
    assert not hasattr(pack, "comfy_entrypoint") and all(hasattr(pack, name) for name in pack.__all__)


# --- precision and device ----------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Pretend a card of that compute capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A card")
        prepare._say_float16.cache_clear()

    yield pretend
    prepare._say_float16.cache_clear()


def test_auto_is_float16_without_bfloat16_units_and_says_so_once(card, caplog):
    card(TITAN_RTX)
    with caplog.at_level(logging.WARNING):
        assert all(plan_loading("auto", CARD).types.dtype == torch.float16 for _ in range(3))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "precision auto is float16: A card (compute capability 7.5) has no bfloat16 units"


@pytest.mark.parametrize(("device", "dtype"), [(CARD, torch.bfloat16), (CPU, torch.float32)])
def test_auto_is_as_ever_elsewhere(card, caplog, device, dtype):
    card(AMPERE)
    assert plan_loading("auto", device).types.dtype == dtype and not caplog.records
    card(TITAN_RTX)
    assert plan_loading("bfloat16", CARD).types.dtype == torch.bfloat16, "what is asked for is done"


def test_a_model_in_8_bits_computes_in_float16_there(card, make_model, make_inputs):
    """The weights are those of other cards, and so are the results, but for rounding."""
    card(TITAN_RTX)
    planned = plan_loading("float8-weights", CARD).types
    assert planned == replace(PRECISIONS["float8-weights"], dtype=torch.float16)
    (inputs, noise), model = make_inputs(), make_model()
    made = {}
    for dtype in (torch.float32, planned.dtype):
        other = copy.deepcopy(model)
        swap_linears(other, planned.linears)
        for name, value in model.state_dict().items():
            place(other, name, value, type_of(other, name, dtype))
        with torch.inference_mode():
            made[dtype] = other(noise, 500.0, other.condition(inputs)).float()
    exact, low = made.values()
    assert low.isfinite().all() and (low - exact).norm() / exact.norm() < 0.01


REASONS = {
    "is built for CPUs alone": {"cuda": None, "hip": None},
    "finds no GPU or no driver": {"cuda": "12.8", "hip": None},
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_there_is_no_gpu(reason, monkeypatch):
    for name, value in REASONS[reason].items():
        monkeypatch.setattr(torch.version, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in prepare.why_cpu() and "nstall" in prepare.why_cpu()


def test_a_cpu_that_was_asked_for_beside_a_gpu(card, monkeypatch):
    card(AMPERE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare.why_cpu().startswith("A card is there") and "--cpu" in prepare.why_cpu()


def test_parameters_are_those_of_the_blocks():
    released = S2VModelConfig()
    assert 0.95 < prepare.dit_parameters(released) / 16.3e9 < 1.0


@pytest.mark.parametrize("is_large", [True, False])
def test_a_large_model_on_a_cpu_is_said_before_anything_loads(is_large, tiny_checkpoint, monkeypatch, caplog):
    if is_large:
        monkeypatch.setattr(prepare, "LARGE_PARAMETERS", 1e5)
    networks = open_checkpoint(tiny_checkpoint, plan_loading("auto", CPU))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == is_large and not networks.loaded
    assert not lines or "will run on the CPU" in lines[0]
