"""Start and stop a real ComfyUI in a temporary folder, with packs of nodes linked in. Standard library only.

with ComfyServer(comfyui, {"wan_s2v": root}) as server:
    run = server.client.run(prompt)
    videos = server.videos(run)
"""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_client import ComfyClient, Run

START_SECONDS = 180
STOP_SECONDS = 10
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv")
IMPORT_PROBLEMS = re.compile(
    r"IMPORT FAILED|Cannot import .* module for custom nodes|Error while calling comfy_entrypoint|did not return a|"
    r"is not callable, skipping|due to the lack of NODE_CLASS_MAPPINGS|Failed to execute startup-script"
)
OF_COMFYUI = re.compile(r"/comfy_extras/|IMPORT FAILED: nodes_\w+\.py")


class ServerFailed(Exception):
    """The server could not be started; the message ends with what it wrote last."""


@dataclass(frozen=True)
class OutputFile:
    """A file that the output of a node names."""

    node: str
    key: str
    path: Path


class ComfyServer:
    """ComfyUI on a loopback port. Models, input and user data lie in `base`, which is removed when it stops.

    Args:
        comfyui: folder of ComfyUI; nothing is written to it.
        packs: folders of node packs by the name under which ComfyUI sees them.
        output: a folder to keep outputs in; by default they go with `base`.
        port: 0 takes a free one.
        arguments: of ComfyUI's own command line.
        environment: variables to set for the server.
    """

    def __init__(
        self,
        comfyui: Path,
        packs: Mapping[str, Path],
        *,
        output: Path | None = None,
        port: int = 0,
        arguments: Sequence[str] = ("--cpu",),
        environment: Mapping[str, str] | None = None,
    ):
        self.comfyui, self.packs = comfyui, dict(packs)
        self.arguments, self.environment = tuple(arguments), dict(environment or {})
        self.port = port or free_port()
        self.client = ComfyClient(self.port)
        self.process: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        self.base = Path(self._folder.name).resolve()
        self.output = (output or self.base / "output").resolve()
        self._make_folders()

    def __enter__(self) -> "ComfyServer":
        try:
            self.start()
        except BaseException:  # Ctrl-C too: never leave a server behind
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with interrupts_ignored():
            self.stop()
            self._folder.cleanup()

    def start(self) -> None:
        with (self.base / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=self._variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we stop it then
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """End the server, asking first."""
        if self.process is None:
            return
        for ask in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            self.process.send_signal(ask)  # does nothing where it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                break
        self.process = None

    def log(self, last_lines: int = 0) -> str:
        """What the server wrote, or the end of it."""
        lines = (self.base / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-last_lines:])

    def import_problems(self) -> list[str]:
        """Lines of the log that tell of packs that could not be loaded. What ComfyUI's own extra nodes lack is left
        out: not every ComfyUI has all that they ask for."""
        found = (line.strip() for line in self.log().splitlines() if IMPORT_PROBLEMS.search(line))
        return [line for line in found if not OF_COMFYUI.search(line)]

    def pack_nodes(self) -> dict[str, list[str]]:
        """The ids of the nodes that each pack has brought."""
        modules = {node: entry.get("python_module") for node, entry in self.client.object_info().items()}
        return {
            name: sorted(node for node, module in modules.items() if module == f"custom_nodes.{name}")
            for name in self.packs
        }

    def output_files(self, run: Run) -> list[OutputFile]:
        """All files that the outputs of a run name."""
        return [
            OutputFile(node, key, self._path(entry))
            for node, output in run.outputs.items()
            for key, entries in output.items()
            for entry in (entries if isinstance(entries, list) else ())
            if isinstance(entry, dict) and entry.get("filename")
        ]

    def videos(self, run: Run) -> list[Path]:
        """The videos among them, the last made last."""
        return [file.path for file in self.output_files(run) if file.path.suffix.lower() in VIDEO_SUFFIXES]

    def _path(self, entry: Mapping[str, Any]) -> Path:
        kind = entry.get("type", "output")
        folder = self.output if kind == "output" else self.base / kind
        return folder / entry.get("subfolder", "") / entry["filename"]

    def _make_folders(self) -> None:
        for name in ("custom_nodes", "models", "input", "temp", "user"):
            (self.base / name).mkdir()
        self.output.mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder.resolve(), target_is_directory=True)

    def _command(self) -> list[str]:
        options = {
            "--listen": self.client.host,
            "--port": self.port,
            "--base-directory": self.base,
            "--output-directory": self.output,
            "--database-url": f"sqlite:///{self.base / 'user' / 'comfyui.db'}",  # else it lies in ComfyUI's own folder
        }
        pairs = [str(part) for pair in options.items() for part in pair]
        return [
            sys.executable,
            "main.py",
            *pairs,
            "--disable-auto-launch",
            "--disable-api-nodes",
            *self._page(),
            *self.arguments,
        ]

    def _page(self) -> list[str]:
        """ComfyUI does not start without a page. Where its package is not installed, an empty one serves the API."""
        if "--front-end-root" in self.arguments or importlib.util.find_spec("comfyui_frontend_package"):
            return []
        folder = self.base / "page"
        folder.mkdir(exist_ok=True)
        (folder / "index.html").write_text("no page here", encoding="utf-8")
        return ["--front-end-root", str(folder)]

    def _variables(self) -> dict[str, str]:
        no_proxy = [value for value in (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost") if value]
        own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": ",".join(no_proxy)}
        return {**os.environ, **own, **self.environment}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if (code := self.process.poll()) is not None:
                raise ServerFailed(f"ComfyUI ended with {code} before it was ready:\n{self.log(40)}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"ComfyUI was not ready after {START_SECONDS} s:\n{self.log(40)}")
            try:
                self.client.get("/system_stats")
                return
            except OSError:  # it does not listen yet
                time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ctrl-C once more must not leave a server behind. Signals are the main thread's alone."""
    try:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sigterm_as_interrupt() -> None:
    """Let SIGTERM raise KeyboardInterrupt, so that `with` blocks clean up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
