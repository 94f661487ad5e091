"""How a model is made faster: the plan of Wan S2V Speed reaches the sampler, and leaves nothing behind."""

import json
import re

import numpy as np
import pytest

PLAN = {
    "attention": "auto",
    "sparse_keep": 1.0,
    "sparse_by": "scores",
    "sparse_dense_steps": 0,
    "sparse_dense_blocks": 1,
    "fused": True,
    "vae": "auto",
}
BIG = {"width": 192, "height": 192, "steps": 2, "format": "lossless-mkv", "keep_clips": True}
"""More than a few tiles of tokens, or there is nothing to leave out."""


ROUNDING = 2
"""Of 255, on the average: by which two exact ways of attention may differ on a GPU, in bfloat16."""


def faster(**changes) -> dict:
    """The model of the demo, behind Wan S2V Speed."""
    return {"model": ("WanS2VSpeed", {"model": ["1", 0], **PLAN, **changes})}


@pytest.fixture
def made(run, graph, comfy, watch):
    """Run a graph -> its pictures, the run, and the settings of the clips that it kept."""

    def make(**changes) -> tuple[np.ndarray, object, dict]:
        kept = comfy.output / "wan_s2v_clips"
        before = set(kept.iterdir()) if kept.is_dir() else set()
        ended = run(graph(**BIG, **changes))
        assert ended.status == "success", ended.errors
        (folder,) = set(kept.iterdir()) - before
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return watch(comfy.videos(ended)[-1]).pictures, ended, settings

    return make


def test_a_plan_holds_for_its_graph_alone(made, comfy, device, new_seed):
    """Attention that leaves something out changes the pictures; the same network then makes the plain ones again."""
    seed = new_seed()
    made(seed=new_seed())
    loaded = comfy.log().count("tensors as")
    sparse, ended, settings = made(seed=seed, **faster(sparse_keep=0.3))
    speed = next(number for number, node in ended.prompt.items() if node["class_type"] == "WanS2VSpeed")
    (told,) = [text for node, text in ended.texts if node == speed]
    assert re.fullmatch(rf"attention: {'sdpa' if device == 'cpu' else '[a-z0-9]+'}, 30% of it \(lossy\)", told), told
    assert settings["loading"]["acceleration"] == PLAN | {"sparse_keep": 0.3}
    near, *_ = made(seed=seed, **faster(sparse_keep=0.3, sparse_by="distance"))
    exact, ended, settings = made(seed=seed, **faster(attention="sdpa"))
    assert [text for _, text in ended.texts if text.startswith("attention")] == ["attention: sdpa (exact)"]
    assert settings["loading"]["acceleration"]["attention"] == "sdpa"
    plain, *_ = made(seed=seed)
    difference = np.abs(exact.astype(int) - plain).mean()
    assert difference <= (0 if device == "cpu" else ROUNDING), "without what the runs before had attached"
    assert not np.array_equal(sparse, plain) and not np.array_equal(near, plain) and not np.array_equal(near, sparse)
    assert comfy.log().count("tensors as") == loaded, "all of them share one network"
