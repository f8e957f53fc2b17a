"""The server run: a folder, an address, and the token that is printed once."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import uvicorn

from lora_ft.errors import LoraFtError
from lora_ft.serve import access, app
from lora_ft.serve.state import State
from lora_ft.system import locks

log = logging.getLogger(__name__)


def serve(
    home: Path, host: str, port: int, *, new_token: bool, results_base64: bool, say: Callable[[str], None] = print
) -> None:
    """Serves a folder until it is told to stop by SIGINT or SIGTERM.

    Args:
        new_token: make another token; the one before is worth nothing then.
        results_base64: hand result files out in base64, as the hosted service does.
        say: what prints the address and, the first time, the token.

    Raises:
        BusyError: another server serves the folder. LoraFtError: nothing can listen on the address.
    """
    with locks.run_folder(home):
        server = State.of(home, max(1, torch.cuda.device_count()), results_base64)
        known = server.store.get(access.KEY) is not None
        listening = _listening(host, port)
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{port}/v1 is ready for OpenAI's client; the page is http://{shown}:{port}/")
        if new_token or not known:
            # Not through the redaction that all else goes through: this is the one time it is seen.
            say(f"OPENAI_API_KEY={access.make_token(server.store)}")
            say("That is the server's token, which is not shown again; --new-token makes another.")
        if not access.is_loopback(host):
            log.warning("%s is reached from other machines: whoever has the token may use this one", host)
        config = uvicorn.Config(
            app.create(server, host), log_level="warning", access_log=False, timeout_graceful_shutdown=5,
            server_header=False, lifespan="on",
        )  # fmt: skip
        # uvicorn raises the signal that ended it again, once all is saved; for a server that is how it ends.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        # From here on connections wait, so that what was told to be ready is.
        made.listen(128)
    except OSError as error:
        made.close()
        told = f"{host}:{port} cannot be listened on: {error.strerror or error}: choose another --host or --port."
        raise LoraFtError(told) from None
    return made
