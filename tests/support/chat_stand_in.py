"""A stand-in for an OpenAI-compatible endpoint on loopback, which misbehaves as it is told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[list[dict[str, str]]], str | None]


class Stand:
    """reply: what it answers; trouble: what it does instead, question by question, then no more: a status, "truncated",
    "slow", "empty" (no choices). leaves_out: an answer that is none has no content, rather than null. asked, headers:
    of all questions."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.trouble, self.lock = reply, list[Any](), threading.Lock()
        self.leaves_out = False
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        with self.lock:
            now = self.trouble.pop(0) if self.trouble else None
        if isinstance(now, int):
            return now, b'{"error": {"message": "not now"}}', {"Retry-After": "3"} if now == 429 else {}
        if now == "slow":
            time.sleep(0.6)
        if now == "empty":
            return 200, b'{"choices": []}', {}
        content = self.reply(body["messages"])
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        message = {"role": "assistant", "content": content}
        if content is None and self.leaves_out:
            del message["content"]
        whole = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
        return 200, whole[: len(whole) // 2] if now == "truncated" else whole, {}


@contextmanager
def standing(reply: Reply) -> Iterator[Stand]:
    """The stand-in at `stand.url`, until the block ends."""
    stand = Stand(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stand.lock:
                stand.asked.append({**body, "path": self.path})
                stand.headers.append(dict(self.headers))
            status, content, more = stand.answer(body)
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **more}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stand.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stand
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def numbered(messages: list[dict[str, str]]) -> list[str]:
    """The texts of the last question that has any."""
    asked = next(one["content"] for one in reversed(messages) if one["role"] == "user" and "\n" in one["content"])
    return [json.loads(line) for line in re.findall(r"^\d+\. (\".*\")$", asked, re.MULTILINE)]


def is_judgement(messages: list[dict[str, str]]) -> bool:
    return "JSON list" in messages[0]["content"]
