"""Attention backends by name: which can be used, which is chosen, and what is said of the others. No card is needed."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from wan_s2v_core.acceleration.attention import registry
from wan_s2v_core.acceleration.attention.registry import (
    AUTO,
    AUTO_8,
    BACKENDS,
    CHOICES,
    EXACT_ERROR,
    FLASH_4,
    HOPPER,
    HOPPER_8,
    LOSSY_ERROR,
    PORTABLE,
    PORTABLE_8,
    SAGE,
    SDPA,
    Backend,
    Setting,
    choose,
    reasons,
)
from wan_s2v_core.config import AccelerationPlan
from wan_s2v_core.errors import BackendUnavailable, ConfigError
from wan_s2v_core.model.attention import sdpa

CPU = Setting(torch.device("cpu"), torch.float32, 24)
CARD = Setting(torch.device("cuda"), torch.bfloat16, 128)
"""As a setting alone: whoever computes in it needs a card."""


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was tried and told before does not count, and what is replaced here is not remembered."""
    kept = (registry.try_backend, registry.warn_once)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def replaced(monkeypatch):
    """Give a backend another `load`."""

    def replace_load(name, load):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], load=load))

    return replace_load


@pytest.fixture
def on_a_card(monkeypatch):
    """Any card, as far as a loader asks before it imports anything."""

    def pretend(capability):
        monkeypatch.setattr(Setting, "capability", property(lambda self: capability))

    return pretend


def listed_too(q, k, v, listed, counts):
    return sdpa(q, k, v, None)


def noisy(amount):
    """Attention that is off by that much, as relative L2."""

    def attend(q, k, v, context):
        out = sdpa(q, k, v, context)
        noise = torch.randn_like(out)
        return out + amount * out.norm() / noise.norm() * noise

    return lambda setting: (attend, listed_too)


def raising(error):
    def load(setting):
        raise error

    return load


def test_names_are_known_and_plans_take_them():
    assert set(BACKENDS) == {FLASH_4, HOPPER, SDPA, PORTABLE, HOPPER_8, SAGE, PORTABLE_8}
    assert (AUTO, AUTO_8, *BACKENDS) == CHOICES and AccelerationPlan().attention == AUTO
    assert [name for name, one in BACKENDS.items() if one.is_exact] == [HOPPER, FLASH_4, SDPA, PORTABLE]
    assert all(name == backend.name and backend.what for name, backend in BACKENDS.items())


def test_on_a_cpu_torchs_own_serves(fresh_seed, caplog):
    chosen = choose(AUTO, CPU)
    assert (chosen.name, chosen.is_exact) == (SDPA, True) and choose(SDPA, CPU) == chosen
    assert not caplog.records
    generator = torch.Generator().manual_seed(fresh_seed)
    q, k, v = (torch.randn(2, 37, 3, 24, generator=generator) for _ in range(3))
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(chosen.attend(q, k, v, None), plain)


def test_without_8_bits_the_exact_one_serves_and_this_is_told_once(caplog):
    assert choose(AUTO_8, CPU).name == SDPA and choose(AUTO_8, CPU).name == SDPA
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no attention in 8 bits" in record.getMessage() and SDPA in record.getMessage()


def test_a_name_that_nobody_has():
    with pytest.raises(ConfigError, match=r"attention='nonsense' is not known\. Use one of: auto, auto8, hopper"):
        choose("nonsense", CPU)


# --- why not -------------------------------------------------------------------------------------------------------


def test_a_cpu_is_the_reason_for_all_that_need_a_card():
    told = reasons(CPU)
    assert set(told) == set(BACKENDS) and told.pop(SDPA) is None
    assert all("card" in reason for reason in told.values()), told


@pytest.mark.parametrize(
    ("name", "setting", "capability", "reason"),
    [
        (HOPPER, replace(CARD, head_width=24), (9, 0), "heads of 128 channels, these have 24"),
        (HOPPER_8, replace(CARD, head_width=64), (9, 0), "heads of 128 channels, these have 64"),
        (HOPPER, replace(CARD, dtype=torch.float32), (9, 0), "bfloat16 or float16, not torch.float32"),
        (HOPPER, CARD, (12, 0), "Hopper cards"),
        (HOPPER_8, CARD, (8, 9), "Hopper cards"),
        (FLASH_4, CARD, (8, 9), "Hopper or Blackwell"),
        (FLASH_4, replace(CARD, dtype=torch.float32), (9, 0), "not torch.float32"),
        (SAGE, replace(CARD, dtype=torch.float32), (8, 9), "not torch.float32"),
        (PORTABLE_8, CARD, (7, 5), "RTX 30"),
    ],
)
def test_a_reason_names_what_is_asked_for(name, setting, capability, reason, on_a_card):
    on_a_card(capability)
    assert reason in registry.try_backend(name, setting)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (SAGE, "sageattention"),
        (FLASH_4, "flash_attn.cute"),
        (HOPPER, "triton"),
        (HOPPER_8, "triton"),
        (PORTABLE, "triton"),
        (PORTABLE_8, "triton"),
    ],
)
def test_a_missing_package_is_named_with_how_to_get_it(name, module, on_a_card, monkeypatch):
    on_a_card((9, 0))
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "wan_s2v_core.acceleration.attention.portable", raising=False)
    reason = registry.try_backend(name, CARD)
    assert module in reason and "cannot be imported" in reason and "pip install " in reason


def test_kernels_in_cuda_need_its_compiler(on_a_card, monkeypatch):
    on_a_card((9, 0))
    monkeypatch.setitem(sys.modules, "triton", sys)  # any module will do: it is only asked for
    monkeypatch.setitem(sys.modules, "cuda", None)
    reason = registry.try_backend(HOPPER, CARD)
    assert "cuda" in reason and "cannot be imported" in reason and "pip install triton cuda-bindings" in reason


def test_one_that_cannot_be_used_is_refused_by_name():
    """The value, the rule, the way out."""
    with pytest.raises(BackendUnavailable) as refused:
        choose(HOPPER, CPU)
    assert str(refused.value) == (
        "attention 'hopper' cannot be used: it needs an NVIDIA card. Usable here: auto, sdpa."
    )


# --- what is broken ------------------------------------------------------------------------------------------------

FAILURES = {
    "a bug": ZeroDivisionError("division by zero\nmore of it"),
    "a missing symbol": OSError("libfoo.so: undefined symbol"),
    "no reason": AssertionError(),
    "half a package": ImportError("cannot import name 'x'"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_backend_that_fails_is_left_out_with_one_warning(failure, replaced, caplog):
    error = FAILURES[failure]
    replaced(FLASH_4, raising(error))
    for _ in range(3):
        assert choose(AUTO, CPU).name == SDPA
    (record,) = caplog.records
    assert f"attention {FLASH_4} is left out: it fails here with {type(error).__name__}" in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(BackendUnavailable, match=f"'{FLASH_4}' cannot be used: it fails here with"):
        choose(FLASH_4, CPU)


def test_a_kernel_that_fails_when_it_runs_is_left_out(replaced, caplog):
    def attend(q, k, v, context):
        raise BackendUnavailable("hopper16.cu does not compile here")

    replaced(HOPPER, lambda setting: (attend, listed_too))
    assert choose(AUTO, CPU).name == SDPA
    assert "does not compile here" in caplog.text, "it is broken, not missing: this is told"


def test_a_missing_backend_is_no_warning(replaced, caplog):
    replaced(FLASH_4, raising(BackendUnavailable("it needs a better world")))
    assert choose(AUTO, CPU).name == SDPA and not caplog.records
    assert reasons(CPU)[FLASH_4] == "it needs a better world"


def test_what_stops_a_run_is_not_a_reason(replaced):
    replaced(FLASH_4, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        choose(AUTO, CPU)


@pytest.mark.parametrize("result", ["wrong", "not a number", "another shape", "slightly off"])
def test_wrong_numbers_are_left_out(result, replaced, caplog):
    attends = {
        "wrong": lambda q, k, v, context: sdpa(q, k, v.flip(1), context),
        "not a number": lambda q, k, v, context: torch.full_like(q, torch.nan),
        "another shape": lambda q, k, v, context: q[:, 1:],
        "slightly off": noisy(1.2 * EXACT_ERROR)(CPU)[0],
    }
    replaced(FLASH_4, lambda setting: (attends[result], None))
    assert choose(AUTO, CPU).name == SDPA
    assert len(caplog.records) == 1 and FLASH_4 in caplog.text
    with pytest.raises(BackendUnavailable, match=r"off by .* on random values, where 0\.006 is allowed|fails here"):
        choose(FLASH_4, CPU)


# --- which one -----------------------------------------------------------------------------------------------------


def test_the_first_that_works_is_chosen(replaced):
    for name in (PORTABLE, FLASH_4, HOPPER):  # from slow to fast
        replaced(name, noisy(0.5 * EXACT_ERROR))
        registry.try_backend.cache_clear()
        assert choose(AUTO, CPU).name == (SDPA if name == PORTABLE else name)
    for name in (PORTABLE_8, SAGE, HOPPER_8):
        replaced(name, noisy(0.8 * LOSSY_ERROR))
        registry.try_backend.cache_clear()
        assert choose(AUTO, CPU).name == HOPPER, "8 bits are never used unasked"
        chosen = choose(AUTO_8, CPU)
        assert (chosen.name, chosen.is_exact) == (name, False)


def test_8_bits_have_a_bound_too(replaced):
    replaced(HOPPER_8, noisy(1.2 * LOSSY_ERROR))
    replaced(SAGE, noisy(0.8 * LOSSY_ERROR))
    assert choose(AUTO_8, CPU).name == SAGE


def test_sparse_attention_takes_what_takes_lists(replaced):
    replaced(HOPPER, lambda setting: (sdpa, None))
    replaced(FLASH_4, lambda setting: (sdpa, listed_too))
    assert choose(AUTO, CPU).name == HOPPER
    chosen = choose(AUTO, CPU, takes_lists=True)
    assert chosen.name == FLASH_4 and chosen.attend_listed is listed_too
    with pytest.raises(BackendUnavailable, match="'hopper' cannot be used: it takes no lists of tiles") as refused:
        choose(HOPPER, CPU, takes_lists=True)
    assert str(refused.value).endswith("Usable here: auto, flash4, sdpa."), "those that take lists"
    assert choose(AUTO_8, CPU, takes_lists=True).name == FLASH_4


def test_a_backend_is_tried_once_for_each_setting(replaced):
    loads = []

    def load(setting):
        loads.append(setting)
        return sdpa, None

    replaced(FLASH_4, load)
    other = replace(CPU, head_width=16)
    for setting in (CPU, other, CPU, other):
        assert choose(FLASH_4, setting).name == FLASH_4
    assert loads == [CPU, other]


def test_a_new_backend_is_one_entry(monkeypatch):
    monkeypatch.setitem(BACKENDS, "mine", Backend("mine", True, "a test's", lambda setting: (sdpa, None)))
    assert reasons(CPU)["mine"] is None


def test_nothing_needs_triton_or_a_package_until_it_is_asked_for():
    """What imports the registry, and what a CPU chooses, load nothing that a CPU build of torch has not got."""
    code = (
        "import sys, torch\n"
        "names = ('triton', 'cuda', 'flash_attn', 'sageattention')\n"
        "sys.modules.update(dict.fromkeys(names))  # none of them can be imported\n"
        "from wan_s2v_core import prepare\n"
        "from wan_s2v_core.acceleration.attention.registry import Setting, choose, reasons\n"
        "setting = Setting(torch.device('cpu'), torch.float32, 24)\n"
        "assert all('imported' not in str(reason) for reason in reasons(setting).values())\n"
        "print(choose('auto', setting).name, choose('auto8', setting, takes_lists=True).name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == [SDPA, SDPA], run.stderr


def test_too_little_memory_for_a_moment_is_no_reason(monkeypatch):
    """A full card says nothing of a backend, so it is not remembered."""
    honest, calls = registry.trial_error, []

    def full_at_first(*given):
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return honest(*given)

    monkeypatch.setattr(registry, "trial_error", full_at_first)
    with pytest.raises(torch.OutOfMemoryError):
        choose(SDPA, CPU)
    assert choose(AUTO, CPU).name == SDPA


def test_the_plain_way_is_there_whatever_its_trial_said(monkeypatch, caplog):
    monkeypatch.setattr(registry, "trial_error", lambda *given: 0.5)
    with caplog.at_level(logging.WARNING):
        assert choose(AUTO, CPU).name == SDPA
    assert "off by 0.500" in caplog.text


def test_a_card_without_triton_leaves_nothing_out(replaced):
    """Its plain way for lists of tiles would take minutes for a forward."""

    def missing(setting):
        raise BackendUnavailable("a package cannot be imported")

    for name in BACKENDS:
        if name != SDPA:
            replaced(name, missing)
    replaced(SDPA, lambda setting: (sdpa, sdpa))
    with pytest.raises(BackendUnavailable, match=r"triton is missing.*sparse_keep to 1"):
        choose(AUTO, CARD, takes_lists=True)
