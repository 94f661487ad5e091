"""Talk to a ComfyUI on this machine: HTTP and WebSocket, with the standard library alone."""

import json
import mimetypes
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from web_socket import WebSocket, WebSocketClosed

Prompt = dict[str, dict[str, Any]]
OnEvent = Callable[[str, dict[str, Any], "Run"], None]
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
"""Binary messages that carry a picture."""
TEXT = 3
"""A binary message that carries a line of text for a node."""
ENDINGS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class HttpError(Exception):
    """The server answered with an error; `answer` is its JSON, or None."""

    def __init__(self, status: int, body: str):
        super().__init__(f"HTTP {status}: {body[:2000]}")
        self.status, self.body = status, body
        try:
            self.answer = json.loads(body)
        except ValueError:
            self.answer = None


def preview_in(message: bytes) -> bytes | None:
    """The file in a binary message: behind its type, and the format or the length of the metadata and those."""
    kind, second = struct.unpack(">II", message[:8])
    return {PREVIEW: message[8:], PREVIEW_WITH_METADATA: message[8 + second :]}.get(kind)


def text_in(message: bytes) -> tuple[str, str] | None:
    """The node and its line of text in a binary message: behind its type and the length of the node's number."""
    kind, length = struct.unpack(">II", message[:8])
    return (message[8 : 8 + length].decode(), message[8 + length :].decode()) if kind == TEXT else None


@dataclass
class Run:
    """What became of one prompt.

    status: success, error, interrupted, rejected (never started), timeout or connection_lost; running until then.
    running: the node that began last.
    progress: (node, value, total) in order, without repeats.
    started: seconds after queueing at which a node began.
    errors: of a failed node (node_id, node_type, exception_type, exception_message, traceback), or of the server.
    node_errors: inputs that were refused, by node; also set when other outputs of the prompt ran.
    previews: pictures of steps, as JPEG files.
    texts: (node, line of text that it showed) in order.
    outputs: what output nodes reported, by node.
    """

    prompt: Prompt
    status: str = "running"
    prompt_id: str = ""
    seconds: float = 0.0
    running: str = ""
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    previews: list[bytes] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def title(self, node: str) -> str:
        """The name of a node as a person knows it."""
        entry = self.prompt.get(node, {})
        return entry.get("_meta", {}).get("title") or entry.get("class_type") or f"node {node}"

    def take(self, kind: str, data: dict[str, Any], seconds: float) -> None:
        """Take in a message about this prompt."""
        self.events[kind] += 1
        if kind == "executing" and data.get("node") is not None:
            self.running = data["node"]
            self.started[self.running] = seconds
        elif kind == "execution_cached":
            self.cached = data.get("nodes", [])
        elif kind == "executed":
            self.outputs[data["node"]] = data.get("output") or {}
        elif kind == "execution_error":
            self.errors.append(data)
        self._take_progress(kind, data)
        self.status = ENDINGS.get(kind, self.status)

    def _take_progress(self, kind: str, data: dict[str, Any]) -> None:
        """ComfyUI's progress bars send both kinds of message, newer API calls only the second."""
        steps = [data] if kind == "progress" else []
        if kind == "progress_state":
            steps = [{**state, "node": node} for node, state in data["nodes"].items() if state["state"] == "running"]
        for step in steps:
            value, total = step["value"], step["max"]
            if value != (self.step(step["node"]) or (0, total))[0]:  # a node's state is 0 of 1 before it says anything
                self.progress.append((step["node"], value, total))

    def step(self, node: str) -> tuple[float, float] | None:
        """How far a node said that it is, and of how much."""
        return next(((value, total) for known, value, total in reversed(self.progress) if known == node), None)


class ComfyClient:
    def __init__(self, port: int, host: str = "127.0.0.1"):
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"
        self.client_id = uuid.uuid4().hex
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy

    def request(self, path: str, data: bytes | None = None, content: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": content} if data is not None else {})
        try:
            with self.opener.open(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise HttpError(error.code, error.read().decode(errors="replace")) from None

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def post(self, path: str, value: Any) -> Any:
        body = self.request(path, json.dumps(value).encode())
        return json.loads(body) if body.strip() else None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def queue(self) -> dict[str, Any]:
        return self.get("/queue")

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What is kept of a prompt that has ended; empty before."""
        return self.get(f"/history/{prompt_id}").get(prompt_id, {})

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop this prompt if it runs, or without an id whatever runs."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The file that an output names; call it with the output's own entry: view(**entry)."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self.request(f"/view?{query}")

    def upload(self, file: Path, name: str | None = None) -> str:
        """Put a picture, sound or video into the input folder -> the name that loader nodes know it by."""
        boundary, name = uuid.uuid4().hex, name or file.name
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        body = b"".join(
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'.encode(),
                f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'.encode(),
                f"Content-Type: {kind}\r\n\r\n".encode(),
                file.read_bytes(),
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return answer["name"]

    def run(
        self,
        prompt: Prompt,
        timeout: float = 600.0,
        on_event: OnEvent | None = None,
        interrupt_on_progress: float | None = None,
    ) -> Run:
        """Queue a prompt in API format and follow it to its end, however it ends.

        Args:
            on_event: called with the kind and data of each message about the prompt, and the run so far.
            interrupt_on_progress: interrupt it once a progress bar stands at this value.
        """
        run, begin = Run(prompt), time.monotonic()
        path = f"/ws?clientId={self.client_id}"
        with closing(WebSocket(self.host, self.port, path)) as messages:  # before queueing, or the first ones are lost
            try:
                answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
            except HttpError as error:
                reject(run, error)
                return run
            run.prompt_id, run.node_errors = answer["prompt_id"], answer.get("node_errors") or {}
            self._follow(run, messages, begin, timeout, on_event, interrupt_on_progress)
        run.seconds = round(time.monotonic() - begin, 3)
        if run.status != "connection_lost":
            self._complete(run)
        return run

    def _follow(
        self,
        run: Run,
        messages: WebSocket,
        begin: float,
        timeout: float,
        on_event: OnEvent | None,
        interrupt_on_progress: float | None,
    ) -> None:
        quiet_since = begin
        while run.status == "running":
            now = time.monotonic()
            if now - begin > timeout:
                self.interrupt(run.prompt_id)
                run.status = "timeout"
                return
            try:
                message = messages.receive(timeout=0.25)
            except TimeoutError:
                if now - quiet_since > 5:  # should the last message have been lost
                    if self.history(run.prompt_id):
                        return
                    quiet_since = now
                continue
            except (WebSocketClosed, OSError) as error:
                run.status = "connection_lost"
                run.errors.append({"exception_type": "connection_lost", "exception_message": str(error)})
                return
            quiet_since = now
            if isinstance(message, bytes):
                if picture := preview_in(message):
                    run.previews.append(picture)
                elif text := text_in(message):
                    run.texts.append(text)
                continue
            kind, data = (decoded := json.loads(message))["type"], decoded.get("data") or {}
            if data.get("prompt_id") != run.prompt_id:
                continue
            run.take(kind, data, round(now - begin, 3))
            if on_event:
                on_event(kind, data, run)
            if interrupt_on_progress is not None and any(step[1] >= interrupt_on_progress for step in run.progress):
                self.interrupt(run.prompt_id)
                interrupt_on_progress = None

    def _complete(self, run: Run) -> None:
        """Add what the history knows, which is written just after the last message: outputs of cached nodes too."""
        for _ in range(40):
            if (entry := self.history(run.prompt_id)) or run.status == "timeout":
                break
            time.sleep(0.05)
        run.outputs |= entry.get("outputs", {})
        if run.status == "running":
            kinds = [message[0] for message in entry.get("status", {}).get("messages", [])]
            run.status = next((ENDINGS[kind] for kind in reversed(kinds) if kind in ENDINGS), "error")


def reject(run: Run, error: HttpError) -> None:
    """Note that the server would not take the prompt."""
    answer = error.answer if isinstance(error.answer, dict) else {}
    reason = answer.get("error", {"type": "server_error", "message": error.body})
    run.status, run.node_errors = "rejected", answer.get("node_errors") or {}
    run.errors.append({"exception_type": reason.get("type"), "exception_message": reason.get("message"), **reason})
