"""Conversations → texts, by the model's own chat template; what the template adds is special.

A conversation is a list of {"role": …, "content": …}. Every token of its text that does not begin in somebody's content
counts as special: role names and the marks around them, the BOS that the template itself writes (no other is added).
"""

from __future__ import annotations

import json
from typing import Any

from cosae.errors import CosaeError
from cosae.io.untrusted import one_line
from cosae.text.pylib import Conversation, Document
from cosae.text.rows import valid_text


def messages_of(value: Any, where: str) -> str:
    """A row's conversation as JSON, which is what a document holds until it is rendered. Raises CosaeError."""
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
        raise CosaeError(
            f'a conversation must be a list of messages {{"role": "user", "content": "…"}}. Got another value at '
            f"{where}: name the column with data.text_field."
        )
    kept = [{"role": str(message.get("role", "user")), "content": valid_text(message["content"])} for message in value]
    return json.dumps(kept, ensure_ascii=False)


def render(document: Document, tokenizer: Any) -> Conversation:
    """The text of a conversation, and where in it somebody speaks. Raises CosaeError for a template that fails."""
    messages = json.loads(document.text)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of its own
        raise CosaeError(
            f"the chat template of {type(tokenizer).__name__} fails on {document.name}: {one_line(error)}."
        ) from None
    spans, cursor = [], 0
    for message in messages:
        content = message["content"].strip()  # templates strip
        start = text.find(content, cursor)
        if content and start >= 0:
            cursor = start + len(content)
            spans.append((start, cursor))
    return Conversation(document.name, text, tuple(spans))
