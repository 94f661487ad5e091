"""Seconds, memory and kernels of one call, on a card or a CPU."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..memory.budget import CONTEXT_BYTES

Call = Callable[[], Any]

ATTENTION, LINEARS, OTHER, TRANSFERS = SPLIT = ("attention", "linears", "other", "transfers")
KERNEL_NAMES = {
    TRANSFERS: ("memcpy htod", "memcpy dtoh", "memcpy ptop"),
    ATTENTION: ("attention", "attend", "sdpa", "flash", "fmha", "sage"),
    LINEARS: (
        *("gemm", "nvjet", "cutlass", "cublas", "scaled_mm", "int_mm", "splitk", "multiply_kernel", "linear", "matmul"),
        *("::addmm", "::mm", "::bmm", "convol", "conv1d", "conv2d", "conv3d", "fprop"),
    ),
}
"""Parts of the names of kernels, and of operators on a CPU, by what they do; the first kind that fits counts."""
KERNELS_SHOWN = 12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    synchronize(device)
    return time.perf_counter()


def release(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def card_of(size_gb: float | None, device: torch.device) -> Iterator[None]:
    """Allow no more of a card than one of that size would have; None: all of it."""
    if size_gb is None or device.type != "cuda":
        yield
        return
    fraction = (size_gb * 1e9 - CONTEXT_BYTES) / device_bytes(device)
    torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device.index or 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index or 0)


def time_call(call: Call, device: torch.device) -> float:
    """Seconds of one call; on a card between two of its own events."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def interleaved(calls: dict[str, Call], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, in turn, `runs` times after one warm-up."""
    for call in calls.values():
        call()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(time_call(call, device))
    return times


class PeakMemory:
    """The most memory that was in use since this was made: the card's, or on a CPU that of this process.

    Linux alone lets a process start counting anew; elsewhere a CPU has no number.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.can_tell = True
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.can_tell = False

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        if not self.can_tell:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def held_bytes(self) -> tuple[int, int]:
        """Of a card: what torch held at most, free blocks included, and what is in use now, as the driver says."""
        if self.device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(self.device)
        return torch.cuda.max_memory_reserved(self.device), total - free


@dataclass(frozen=True)
class Timing:
    """How long a call takes."""

    seconds: tuple[float, ...]
    first_seconds: float
    """The first call in this process: with what is compiled, searched for or read from a cache of an earlier one."""
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        return spread_of(self.seconds)


def spread_of(seconds: tuple[float, ...] | list[float]) -> float:
    """Half of the distance from fastest to slowest, of the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


def time_runs(call: Call, runs: int, device: torch.device) -> Timing:
    """One call to get everything ready, then `runs` timed ones; memory is that of the timed ones."""
    began = now(device)
    call()
    first = now(device) - began
    peak = PeakMemory(device)
    seconds = tuple(time_call(call, device) for _ in range(runs))
    return Timing(seconds, first, peak.bytes())


@dataclass(frozen=True)
class Profile:
    """Where the seconds of one call went."""

    split: dict[str, float]
    kernels: list[dict[str, Any]] = field(repr=False)
    """The longest, each with name, kind, seconds and calls."""

    def scaled_to(self, seconds: float) -> dict[str, float]:
        """The split of a call like this one that takes `seconds`."""
        total = sum(self.split.values())
        return {kind: part * seconds / total if total else 0.0 for kind, part in self.split.items()}

    def within(self, seconds: float) -> dict[str, float]:
        """The split of a call of `seconds`, in part of which nothing may run. Being watched makes calls longer."""
        return self.scaled_to(min(seconds, sum(self.split.values())))


def kind_of_kernel(name: str) -> str:
    """Which part of the split a kernel (or an operator, on a CPU) of that name belongs to."""
    low = name.lower()
    return next((kind for kind, parts in KERNEL_NAMES.items() if any(part in low for part in parts)), OTHER)


def profile(call: Call, device: torch.device) -> Profile:
    """Seconds of one call by kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_card = device.type == "cuda"
    with torch_profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as record:
        call()
        synchronize(device)
    split, kernels = dict.fromkeys(SPLIT, 0.0), []
    for event in record.key_averages():
        seconds = (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6
        if not seconds:
            continue
        kind = kind_of_kernel(event.key)
        split[kind] += seconds
        kernels.append({"name": event.key[:110], "kind": kind, "seconds": seconds, "calls": event.count})
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    return Profile(split, kernels[:KERNELS_SHOWN])


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """How far a tensor is from another one, of the length of that one."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def device_name(device: torch.device) -> str:
    """The card's name, or which processor it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU: {model}"


def device_bytes(device: torch.device) -> int:
    """All memory of a card; on a CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    if not hasattr(os, "sysconf"):
        raise ConfigError("how much main memory there is cannot be asked here. Say it with --memory_gb.")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_commit(start: Path = Path(__file__)) -> str:
    """The commit of the checkout that this file is in, from git's own files; unknown where there are none."""
    for folder in start.resolve().parents:
        if (git := folder / ".git").exists():
            break
    else:
        return "unknown"
    try:
        if git.is_file():  # a second work tree
            git = (git.parent / git.read_text().partition("gitdir:")[2].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head[:7]
        name, common = head.partition(":")[2].strip(), git
        if (git / "commondir").is_file():
            common = (git / (git / "commondir").read_text().strip()).resolve()
        for place in (git, common):
            if (place / name).is_file():
                return (place / name).read_text().strip()[:7]
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0][:7] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"
