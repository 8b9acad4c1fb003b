"""What is asked, and how answers are read. Texts are data: they are quoted as they are, one a line, cut where long."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from cosae.browse.explain.endpoint import Messages

MOST_CHARACTERS = 2000
"""Of a text in a question."""
OPEN, CLOSE = "<<", ">>"

EXPLAIN = (
    "You study a feature of a language model: a detector that fires on some tokens. Below are texts in which it fires; "
    f"the tokens on which it fires are marked {OPEN}like this{CLOSE}. Say in one short sentence what the feature fires "
    "on: what the marked tokens, or what comes before them, have in common. Be as specific as the texts allow. "
    "Do not list tokens without saying what they have in common. Your answer must end with a line "
    "EXPLANATION: and the sentence."
)
DETECT = (
    "A feature of a language model fires on some texts and not on others. You are told what it is said to fire on, and "
    "given {n} texts. For each text decide whether the feature fires somewhere in it. Answer with nothing but a JSON "
    "list of {n} numbers, 1 for yes and 0 for no, such as {example}."
)
FUZZ = (
    "A feature of a language model fires on some tokens. You are told what it is said to fire on, and given {n} "
    f"texts in each of which some tokens are marked {OPEN}like this{CLOSE}. For each text decide whether the feature "
    "fires on the tokens that are marked: in some texts other tokens are. Answer with nothing but a JSON list of {n} "
    "numbers, 1 for yes and 0 for no, such as {example}."
)
AGAIN = "That could not be read. Answer with nothing but a JSON list of {n} numbers, each 0 or 1."
AGAIN_EXPLAIN = "That could not be read. Answer with one line: EXPLANATION: and what the feature fires on."


def explain(texts: Sequence[str]) -> Messages:
    """The question for an explanation, from marked texts."""
    return [{"role": "system", "content": EXPLAIN}, {"role": "user", "content": _numbered(texts)}]


def judge(kind: str, explanation: str, texts: Sequence[str]) -> Messages:
    """The question of detection or fuzzing."""
    n = len(texts)
    example = json.dumps([i % 2 for i in range(1, n + 1)])
    said = (DETECT if kind == "detection" else FUZZ).format(n=n, example=example)
    question = (
        f"The feature is said to fire on: {' '.join(explanation.split())[:MOST_CHARACTERS]}\n\n{_numbered(texts)}"
    )
    return [{"role": "system", "content": said}, {"role": "user", "content": question}]


def again(messages: Messages, answer: str | None, words: str) -> Messages:
    """The same question, with the answer that could not be read, once more."""
    return [*messages, {"role": "assistant", "content": answer or "…"}, {"role": "user", "content": words}]


def read_explanation(answer: str | None) -> str | None:
    """The last EXPLANATION line, else the only line there is; None where there is neither."""
    if answer is None:
        return None
    marked = re.findall(r"EXPLANATION\W*[:：]\W*(\S[^\n]*)", answer, re.IGNORECASE)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    bare = lines[0] if len(lines) == 1 and "EXPLANATION" not in lines[0].upper() else ""
    found = marked[-1] if marked else bare
    found = found.strip().strip("*_\"'` ")
    return found[:500] or None


def read_judgements(answer: str | None, n: int) -> list[int] | None:
    """n numbers 0 or 1 of the last list in the answer; None where it is no such list."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", answer or "")):
        try:
            listed = json.loads(found)
        except ValueError:
            continue
        if len(listed) == n and all(type(one) in (int, bool) and one in (0, 1) for one in listed):
            return [int(one) for one in listed]
        return None
    return None


def _numbered(texts: Sequence[str]) -> str:
    quoted = (json.dumps(text[:MOST_CHARACTERS], ensure_ascii=False) for text in texts)
    return "\n".join(f"{i}. {text}" for i, text in enumerate(quoted, 1))


def marked(spelled: Sequence[str], on: Sequence[bool]) -> str:
    """Tokens as text, runs of those that are on between marks."""
    parts: list[str] = []
    before = False
    for text, now in zip(spelled, on, strict=True):
        if now != before:
            parts.append(OPEN if now else CLOSE)
        parts.append(text)
        before = now
    return "".join(parts) + (CLOSE if before else "")
