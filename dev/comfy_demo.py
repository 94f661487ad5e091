"""The commands comfy (a workflow to a video, by itself) and serve (ComfyUI in a browser) of dev/run.py.

Standard library only until the environment is there; av and torch come from it.
"""

import argparse
import json
import shutil
import socket
import sys
from os import cpu_count
from pathlib import Path
from typing import Any

from comfy_client import Prompt, Run
from comfy_server import ComfyServer, ServerFailed, sigterm_as_interrupt
from environment import COMFYUI, ROOT

COMMANDS = ("comfy", "serve")
PACK = {"wan_s2v": ROOT}
SAMPLES = ROOT / "assets"
SAMPLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4")
DEMO_NODE = "WanS2VDemoInputs"
DEMO_OUTPUTS = {"audio": ("LoadAudio", 0), "image": ("LoadImage", 1)}
"""ComfyUI's loader that can stand for an output of the demo node."""


class DemoError(Exception):
    """A reason to stop that is told in one line."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev/run.py")
    commands = parser.add_subparsers(dest="command", required=True)
    comfy = commands.add_parser("comfy", help="make a video with a workflow in a real ComfyUI, and stop it again")
    comfy.add_argument("--audio", type=existing_file, help="your voice recording, for the workflow's own")
    comfy.add_argument("--image", type=existing_file, help="your picture, for the workflow's own")
    comfy.add_argument("--save_file", type=Path, default=Path("demo.mp4"), help="where the video goes [%(default)s]")
    comfy.add_argument(
        "--workflow",
        type=Path,
        default=ROOT / "workflows" / "api" / "demo.json",
        help="a workflow saved with Export (API) [workflows/api/demo.json]",
    )
    serve = commands.add_parser("serve", help="ComfyUI with these nodes, to try in a browser until Ctrl-C")
    serve.add_argument("--port", type=int, default=8188, help="[%(default)s]")
    serve.add_argument("--output", type=Path, default=Path("output-comfy"), help="folder for results [%(default)s]")
    parsed = parser.parse_args(arguments)
    if parsed.command == "comfy" and not parsed.workflow.is_file():
        comfy.error(f"--workflow {parsed.workflow} is not there. Give the path of a workflow saved with Export (API).")
    return parsed


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not there. Give the path of a file.")
    return Path(text)


class ProgressLine:
    """One line that tells how far the running node is; in a file rather than a terminal, one line per tenth."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.shown: tuple[str, int] | None = None
        self.width = 0

    def show(self, kind: str, data: dict[str, Any], run: Run) -> None:
        """Called for every message about a run."""
        step, total = run.step(run.running) or (0, 0)
        percent = int(100 * step / total) if total else 0
        state = (run.running, percent if self.on_terminal else percent // 10)
        if not run.running or state == self.shown:
            return
        self.shown = state
        progress = f": step {step:g} of {total:g}, {percent}%" if total else ""
        self._write(run.title(run.running) + progress)

    def end(self) -> None:
        if self.on_terminal and self.width:
            print(file=sys.stderr)

    def _write(self, text: str) -> None:
        if self.on_terminal:
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)


def comfy(options: argparse.Namespace) -> int:
    prompt = load_prompt(options.workflow)
    own = {name: file for name in ("audio", "image") if (file := getattr(options, name))}
    for name, file in own.items():
        use_file(prompt, name, f"own_{name}{file.suffix}")
    with new_server(threads=min(4, cpu_count() or 1)) as server:
        check_pack(server)
        upload_samples(server, prompt)
        for name, file in own.items():
            server.client.upload(file, f"own_{name}{file.suffix}")
        video = run_to_video(server, prompt)
        options.save_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(video, options.save_file)
    print(describe(options.save_file))
    print(options.save_file)
    return 0


def serve(options: argparse.Namespace) -> int:
    check_port(options.port)
    with new_server(output=options.output, port=options.port) as server:
        check_pack(server)
        for file in samples():
            server.client.upload(file)
        print(f"ComfyUI with Wan S2V: {server.client.url}")
        print(f"Results go to {server.output}. Ctrl-C stops it; export workflows that you want to keep.", flush=True)
        code = server.process.wait()
        raise DemoError(f"ComfyUI ended by itself with {code}. It wrote last:\n{server.log(40)}")


def new_server(threads: int | None = None, **options: Any) -> ComfyServer:
    import torch

    arguments = () if torch.cuda.is_available() else ("--cpu",)
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    print("starting ComfyUI", file=sys.stderr)
    return ComfyServer(COMFYUI, PACK, arguments=arguments, environment=variables, **options)


def check_pack(server: ComfyServer) -> None:
    if problems := server.import_problems():
        raise DemoError(f"ComfyUI could not load everything: {problems[0]}\n{server.log(40)}")


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(f"port {port} cannot be used: {error.strerror}. Pick another with --port.") from None


def load_prompt(path: Path) -> Prompt:
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"{path} is not JSON: {error}. Save the workflow again with Export (API).") from None
    nodes = prompt.values() if isinstance(prompt, dict) else [prompt]
    if not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise DemoError(f"{path} is not a workflow in API format. Save it with Export (API) in ComfyUI's menu.")
    return prompt


def samples() -> list[Path]:
    """The pictures and voices that come with the pack."""
    return sorted(file for file in SAMPLES.rglob("*") if file.suffix.lower() in SAMPLE_SUFFIXES)


def upload_samples(server: ComfyServer, prompt: Prompt) -> None:
    """Upload those of the pack's pictures and voices that the workflow names."""
    named = {value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)}
    for file in samples():
        if file.name in named:
            server.client.upload(file)


def use_file(prompt: Prompt, name: str, file: str) -> None:
    """Let the workflow load `file`: in its one loader of such files, or instead of the pack's voice or picture."""
    loaders = [node for node in prompt.values() if isinstance(node["inputs"].get(name), str)]
    demos = [key for key, node in prompt.items() if node["class_type"] == DEMO_NODE]
    if len(loaders) == 1:
        loaders[0]["inputs"][name] = file
    elif len(demos) == 1 and not loaders:
        loader, output = DEMO_OUTPUTS[name]
        redirect(prompt, [demos[0], output], [f"own_{name}", 0])
        prompt[f"own_{name}"] = {"class_type": loader, "inputs": {name: file}}
    else:
        raise DemoError(f"the workflow loads '{name}' from a file in {len(loaders)} nodes. --{name} needs exactly one.")


def redirect(prompt: Prompt, old: list, new: list) -> None:
    """Link to `new` what was linked to `old`; each is a node and the number of its output."""
    for node in prompt.values():
        node["inputs"] = {name: new if value == old else value for name, value in node["inputs"].items()}


def run_to_video(server: ComfyServer, prompt: Prompt) -> Path:
    """Run the workflow with a progress line, and give the video it made last."""
    line = ProgressLine()
    try:
        run = server.client.run(prompt, timeout=float("inf"), on_event=line.show)
    finally:
        line.end()
    if run.status != "success" or run.node_errors:
        raise DemoError(reason(run, server))
    videos = server.videos(run)
    if not videos:
        raise DemoError("the workflow has made no video. It needs an output node such as Save Video.")
    return videos[-1]


def reason(run: Run, server: ComfyServer) -> str:
    """Why a run did not succeed."""
    refused = [
        f"{run.title(node)} (node {node}): {error['message']}: {error['details']}"
        for node, entry in run.node_errors.items()
        for error in entry["errors"]
    ]
    if refused:
        return one_line("; ".join(refused))
    if run.status == "connection_lost":
        return f"ComfyUI ended in the middle of the work. It wrote last:\n{server.log(40)}"
    if not run.errors:
        return f"the workflow was {run.status}"
    error = run.errors[-1]
    where = f"{run.title(error['node_id'])} (node {error['node_id']}): " if "node_id" in error else ""
    return one_line(f"{where}{error['exception_type']}: {error['exception_message']}")


def one_line(text: str) -> str:
    return " ".join(text.split())


def describe(video: Path) -> str:
    """Frames, frame rate, size and seconds of sound of a video file, counted by decoding it."""
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        facts = f"{float(stream.average_rate):g} fps, {stream.width}x{stream.height}, {stream.codec_context.name}"
        frames = sum(1 for _ in container.decode(stream))
    with av.open(str(video)) as container:
        if not container.streams.audio:
            return f"{frames} frames, {facts}, no sound"
        stream = container.streams.audio[0]
        seconds = sum(frame.samples for frame in container.decode(stream)) / stream.rate
    return f"{frames} frames, {facts}, {seconds:.2f} s of sound, {stream.codec_context.name}"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    sigterm_as_interrupt()
    try:
        return comfy(options) if options.command == "comfy" else serve(options)
    except (DemoError, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0 if options.command == "serve" else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
