"""Serving a store on this machine until Ctrl-C."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosae.browse.server.live import Live
from cosae.browse.server.notes import Notes
from cosae.browse.store.reader import FeatureStore
from cosae.errors import CosaeError

PORT = 8321
SECONDS_TO_END = 1.0


def serve(
    store: FeatureStore,
    host: str = "127.0.0.1",
    port: int = PORT,
    open_browser: bool = False,
    live: Live | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Serve the pages of a store; returns after Ctrl-C or SIGTERM. port 0: any free one. live: a model to try texts on,
    which may still work in a thread of its own when this returns, SECONDS_TO_END after it was told to stop.

    Raises CosaeError where the address cannot be had, and without the extra `browse`.
    """
    try:
        import uvicorn

        from cosae.browse.server.app import application
    except ImportError:
        raise CosaeError('serving needs starlette and uvicorn: pip install "cosae[browse]".') from None

    with listening(host, port) as listener:
        stopping = threading.Event()
        app = application(store, Notes(notes_file(store.folder)), live, host, stopping)
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}/"
        options: dict[str, Any] = {"log_level": "warning", "lifespan": "off", "server_header": False}
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **options))
        exit_of = server.handle_exit

        def handle_exit(*signalled: Any) -> None:
            stopping.set()
            if live is not None:
                live.stop()  # a model that goes on would keep the server
            exit_of(*signalled)

        server.handle_exit = handle_exit  # type: ignore[method-assign, assignment]
        log(f"Browse at {address} (Ctrl-C stops)")
        if open_browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):  # uvicorn has stopped by then, and raises the signal again
            server.run(sockets=[listener])
        log("Stopped.")
        if live is not None:
            live.stop(SECONDS_TO_END)


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises CosaeError where it cannot be had."""
    if not 0 <= port <= 65535:
        raise CosaeError(f"a port is a number from 0 (any free one) to 65535. Got {port} instead.")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise CosaeError(f"{host!r} is no address of this machine: leave out --host, or give 127.0.0.1.") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise CosaeError(
            f"port {port} of {host} cannot be had ({error.strerror}): another program may use it; choose another with "
            "--port, or --port 0 for any free one."
        ) from None
    return listener


def notes_file(folder: Path) -> Path:
    """Where the notes of a store lie: beside it, so that a store built anew keeps them."""
    return folder.with_name(f"{folder.name}.notes.sqlite")
