"""Main memory that loading takes: anonymous memory alone, since what is mapped of a file can be taken back any time."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import OffloadPlan, S2VModelConfig
from wan_s2v_core.memory.placement import Placement
from wan_s2v_core.model import loading
from wan_s2v_core.model.checkpoint import DIT, dit_name, official_dit_config
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.loading import find_part
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import load_placed, sizes_of
from wan_s2v_core.prepare import plan_loading

CPU = torch.device("cpu")
WIDE = S2VModelConfig(
    width=768, feed_forward_width=2048, heads=6, blocks=10, text_width=64, audio_width=32, audio_layers=3,
    injected_blocks=(0, 4, 8),
)  # fmt: skip
MB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.fixture(scope="module")
def wide_checkpoint(tiny_maker, tmp_path_factory) -> Path:
    """A DiT of some 200 MB in bfloat16, in two shards."""
    folder = tmp_path_factory.mktemp("wide")
    model = S2VTransformer(WIDE)
    fill_random(model, 1)
    tiny_maker.write_shards(folder, tiny_maker.bfloat16_weights(model, dit_name))
    tiny_maker.write_json(folder / "config.json", official_dit_config(WIDE))
    return folder


def load_watched(path: Path, packs: bool, monkeypatch) -> tuple[Placement, int, int]:
    """A network, and how much anonymous memory it took: at most, and in the end."""
    gc.collect()
    before, seen = anonymous_bytes(), []
    plain = loading.place

    def watched(*arguments):
        seen.append(anonymous_bytes())
        plain(*arguments)

    monkeypatch.setattr(loading, "place", watched)
    placement = load_placed(Checkpoint({DIT: path}), DIT, plan_loading("bfloat16", CPU), packs)
    gc.collect()
    return placement, max(seen) - before, anonymous_bytes() - before


def test_layers_are_packed_without_being_there_twice(wide_checkpoint, monkeypatch):
    sizes = sizes_of(find_part(wide_checkpoint, DIT), plan_loading("bfloat16", CPU))
    placement, most, held = load_watched(wide_checkpoint, True, monkeypatch)
    assert sum(sizes.blocks) > 100 * MB
    assert held < 1.05 * sizes.whole + 10 * MB
    assert most < sizes.whole + max(sizes.blocks) + 10 * MB, "a layer at a time is there twice"
    assert all(layer.is_packed for layer in placement.layers.values())


def test_mapped_weights_take_no_memory_of_their_own(wide_checkpoint, monkeypatch):
    sizes = sizes_of(find_part(wide_checkpoint, DIT), plan_loading("bfloat16", CPU))
    placement, most, held = load_watched(wide_checkpoint, False, monkeypatch)
    full_precision = sum(p.nbytes for p in placement.network.parameters() if p.dtype == torch.float32)
    assert sum(sizes.blocks) > 100 * MB > full_precision
    assert max(most, held) < full_precision + 10 * MB, "but for what is float32 here and not in the file"
    before = anonymous_bytes()
    with placement.on(CPU, OffloadPlan(resident_layers=0, locks=False)):
        taken = anonymous_bytes() - before
    assert taken < 6 * max(sizes.blocks) + 10 * MB, "slots and staging buffers"
