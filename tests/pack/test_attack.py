"""A small part of the attacks on a server of dev/attack, the same in every run."""

import pytest
from attack import prompts, server_kills
from attack.lab import Lab
from attack.outcome import FINE
from attack.servers import comfy_server

SEED, PROMPTS, KILLS = 16, 12, 1


@pytest.fixture(scope="module")
def lab(start_comfy, tmp_path_factory):
    """`start_comfy` skips where there is no ComfyUI."""
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def server(lab):
    with comfy_server(lab) as server:
        yield server


def test_prompts(lab, server):
    outcomes = list(prompts.attack_on(lab, server, SEED, range(PROMPTS)))
    assert len(outcomes) == PROMPTS
    assert [outcome for outcome in outcomes if outcome.is_fault] == []
    assert any(outcome.verdict == FINE for outcome in outcomes)


def test_a_server_that_is_killed(lab, server):
    outcomes = list(server_kills.attack_on(lab, server, SEED, range(KILLS)))
    assert [outcome.verdict for outcome in outcomes] == [FINE] * KILLS, outcomes
