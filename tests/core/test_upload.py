"""Weights on their way to a device: equal there, stopped when they are to be, counted, at home again behind it."""

import pytest
import torch
from torch import nn

from wan_s2v_core.config import MemoryLimits, OffloadPlan
from wan_s2v_core.io.maps import MAPS, is_mapped
from wan_s2v_core.io.weights import open_weights
from wan_s2v_core.memory.networks import room_on, within_limit
from wan_s2v_core.memory.placement import Placement
from wan_s2v_core.memory.upload import BUFFER_BYTES, Upload
from wan_s2v_core.model.checkpoint import DIT
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import load_placed
from wan_s2v_core.prepare import plan_loading

OTHER_CPU = torch.device("cpu", 0)
"""A device of its own to us, where tensors of a CPU are."""
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = [OTHER_CPU, pytest.param(torch.device("cuda", 0), marks=NEEDS_GPU)]


class Stop(Exception):
    pass


def network() -> nn.Module:
    made = nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40), nn.Linear(40, 7, dtype=torch.bfloat16))
    made.register_buffer("scale", torch.randn(3))
    return made.requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_arrive_as_they_are(device, fresh_seed):
    torch.manual_seed(fresh_seed)
    sizes = (1, 1000, BUFFER_BYTES // 4 + 3, BUFFER_BYTES)
    sources = [torch.randn(size) for size in sizes] + [torch.randn(70, 30).T, torch.randn(5, 4).to(torch.float16)]
    if device.type == "cuda":
        sources.append(torch.randn(2000).pin_memory())
    targets = [torch.empty_like(source, device=device) for source in sources]
    with Upload(device) as upload:
        for source, target in zip(sources, targets, strict=True):
            upload.copy(source, target)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_comes_stays_and_goes_home(device, fresh_seed):
    torch.manual_seed(fresh_seed)
    made, x = network(), torch.randn(2, 300)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    addresses = [value.data_ptr() for value in made.state_dict().values()]
    placement = Placement(made)
    size = sum(value.nbytes for value in before.values())
    assert placement.bytes == size and placement.bytes_on(device) == 0
    placement.send(device)
    assert placement.device_bytes == placement.bytes_on(device) == size
    assert all(value.device.type == device.type for value in made.state_dict().values())
    with torch.no_grad():
        made[0](x.to(device))
    there = [value.data_ptr() for value in made.state_dict().values()]
    placement.send(device)
    assert [value.data_ptr() for value in made.state_dict().values()] == there, "it is there, and is not sent again"
    placement.take_back()
    assert placement.device_bytes == 0 and [value.data_ptr() for value in made.state_dict().values()] == addresses
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_cancel_stops_weights_on_their_way():
    seen = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Stop

    placement = Placement(network())
    with pytest.raises(Stop), placement.on(OTHER_CPU, OffloadPlan(), check):
        pass
    assert len(seen) == 3 and placement.device_bytes == 0
    with placement.on(OTHER_CPU, OffloadPlan()) as made:
        assert made[0].weight.isfinite().all()


def test_mapped_weights_count_as_no_memory(tmp_path, fresh_seed):
    from safetensors.torch import save_file

    torch.manual_seed(fresh_seed)
    made = network()
    save_file(made.state_dict(), tmp_path / "weights.safetensors")
    entries = open_weights(tmp_path / "weights.safetensors").entries
    assert Placement(made).host_bytes == Placement(made).bytes
    for name, tensor in list(made.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, nn.Parameter(entries[name].read(), requires_grad=False))
        assert not is_mapped(tensor)
    placement = Placement(made)
    assert placement.host_bytes == made.scale.nbytes, "the buffer is all that was made here"
    maps = len(MAPS)
    del entries, placement, made, tensor
    assert len(MAPS) == maps - 1


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Figures of a GPU of 24 GB -> the shares of it that torch is told to keep to."""
    shares, figures = [1.0], {"free": 22e9, "reserved": 1e9, "allocated": 0.5e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (figures["free"], 24e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: figures["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: figures["allocated"])
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: shares[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device=None: shares.append(share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return shares, figures


GPU = torch.device("cuda", 0)


def test_the_allocator_keeps_to_a_limit(pretended_gpu):
    shares, _ = pretended_gpu
    with within_limit(GPU, MemoryLimits(vram_limit_gb=8), 5_000_000_000):
        assert shares[-1] * 24e9 == pytest.approx(8e9 - 1e9), "less what is in use beside torch"
    assert shares[-1] == 1
    with within_limit(GPU, MemoryLimits(vram_limit_gb=8), 7_000_000_000):
        assert shares[-1] == 1, "a limit that cannot hold is no reason to fail"
    with within_limit(GPU, MemoryLimits(vram_limit_gb=64), 1), within_limit(GPU, MemoryLimits(), 1):
        assert set(shares[3:]) <= {1}
    with pytest.raises(Stop), within_limit(GPU, MemoryLimits(vram_limit_gb=8), 1):
        raise Stop
    assert shares[-1] == 1


def test_room_on_a_gpu_knows_limits_shares_and_reserves(pretended_gpu):
    shares, figures = pretended_gpu
    free = 22e9 + 0.5e9
    assert room_on(GPU, MemoryLimits()).device_bytes == free
    assert room_on(GPU, MemoryLimits(), 3_000, 1_000).device_bytes == free + 2_000
    assert room_on(GPU, MemoryLimits(vram_limit_gb=8)).device_bytes == 8e9 - 1e9 - 0.5e9
    figures["free"] = 10e9  # other programs take much
    assert room_on(GPU, MemoryLimits(vram_limit_gb=8)).device_bytes == 8e9 - 1.7e9 - 0.5e9
    shares.append(0.25)
    assert room_on(GPU, MemoryLimits()).device_bytes == 6e9 - 0.5e9


def test_a_cancel_stops_loading(tiny_checkpoint):
    seen = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 5:
            raise Stop

    loading = plan_loading("auto", torch.device("cpu"))
    for packs in (False, True):
        seen.clear()
        with pytest.raises(Stop):
            load_placed(Checkpoint({DIT: tiny_checkpoint}), DIT, loading, packs, check)
        assert len(seen) == 5
    assert load_placed(Checkpoint({DIT: tiny_checkpoint}), DIT, loading, False, lambda: None).bytes
