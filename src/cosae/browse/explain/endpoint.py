"""Where questions are asked: any OpenAI-compatible endpoint, or a chat model in this process.

Both are asked with a list of messages and answer in text; an answer that is none (`content: null`, a refusal) is None.
A key is read from the environment, sent, and never written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from cosae.errors import CosaeError, check_least, check_positive
from cosae.io.untrusted import one_line

Messages = list[dict[str, str]]
KEYS = ("COSAE_EXPLAIN_KEY", "OPENAI_API_KEY")
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each repetition of a question that the server could not take; what it asks for itself goes before."""
LONGEST_WAIT = 120.0
TAKEN_LATER = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
"""HTTP states after which the same question may be taken."""


@dataclass(frozen=True)
class Answer:
    """What came back. text: None where the message has no content; tokens_in, tokens_out: as told, None if not told."""

    text: str | None
    tokens_in: int | None
    tokens_out: int | None


class Chat(Protocol):
    """Whoever answers. model: its name; parallel: questions that may be asked at once."""

    model: str
    parallel: int

    def ask(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Answer:
        """Raises CosaeError where no answer is to be had."""


class Endpoint:
    """An OpenAI-compatible server. Raises CosaeError for an address that is none, and without httpx."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        parallel: int = 4,
        timeout_s: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise CosaeError("asking an endpoint needs httpx: pip install 'cosae[explain]'.") from None
        if not url.startswith(("http://", "https://")):
            raise CosaeError(f"endpoint must be an address such as http://127.0.0.1:8000/v1. Got {url!r} instead.")
        check_least("parallel", parallel, 1)
        check_positive("timeout_s", timeout_s)
        self.model, self.parallel = model, parallel
        self._address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise CosaeError(f"the key in {' or '.join(KEYS)} holds characters that no key has: set it again.")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._httpx, self._sleep = httpx, sleep
        self._client = httpx.Client(headers=headers, timeout=timeout_s, follow_redirects=False)

    def ask(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Answer:
        """Ask until there is an answer: what the server cannot take now is asked again, later each time."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        said = ""
        for wait in (*BACK_OFF, None):
            found, said, asked_wait = self._once(body)
            if found is not None:
                return found
            if wait is not None:
                self._sleep(min(LONGEST_WAIT, wait if asked_wait is None else asked_wait))
        raise CosaeError(f"the endpoint gave no answer after {len(BACK_OFF) + 1} tries ({said}): try again later.")

    def _once(self, body: Mapping[str, Any]) -> tuple[Answer | None, str, float | None]:
        """An answer; or what went wrong, and the seconds that the server asks to wait for."""
        try:
            response = self._client.post(self._address, json=dict(body))
        except self._httpx.HTTPError as error:
            return None, one_line(error, 120) or type(error).__name__, None
        status = response.status_code
        if status in TAKEN_LATER:
            return None, f"status {status}", _seconds(response.headers.get("retry-after"))
        if status != 200:
            told = " ".join(response.text.split())[:200]
            raise CosaeError(f"the endpoint refuses the question (status {status}: {told}): check --model and the key.")
        try:
            return _answer(response.json()), "", None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, "its answer is not whole", None

    def close(self) -> None:
        self._client.close()


def _answer(found: Any) -> Answer:
    message = found["choices"][0]["message"]
    text = message.get("content") if "role" in message else message["content"]  # servers that leave out what is null
    if text is not None and not isinstance(text, str):
        raise TypeError
    used = found.get("usage") or {}
    tokens_in, tokens_out = (used.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, *(count if isinstance(count, int) else None for count in (tokens_in, tokens_out)))


def _seconds(told: str | None) -> float | None:
    """Of a Retry-After header; None where it has none, or a date."""
    try:
        seconds = float(told) if told is not None else -1.0
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e9 else None


class LocalChat:
    """A Hugging Face chat model in this process; questions one at a time. Raises CosaeError for a model without a chat
    template."""

    parallel = 1

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise CosaeError(f"{name} has no chat template, and so answers no questions: name an instruct model.")
        self._model, self._tokenizer, self._lock, self.model = model, tokenizer, Lock(), name
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id if pad is None else pad

    def ask(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Answer:
        """Greedy at temperature 0, else drawn from `seed`. Raises CosaeError for a question that is too long."""
        import torch
        from transformers import GenerationConfig

        with self._lock:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            asked = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self._model.device)
            n = int(asked["input_ids"].shape[1])
            limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
            if limit is not None and n + max_tokens > limit:
                raise CosaeError(f"a question of {n} tokens does not fit the model's {limit}: give fewer --examples.")
            drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
            ends = self._model.generation_config.eos_token_id
            fixed = {"max_new_tokens": max_tokens, "pad_token_id": self._pad, "eos_token_id": ends}
            config = GenerationConfig(**fixed, **drawn)  # type: ignore[no-untyped-call]
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                found = self._model.generate(**asked, generation_config=config)[0, n:]
        return Answer(str(self._tokenizer.decode(found, skip_special_tokens=True)), n, len(found))
