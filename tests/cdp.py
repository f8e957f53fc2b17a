"""A headless Chromium, driven over its DevTools protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program() -> str | None:
    """Returns where a Chromium is, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page, from `with` to the end of the block."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.events: list[dict[str, Any]] = []
        """What the browser told unasked, of what was enabled, in its order."""
        self._next = 0

    def __enter__(self) -> Browser:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [
            str(program()),
            *options,
            "--remote-debugging-port=0",
            f"--user-data-dir={self.profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        port = 0
        for line in self.process.stderr:
            if match := re.search(r"ws://127\.0\.0\.1:(\d+)/", line):
                port = int(match[1])
                break
        self._connect(port)
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Returns what a script gives in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Returns what a script gives, once that is something."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, (script, self.value("document.body.innerText"))
            time.sleep(0.1)
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Returns the result of a command."""
        self._next += 1
        self._send(json.dumps({"id": self._next, "method": method, "params": parameters}).encode())
        while True:
            told = json.loads(self._receive())
            if told.get("id") == self._next:
                assert "error" not in told, told
                return dict(told["result"])
            self.events.append(told)

    def _connect(self, port: int) -> None:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asked.request("GET", "/json/list")
        pages = json.loads(asked.getresponse().read())
        path = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"].partition(f":{port}")[2]
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.socket.recv(1)
        assert b" 101 " in answer.split(b"\r\n")[0]

    def _send(self, data: bytes) -> None:
        mask = os.urandom(4)
        size = len(data)
        length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self.socket.sendall(b"\x81" + length + mask + masked)

    def _receive(self) -> bytes:
        """Returns one whole message."""
        data = b""
        while True:
            first, second = self._exactly(2)
            size = second & 0x7F
            if size >= 126:
                size = struct.unpack(">H" if size == 126 else ">Q", self._exactly(2 if size == 126 else 8))[0]
            data += self._exactly(size)
            if first & 0x80:
                return data

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the browser closed the connection"
            data += more
        return data
