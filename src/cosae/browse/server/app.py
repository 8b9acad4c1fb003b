"""The browser's pages and data over HTTP: a starlette application on one store.

    /features.html?sae=…     the page, the same for every store; its script asks for
    /data/table?sae=…        plain values, as JSON

A mistake in a request is answered by one sentence in {"error": …}. No word of a request becomes the name of a file.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cosae.browse.server import views
from cosae.browse.server.guard import MOST_BYTES, Guard
from cosae.browse.server.live import Live
from cosae.browse.server.notes import Note, NoteConflictError, Notes
from cosae.browse.server.shell import ASSETS, PAGES, asset, render
from cosae.browse.store.reader import FeatureStore
from cosae.errors import CosaeError

KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MOST_ROWS = 500


class Data:
    """What the pages ask for, by name; each takes the words of an address and returns plain values."""

    def __init__(self, store: FeatureStore, notes: Notes, live: Live | None) -> None:
        self.store, self.notes, self.live = store, notes, live

    def prepare(self) -> None:
        """Read what every first request needs, so that none of them waits for it."""
        self.about({})
        for info in reversed(self.store.saes):
            self.table({"sae": info.name})
            self.feature({"sae": info.name, "id": "0"})

    def about(self, given: Mapping[str, str]) -> Any:
        """The overview, with all notes: explanations may have come in the meantime."""
        return views.about(self.store) | {"live": self.live is not None, "notes": self.notes.exported()["notes"]}

    def table(self, given: Mapping[str, str]) -> Any:
        """Rows of a page of the table, each with its note."""
        sae = _word(given, "sae")
        asked: dict[str, Any] = {
            "sort": given.get("sort") or "density",
            "descending": given.get("order", "down") != "up",
            "filters": _filters(given),
            "search": given.get("q") or None,
            "search_in": given.get("in") or "any",
            "offset": _whole(given, "offset", 0),
            "limit": min(_whole(given, "limit", 50), MOST_ROWS),
        }
        found = self.store.table(sae, **asked)
        notes = {note.feature: note for note in self.notes.every(sae)}
        rows = [views.row(self.store, row) | _note_of(notes.get(row.id)) for row in found.rows]
        return {"rows": rows, "total": found.total, "offset": found.offset}

    def scatter(self, given: Mapping[str, str]) -> Any:
        """Two columns of numbers, of every feature."""
        columns = self.store.columns(_word(given, "sae"))
        names = given.get("x") or "density", given.get("y") or "norm_driven"
        for name in names:
            if name not in columns:
                raise CosaeError(f"a scatter is of {', '.join(columns)}. Got {name!r} instead.")
        x_F, y_F = (columns[name] for name in names)
        return {"x": _short(x_F), "y": _short(y_F)}

    def feature(self, given: Mapping[str, str]) -> Any:
        """One feature, with its note."""
        sae, id = _word(given, "sae"), _whole(given, "id")
        found = views.feature(self.store, self.store.feature(sae, id))
        return found | {"note": _plain_note(self.notes.of(sae, id))}

    def compare(self, given: Mapping[str, str]) -> Any:
        """Two SAEs."""
        return views.sae_comparison(self.store, self.store.compare_saes(_word(given, "a"), _word(given, "b")))

    def exported(self, given: Mapping[str, str]) -> Any:
        """All notes, to keep."""
        return self.notes.exported()

    def note(self, given: Mapping[str, Any]) -> Any:
        """Write a note."""
        sae, id = _text(given, "sae"), given.get("feature")
        if not isinstance(id, int) or isinstance(id, bool):
            raise CosaeError(f"feature must be a whole number. Got {id!r} instead.")
        if not 0 <= id < self.store.sae(sae).d_sae:
            raise CosaeError(f"feature {id} is out of range: {sae} has {self.store.sae(sae).d_sae:,} features.")
        tags, version = given.get("tags", []), given.get("version", 0)
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise CosaeError("tags must be a list of texts.")
        if not isinstance(version, int):
            raise CosaeError("version must be a whole number.")
        cleaned = tuple(tag.strip() for tag in tags if tag.strip())
        note = Note(sae, id, _text(given, "note"), cleaned, bool(given.get("bookmark")), version)
        return _plain_note(self.notes.write(note))

    def activations(self, given: Mapping[str, Any]) -> Any:
        """Run the model on a text."""
        return views.plain(self._live().activations(_text(given, "text")))

    def steer(self, given: Mapping[str, Any]) -> Any:
        """Let the model go on from a text, without and with a change to a feature."""
        return views.plain(self._live().steer(given))

    def _live(self) -> Live:
        if self.live is None:
            raise CosaeError("no model is at hand: start cosae browse with the SAE's own model to try a text.")
        return self.live


EXPORT = "notes.json"
STOP_SECONDS = 0.1
"""How often who waits for the model looks whether the server is stopping."""
READERS = 1
"""Threads that read the store: each keeps memory of its own."""
READ, WRITE = ("about", "table", "scatter", "feature", "compare"), ("note", "activations", "steer")


def application(
    store: FeatureStore,
    notes: Notes,
    live: Live | None = None,
    host: str = "127.0.0.1",
    stopping: threading.Event | None = None,
) -> ASGIApp:
    """The whole site, guarded. stopping: set when the server ends; who waits for the model then waits no longer."""
    stopping = threading.Event() if stopping is None else stopping
    data = Data(store, notes, live)
    data.prepare()
    title = ", ".join(info.name for info in store.saes)
    html = {page: render(page, title, live=True) for page in PAGES}

    few = ThreadPoolExecutor(READERS, "cosae browse")

    async def page(request: Request) -> Response:
        name = request.path_params.get("page", "index")
        return HTMLResponse(html[name]) if name in html else _error(404, "There is no such page.")

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            return _error(404, "There is no such file.")
        return Response(asset(name), media_type=KINDS[Path(name).suffix])

    async def read(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (*READ, EXPORT):
            return _error(404, "There are no such data.")
        call = data.exported if name == EXPORT else getattr(data, name)
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(few, _answered, call, request.query_params)
        if name == EXPORT:
            answer.headers["Content-Disposition"] = f'attachment; filename="{EXPORT}"'
        return answer

    async def write(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in WRITE:
            return _error(404, "There is nothing to write to.")
        body = await request.body()
        if len(body) > MOST_BYTES:
            return _error(413, f"What is sent may have at most {MOST_BYTES:,} bytes.")
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            return _error(400, "What is sent must be JSON.")
        if not isinstance(given, dict):
            return _error(400, "What is sent must be a JSON object.")
        return await _aside(getattr(data, name), given, stopping)

    routes = [
        Route("/", page),
        Route("/{page}.html", page),
        Route("/assets/{name}", file),
        Route("/data/{name}", read, methods=["GET"]),
        Route("/data/{name}", write, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), host)


def _answered(call: Callable[[Any], Any], given: Mapping[str, Any]) -> Response:
    try:
        return JSONResponse(call(given))
    except NoteConflictError as error:
        return JSONResponse({"error": str(error), "note": _plain_note(error.found)}, 409)
    except CosaeError as error:
        return _error(400, str(error))


async def _aside(call: Callable[[Any], Any], given: Mapping[str, Any], stopping: threading.Event) -> Response:
    """The answer, made in a thread that does not keep the server from stopping: a model may take long."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Response] = loop.create_future()

    def work() -> None:
        try:
            made = _answered(call, given)
        except BaseException as error:
            _tell(answer.set_exception, error)
        else:
            _tell(answer.set_result, made)

    def _tell(what: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(lambda: None if answer.done() else what(value))

    threading.Thread(target=work, name="cosae browse", daemon=True).start()
    while not (await asyncio.wait({answer}, timeout=STOP_SECONDS))[0]:
        if stopping.is_set():
            return _error(503, "The server is stopping.")
    return answer.result()


def _error(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence[:1].upper() + sentence[1:]}, status)


def _word(given: Mapping[str, str], name: str) -> str:
    if not given.get(name):
        raise CosaeError(f"{name} is missing.")
    return given[name]


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        raise CosaeError(f"{name} must be text. Got {str(value)[:80]!r} instead.")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise CosaeError(f"{name} holds half a character: type it again.")
    return value


def _whole(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "")
    if text == "" and default is not None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise CosaeError(f"{name} must be a whole number of at least 0. Got {text[:40]!r} instead.")
    return int(text)


def _filters(given: Mapping[str, str]) -> dict[str, Any]:
    """least_density=0.01, most_density=0.1, dead=yes, matched=no, …"""
    found: dict[str, Any] = {}
    for name, text in given.items():
        side, _, column = name.partition("_")
        if side in ("least", "most") and column and text:
            try:
                bound = float(text)
            except ValueError:
                raise CosaeError(f"{name} must be a number. Got {text[:40]!r} instead.") from None
            least, most = found.get(column, (None, None))
            found[column] = (bound, most) if side == "least" else (least, bound)
        elif name in ("dead", "matched_any", "explained") and text in ("yes", "no"):
            found[name] = text == "yes"
    return found


def _short(value_F: Any) -> list[float | None]:
    """Numbers to four digits, which are enough to draw; None where there is none."""
    return [float(f"{value:.4g}") if value == value else None for value in value_F.tolist()]


def _note_of(note: Note | None) -> dict[str, Any]:
    return {"bookmark": bool(note and note.bookmark), "tags": list(note.tags) if note else []}


def _plain_note(note: Note) -> dict[str, Any]:
    return {name: getattr(note, name) for name in ("note", "tags", "bookmark", "version", "changed")}
