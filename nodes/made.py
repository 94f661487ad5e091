"""What nodes made on the disk in this server's life, so that results that ComfyUI has cached and whose files are gone
are made again."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comfy_execution.utils import get_executing_context

Stamp = tuple[int, int]
"""When a file was changed, and how large it is."""


class MadeFiles:
    """Files by the node that made them and the inputs that it was given by hand.

    A node's `fingerprint_inputs` calls `losses` before a prompt runs: the number that it gives changes when one of the
    files is no longer there, and ComfyUI runs the node again.
    """

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], dict[Path, Stamp | None]] = defaultdict(dict)
        self._losses: dict[tuple[str, str], int] = defaultdict(int)
        self._asked: dict[str, str] = {}
        """The inputs that each node was asked with last."""

    def losses(self, inputs: dict[str, Any]) -> int:
        """How often files of the node that is asked now have been missed."""
        if (node := executing_node()) is None:
            return 0
        key = node, hashlib.sha256(repr(sorted(inputs.items())).encode("utf-8", "replace")).hexdigest()
        self._asked[node] = key[1]
        if any(is_lost(path, stamp) for path, stamp in self._files.get(key, {}).items()):
            del self._files[key]
            self._losses[key] += 1
        return self._losses.get(key, 0)

    def note(self, nodes: Iterable[str], files: Iterable[Path], may_change: bool) -> None:
        """Nodes have made files; those that `may_change` only need to be there."""
        noted = {path: None if may_change else stamp_of_file(path) for path in files}
        for node in set(nodes):
            if node in self._asked:  # else ComfyUI caches nothing
                self._files[node, self._asked[node]] |= noted

    def forget(self, folder: Path) -> None:
        """A folder has been deleted by us, whose files nobody misses."""
        for files in self._files.values():
            for path in [path for path in files if path.parent == folder]:
                del files[path]


MADE = MadeFiles()


def executing_node() -> str | None:
    """The node that ComfyUI calls now, also where it only asks for a fingerprint."""
    context = get_executing_context()
    return None if context is None else context.node_id


def stamp_of_file(path: Path) -> Stamp | None:
    """None where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def is_lost(path: Path, stamp: Stamp | None) -> bool:
    now = stamp_of_file(path)
    return now is None or (stamp is not None and now != stamp)
