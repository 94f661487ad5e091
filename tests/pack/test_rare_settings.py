"""Settings that few need, on nodes before the sampler: they reach it in any order, and as they come change nothing."""

import itertools
import json

import pytest

CHOSEN = {
    "WanS2VModelPair": {"low_noise_model": ["1", 0], "noise_boundary": 0.5},
    "WanS2VExperts": {"moe_top_k": 2, "moe_gate_dropout": 0.25, "moe_overflow": "drop"},
    "WanS2VNoise": {"noise": "reference", "spacing": "karras"},
    "WanS2VSpeed": {
        "attention": "sdpa",
        "sparse_keep": 0.5,
        "sparse_by": "distance",
        "sparse_dense_steps": 0,
        "sparse_dense_blocks": 0,
        "fused": False,
        "vae": "float32",
    },
    "WanS2VMemory": {
        "profile": "auto",
        "vram_limit_gb": 8.0,
        "resident_blocks": -1,
        "slice_tokens": -1,
        "vae_tile": -1,
        "weights": "auto",
    },
}
AS_THEY_COME = {
    "WanS2VExperts": {"moe_top_k": 0, "moe_gate_dropout": 0.0, "moe_overflow": "spill"},
    "WanS2VNoise": {"noise": "cpu", "spacing": "flow"},
}


def model_through(nodes: dict[str, dict], kinds) -> tuple:
    """The demo's model behind nodes of these kinds, the first of them next to the loader."""
    model = ["1", 0]
    for kind in kinds:
        model = (kind, {"model": model, **nodes[kind]})
    return model


@pytest.fixture
def settings_of(run, graph, comfy):
    """Run a graph -> the settings of the clips that it kept."""

    def made(**changes) -> dict:
        kept = comfy.output / "wan_s2v_clips"
        before = set(kept.iterdir()) if kept.is_dir() else set()
        ended = run(graph(**changes, keep_clips=True, seconds=0.5))
        assert ended.status == "success", (ended.errors, ended.node_errors)
        (folder,) = set(kept.iterdir()) - before
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))

    return made


def test_all_that_is_said_reaches_the_sampler_in_any_order(settings_of, chance, new_seed):
    orders = list(itertools.permutations(CHOSEN))
    for number in (0, -1, int(chance.integers(1, len(orders) - 1))):
        order, seed = orders[number], new_seed()
        model = model_through(CHOSEN, order)
        settings = settings_of(model=model, moe_expert_capacity=200, seed=seed)
        sampling, routing = settings["sampling"], settings["routing"]
        assert (sampling["noise"], sampling["spacing"], sampling["noise_boundary"]) == ("reference", "karras", 0.5)
        assert routing == {
            "top_k": 2, "expert_capacity": 200, "overflow": "drop", "gate_dropout": 0.25, "gate_dropout_seed": seed,
        }, order  # fmt: skip
        acceleration = settings["loading"]["acceleration"]
        assert acceleration == CHOSEN["WanS2VSpeed"], order


def test_as_they_come_they_change_nothing(run, graph, new_seed):
    """The clips are those of the graph without them: nothing is sampled again."""
    seed = new_seed()
    assert run(graph(seed=seed, keep_clips=True)).previews
    ended = run(graph(seed=seed, keep_clips=True, model=model_through(AS_THEY_COME, AS_THEY_COME)))
    assert ended.status == "success" and not ended.previews


def test_what_was_said_holds_for_its_graph_alone(settings_of, new_seed):
    """Two samplers behind one loader: what stands before one of them says nothing to the other."""
    settings_of(model=model_through(CHOSEN, ("WanS2VExperts", "WanS2VNoise")), moe_expert_capacity=200, seed=new_seed())
    plain = settings_of(seed=new_seed())
    assert (plain["sampling"]["noise"], plain["sampling"]["spacing"]) == ("cpu", "flow")
    assert plain["sampling"]["noise_boundary"] is None
