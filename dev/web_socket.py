"""A WebSocket client with what a local ComfyUI needs of RFC 6455: no extensions, no TLS."""

import base64
import contextlib
import os
import socket
import struct
import time

CONTINUATION, TEXT, CLOSE, PING, PONG = 0, 1, 8, 9, 10


class WebSocketClosed(Exception):
    """The other side has closed the connection, or refused it."""


class WebSocket:
    def __init__(self, host: str, port: int, path: str):
        self.socket = socket.create_connection((host, port), timeout=10)
        self.buffer = b""
        self.parts: list[bytes] = []
        self.kind = TEXT
        self._shake_hands(host, port, path)

    def receive(self, timeout: float) -> str | bytes:
        """The next text or binary message.

        Raises:
            TimeoutError: if it takes longer; nothing is lost, the next call goes on.
            WebSocketClosed: if no message can come any more.
        """
        deadline = time.monotonic() + timeout
        while True:
            is_last, kind, payload = self._frame(deadline)
            if kind == CLOSE:
                raise WebSocketClosed("the server has ended the connection")
            if kind == PING:
                self._send(PONG, payload)
            if kind >= CLOSE:
                continue
            if kind != CONTINUATION:
                self.kind, self.parts = kind, []
            self.parts.append(payload)
            if is_last:
                message = b"".join(self.parts)
                return message.decode() if self.kind == TEXT else message

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed already
            self._send(CLOSE, b"")
        self.socket.close()

    def _shake_hands(self, host: str, port: int, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {path} HTTP/1.1",
            f"Host: {host}:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self.socket.sendall("\r\n".join((*lines, "", "")).encode())
        deadline = time.monotonic() + 10
        while b"\r\n\r\n" not in self.buffer:
            self._fill(len(self.buffer) + 1, deadline)
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        status = head.split(b"\r\n", 1)[0]
        if status.split(b" ")[1:2] != [b"101"]:
            raise WebSocketClosed(f"the server refused a WebSocket: {status.decode(errors='replace')}")

    def _fill(self, size: int, deadline: float) -> None:
        """Have at least `size` bytes in the buffer."""
        while len(self.buffer) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            received = self.socket.recv(65536)
            if not received:
                raise WebSocketClosed("the server is gone")
            self.buffer += received

    def _frame(self, deadline: float) -> tuple[bool, int, bytes]:
        """One frame: is it the last of its message, its kind, its payload. Takes a whole one or nothing."""
        self._fill(2, deadline)
        first, size, start = self.buffer[0], self.buffer[1] & 0x7F, 2
        for marker, code, width in ((126, ">H", 2), (127, ">Q", 8)):
            if size == marker:
                start += width
                self._fill(start, deadline)
                size = struct.unpack(code, self.buffer[2:start])[0]
                break
        self._fill(start + size, deadline)
        payload, self.buffer = self.buffer[start : start + size], self.buffer[start + size :]
        return bool(first & 0x80), first & 0x0F, payload

    def _send(self, kind: int, payload: bytes) -> None:
        """Send a control frame, which is at most 125 bytes long."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 | kind, 0x80 | len(payload)]) + mask + masked)
