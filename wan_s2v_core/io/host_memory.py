"""How much host memory is free."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""


def free_ram_bytes() -> int:
    """Main memory that can be taken without anything being swapped out."""
    free = psutil.virtual_memory().available
    try:
        most, now = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if not most.isdigit():
        return free
    return min(free, int(most) - int(now) + int(held.get("inactive_file", 0)))
