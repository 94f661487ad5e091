#!/usr/bin/env python3
"""Talking videos from a running ComfyUI that has Wan S2V: recordings and a picture go there, videos come back.

    python3 api_client.py --image face.png --audio talk.wav              one video: talk.mp4
    python3 api_client.py --image face.png --folder talks --out videos   one for each recording of a folder

Needs Python 3.10 or newer and nothing else; this file and api/talking_video.json are all there is to copy. It is meant
to be read and changed. What it does, for one recording:

 1. POST /upload/image   puts a file into ComfyUI's input folder (sounds too) and answers with its name there
 2. POST /prompt         queues the workflow, with our files and settings filled in, and answers with an id
 3. GET  /history/ID     stays empty until the run has ended, then tells its outputs, or what went wrong
    GET  /queue          tells until then whether it waits or runs
 4. GET  /view           gives the file that an output names

Videos that are there already are left alone, so a folder can be run again after an error. Ctrl-C takes what was queued
back. Exit code: 0 all videos are there, 1 some failed (one line each, on stderr), 2 wrong usage.
"""

import argparse
import contextlib
import copy
import http.client
import json
import mimetypes
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

WORKFLOW = Path(__file__).with_name("api") / "talking_video.json"
SOUNDS = (".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".wma")
VIDEOS = (".mp4", ".webm", ".mkv")
POLL_SECONDS = 1.0
PATIENCE = 5
"""Polls in a row that may go without an answer, or without a trace of the run."""

NETWORK_ERRORS = (OSError, http.client.HTTPException)
"""Refused, unknown host, timeout, connection lost, or an answer that is none."""

Prompt = dict[str, dict[str, Any]]


class Failed(Exception):
    """A video could not be made; the text is one line."""


class Unreachable(Failed):
    """Nobody answers, so the other recordings need not be tried."""


class ComfyUI:
    """The few addresses of ComfyUI that are needed."""

    def __init__(self, address: str):
        self.address = address.rstrip("/") if "://" in address else f"http://{address}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # most run on this machine or near

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """What the server answers to a GET, or to a POST where there is a body.

        Raises:
            Failed: if it refuses.
            Unreachable: if it does not answer.
        """
        try:
            with self.open(path, body, kind) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Failed(refusal(error)) from None
        except NETWORK_ERRORS as error:
            why = one_line(str(getattr(error, "reason", error)) or type(error).__name__)
            raise Unreachable(
                f"no answer from {self.address} ({why}). Is ComfyUI running there? See --server"
            ) from None

    def open(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body is not None else {})
        return self.opener.open(request, timeout=60)

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def post(self, path: str, value: Any) -> bytes:
        return self.request(path, json.dumps(value).encode())

    def upload(self, file: Path) -> str:
        """Put a file into the input folder -> the name that Load Audio and Load Image know it by.

        A file of that name with other contents stays; ours gets a number then. Equal ones are kept once.
        """
        name = re.sub(r'["\\\x00-\x1f]', "_", file.name)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = f"{head}Content-Type: {kind}\r\n\r\n".encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        saved = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return f"{saved['subfolder']}/{saved['name']}".lstrip("/")

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow in API format -> the id of the run."""
        answer = json.loads(self.post("/prompt", {"prompt": prompt}))
        if refused := node_errors(answer.get("node_errors")):  # ComfyUI runs what is left of the workflow
            self.cancel(answer["prompt_id"])
            raise Failed(refused)
        return answer["prompt_id"]

    def place(self, run: str) -> str:
        """Where a run is: running, waiting with a number of others before it, or empty when it is not queued."""
        queue = self.get("/queue")
        if any(entry[1] == run for entry in queue["queue_running"]):
            return "running"
        number = next((entry[0] for entry in queue["queue_pending"] if entry[1] == run), None)
        if number is None:
            return ""
        before = sum(entry[0] < number for entry in queue["queue_pending"]) + len(queue["queue_running"])
        return f"waiting, {before} before it"

    def cancel(self, run: str) -> None:
        """Take a run back, whether it waits or runs. Others are left alone."""
        self.post("/queue", {"delete": [run]})
        self.post("/interrupt", {"prompt_id": run})

    def wait(self, run: str, title: str) -> dict[str, Any]:
        """Follow a run to its end -> its outputs by node.

        Raises:
            Failed: if it ends in another way than with success.
        """
        told, misses = "", 0
        while True:
            try:
                if entry := self.get(f"/history/{run}").get(run):
                    break
                place = self.place(run)
            except Unreachable:
                place = ""
                if misses == PATIENCE:
                    raise
            misses = 0 if place else misses + 1
            if misses > PATIENCE:
                raise Failed("the run is neither queued nor ended. It was deleted, or ComfyUI has been restarted")
            if place and place != told:
                told = place
                say(f"{title}: {place}")
            time.sleep(POLL_SECONDS)
        if entry["status"]["status_str"] != "success":
            raise Failed(what_went_wrong(entry))
        return entry["outputs"]

    def download(self, entry: dict[str, str], target: Path) -> None:
        """Fetch the file that an output names. The name appears when the file is whole."""
        query = urllib.parse.urlencode({key: entry.get(key, "") for key in ("filename", "subfolder", "type")})
        part = target.with_name(target.name + ".part")
        try:
            with self.open(f"/view?{query}") as answer, part.open("wb") as file:
                shutil.copyfileobj(answer, file)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def refusal(error: urllib.error.HTTPError) -> str:
    """Why the server refused a request: for a workflow, which input of which node."""
    body = error.read().decode(errors="replace")
    try:
        answer = json.loads(body)
        reason = answer.get("error", {})
        text = node_errors(answer.get("node_errors")) or f"{reason.get('message')} {reason.get('details', '')}"
    except (ValueError, AttributeError):
        text = f"HTTP {error.code} {body}"
    return one_line(text)


def node_errors(errors: dict[str, Any] | None) -> str:
    said = [
        f"{node['class_type']}: {error['message']}: {error['details']}"
        for node in (errors or {}).values()
        for error in node["errors"]
    ]
    return one_line("; ".join(said))


def what_went_wrong(entry: dict[str, Any]) -> str:
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return one_line(f"{data['node_type']}: {data['exception_type']}: {data['exception_message']}")
    return "the run was cancelled"


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fill(workflow: Prompt, **inputs: Any) -> Prompt:
    """A workflow with inputs set by their names, each in the one node that has it; None leaves an input as it is."""
    prompt = copy.deepcopy(workflow)
    for name, value in inputs.items():
        nodes = [node for node in prompt.values() if name in node["inputs"] and is_value(node["inputs"][name])]
        if value is None:
            continue
        if len(nodes) != 1:
            raise Failed(f"{len(nodes)} nodes of the workflow have the input {name!r}, exactly one is needed")
        nodes[0]["inputs"][name] = value
    return prompt


def is_value(value: Any) -> bool:
    """Set in the node, not linked: links are [node, output]."""
    return not isinstance(value, list)


def make_video(server: ComfyUI, workflow: Prompt, recording: Path, target: Path) -> None:
    """One recording to one video, with a workflow in which all else is filled in."""
    prompt = fill(workflow, audio=server.upload(recording))
    run = server.queue(prompt)
    try:
        outputs = server.wait(run, recording.name)
    except KeyboardInterrupt:
        with contextlib.suppress(Failed):
            server.cancel(run)
        raise
    files = [file for output in outputs.values() for kind in output.values() for file in kind if is_video(file)]
    if not files:
        raise Failed("the workflow has made no video. It needs an output node such as Wan S2V Save Video")
    target.parent.mkdir(parents=True, exist_ok=True)
    server.download(files[-1], target)


def is_video(file: Any) -> bool:
    return isinstance(file, dict) and str(file.get("filename", "")).lower().endswith(VIDEOS)


def targets(recordings: list[Path], folder: Path) -> dict[Path, Path]:
    """The video of each recording; equal names with other endings are told apart by these."""
    names = Counter(file.stem for file in recordings)
    return {file: folder / f"{file.stem if names[file.stem] == 1 else file.name}.mp4" for file in recordings}


def recordings_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SOUNDS and file.is_file())


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Use width x height, such as 832x480.")
    return int(match[1]), int(match[2])


def existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} is not there.")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--audio", type=existing, metavar="FILE", help="a recording")
    sources.add_argument("--folder", type=existing, metavar="DIR", help="a folder of recordings, one video each")
    parser.add_argument("--image", type=existing, metavar="FILE", required=True, help="who speaks")
    parser.add_argument("--out", type=Path, help="file for --audio [NAME.mp4], folder for --folder [.]")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="[%(default)s]")
    parser.add_argument("--checkpoint", help="as Wan S2V Load Checkpoint names it [Wan2.2-S2V-14B (folder)]")
    parser.add_argument("--prompt", help="what is to be seen")
    parser.add_argument("--steps", type=int, help="per clip [40]")
    parser.add_argument("--guidance_scale", type=float, metavar="SCALE", help="1 turns it off [4.5]")
    parser.add_argument("--size", type=size, metavar="WxH", help="the picture's shape in this area [832x480]")
    parser.add_argument("--seed", type=int, help="another number, another video [0]")
    parser.add_argument("--workflow", type=existing, default=WORKFLOW, help="in API format [api/talking_video.json]")
    options = parser.parse_args(arguments)
    if options.folder and not (options.folder.is_dir() and recordings_in(options.folder)):
        parser.error(f"--folder {options.folder} holds no recording. Known endings: {', '.join(SOUNDS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    server = ComfyUI(options.server)
    if options.folder:
        jobs = targets(recordings_in(options.folder), options.out or Path())
    else:
        jobs = {options.audio: options.out or Path(f"{options.audio.stem}.mp4")}
    try:
        width, height = options.size or (None, None)
        workflow = fill(
            json.loads(options.workflow.read_text(encoding="utf-8")),
            image=server.upload(options.image),
            checkpoint=options.checkpoint,
            prompt=options.prompt,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            width=width,
            height=height,
        )
        failed = 0
        for recording, target in jobs.items():
            if target.exists():
                say(f"{recording.name}: {target} is there already")
                continue
            try:
                make_video(server, workflow, recording, target)
                print(target, flush=True)
            except Unreachable:
                raise
            except (Failed, *NETWORK_ERRORS) as error:  # a download cut short, or a file of ours
                failed += 1
                say(f"error: {recording.name}: {one_line(str(error))}")
    except (Failed, OSError, ValueError) as error:
        say(f"error: {one_line(str(error))}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    if failed:
        say(f"{failed} of {len(jobs)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
