"""How the nodes' networks and ComfyUI's memory manager get along on a card: who leaves when, and how much stays.

    python benchmarks/comfy_memory.py --comfyui PATH_TO_COMFYUI

Needs a CUDA card and ComfyUI's Python packages, no server. Prints one JSON object; a broken promise is an error.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 1024**3


def import_pack(comfyui: Path) -> None:
    """Make nodes/bridge of this checkout importable as wan_s2v; only what a server would do is left out."""
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]  # ComfyUI reads its options from there
    server = types.ModuleType("server")
    server.PromptServer = types.SimpleNamespace(instance=types.SimpleNamespace(send_progress_text=lambda *_: None))
    sys.modules["server"] = server
    for name, folder in (("wan_s2v", ROOT), ("wan_s2v.nodes", ROOT / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


class Foreign(nn.Module):
    """Another node's model."""

    def __init__(self, gigabytes: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(int(gigabytes * GIGABYTE / 4)), requires_grad=False)


def on_card(network: nn.Module) -> bool:
    return all(parameter.device.type == "cuda" for parameter in network.parameters())


def watch() -> dict[str, object]:
    import comfy.model_management as manager
    from comfy.model_patcher import ModelPatcher
    from wan_s2v.nodes.bridge.folders import find_model
    from wan_s2v.nodes.bridge.networks import PLACES, ComfyNetworks, Model
    from wan_s2v.wan_s2v_core.config import ALWAYS, DEMO
    from wan_s2v.wan_s2v_core.memory.budget import Planned
    from wan_s2v.wan_s2v_core.model.checkpoint import DIT, VAE

    card, cpu = manager.get_torch_device(), torch.device("cpu")
    models = [Model(find_model(kind, DEMO)) for kind in (DIT, VAE)]
    facts: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def allocated() -> int:
        return torch.cuda.memory_allocated()

    before = allocated()
    with ComfyNetworks(*models, offload=ALWAYS).use(DIT) as dit:
        assert on_card(dit), "a stage begins with its network on the card"
        facts["dit_bytes"] = allocated() - before
    assert not on_card(dit) and allocated() == before, "offload: it leaves after its stage"

    staying = ComfyNetworks(*models)
    with staying.use(DIT) as again:
        assert again is dit, "the same recipe and precision is not loaded twice"
    with staying.use(VAE) as vae:
        assert on_card(dit) and on_card(vae), "without offload both stay"
    manager.unload_all_models()
    assert not on_card(dit) and not on_card(vae), "they leave when ComfyUI asks"
    facts["left_after_unload_bytes"] = allocated() - before

    with staying.use(DIT):
        pass
    free = manager.get_free_memory(card)
    foreign = ModelPatcher(Foreign(1.0), card, cpu)
    manager.load_models_gpu([foreign], memory_required=free - GIGABYTE // 2)
    assert not on_card(dit), "ours leaves when another model needs the room"
    with staying.use(DIT, Planned(working_bytes=manager.get_free_memory(card) + GIGABYTE // 2)):
        assert on_card(dit) and not on_card(foreign.model), "another one leaves when ours needs the room"
    facts["foreign_left_for_ours"] = True

    try:
        with staying.use(DIT):
            torch.empty(1 << 46, dtype=torch.uint8, device=card)
    except torch.OutOfMemoryError:
        staying.recover()
        assert not on_card(dit), "after running out of memory everything has left the card"
    facts["empty_after_out_of_memory"] = True

    with ComfyNetworks(*models, precision="float8-weights").use(DIT) as small:
        assert small is not dit and torch.float8_e4m3fn in {p.dtype for p in small.parameters()}
    del dit, small, again, vae
    models.clear()
    staying.models.clear()
    import gc

    gc.collect()
    facts["kept_after_loaders_died"] = len(PLACES)
    assert not PLACES, "networks die with the loaders' outputs that ComfyUI keeps"
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    options = parser.parse_args()
    import_pack(options.comfyui.resolve())
    with torch.inference_mode():  # as ComfyUI runs its nodes
        print(json.dumps(watch(), indent=1))


if __name__ == "__main__":
    main()
