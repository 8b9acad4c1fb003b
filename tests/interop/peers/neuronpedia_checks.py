"""Runs where neuronpedia and sae-dashboard are installed beside what cosae needs: an export, read and sent by the real
packages, to a server on this machine that keeps the limits of Neuronpedia's. Prints one JSON object.

    PYTHONPATH=src python neuronpedia_checks.py EXPORT

sae-dashboard is installed without its dependencies: of it only the module that defines the format is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import files
from pathlib import Path
from typing import Any

KEY = "a key"


class Server(BaseHTTPRequestHandler):
    """Source sets and upload-batch, as far as an upload needs them."""

    sets: dict[str, Any] = {}  # noqa: RUF012
    got: list[Any] = []  # noqa: RUF012
    fail_after: int | None = None

    def do_GET(self) -> None:
        name = self.path.split("/")[-1]
        return self.answer(200, self.sets[name]) if name in self.sets else self.answer(404, {"message": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["X-Api-Key"] != KEY:
            return self.answer(401, {})
        if self.path == "/api/source-set/new":
            sources = [
                {"id": f"{layer}-{body['name']}", "modelId": body["modelId"], "setName": body["name"]}
                for layer in range(4)
            ]
            found = {"name": body["name"], "modelId": body["modelId"], "description": None, "urls": []}
            self.sets[body["name"]] = {**found, "sources": sources}
            return self.answer(200, self.sets[body["name"]])
        assert self.path == "/api/feature/upload-batch"
        if self.fail_after is not None and len(self.got) >= self.fail_after:
            return self.answer(500, {})
        wrong = problems(body)
        if wrong:
            return self.answer(400, {"error": wrong})
        self.got.append(body)
        return self.answer(200, {"ok": True})

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def problems(body: Any) -> list[str]:
    """What Neuronpedia's schema would refuse (ours, from its documented limits)."""
    wrong = []
    if not 1 <= len(body["features"]) <= 128:
        wrong.append("1 to 128 features")
    for feature in body["features"]:
        if not 0 <= feature["density"] <= 1:
            wrong.append("density")
        if not feature["activations"]:
            wrong.append("at least one activation")
        for one in feature["activations"]:
            fraction = one["quantileFraction"]
            if len(one["tokens"]) != len(one["values"]) or len(one["tokens"]) > 1024:
                wrong.append("tokens and values")
            if fraction is not None and not 0 <= fraction <= 1:
                wrong.append("quantileFraction")
        if len(feature["topLogits"]) > 20 or len(feature["bottomLogits"]) > 20:
            wrong.append("logits")
    return wrong


def dashboards(export: Path) -> int:
    """Features that SAEDashboard's own classes read and write back unchanged."""
    (path,) = (f for f in files("sae-dashboard") or [] if f.name == "neuronpedia_dashboard.py")
    spec = importlib.util.spec_from_file_location("neuronpedia_dashboard", str(path.locate()))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["neuronpedia_dashboard"] = module
    spec.loader.exec_module(module)
    n = 0
    for file in sorted(export.glob("batch-*.json")):
        written = json.loads(file.read_text())
        batch = module.NeuronpediaDashboardBatch(**written)
        assert batch.to_dict() == written
        assert list(batch.to_dict()) == list(written)
        assert all(list(a) == list(b) for a, b in zip(batch.to_dict()["features"], written["features"], strict=True))
        n += len(batch.features)
    return n


def main(export: Path) -> dict[str, Any]:
    from neuronpedia.requests.base_request import NPRequest

    from cosae.errors import CosaeError
    from cosae.interop.neuronpedia import upload as neuronpedia_upload

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    NPRequest.BASE_URL = f"http://127.0.0.1:{server.server_port}/api"
    plan = neuronpedia_upload.plan(export)

    def attempt(key: str | None) -> str:
        os.environ.pop("NEURONPEDIA_API_KEY", None)
        if key is not None:
            os.environ["NEURONPEDIA_API_KEY"] = key
        try:
            return neuronpedia_upload.upload(export, plan)
        except CosaeError as error:
            return f"refused: {error}"

    said = {"without a key": attempt(None), "wrong key": attempt("another")}
    Server.fail_after = 1
    said["server error"] = attempt(KEY)
    Server.fail_after = None
    said["again"] = attempt(KEY)
    said["once more"] = attempt(KEY)
    server.shutdown()
    NPRequest.BASE_URL = f"http://127.0.0.1:{server.server_port}/api"
    server.server_close()
    (export / "upload.json").unlink()
    said["unreachable"] = attempt(KEY)
    return {
        "read": dashboards(export),
        "plan": str(plan),
        "said": said,
        "sent": [feature["index"] for batch in Server.got for feature in batch["features"]],
        "batches": [len(batch["features"]) for batch in Server.got],
        "source": sorted({batch["source"] for batch in Server.got}),
        "top": next(one for f in Server.got[0]["features"] for one in f["activations"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
