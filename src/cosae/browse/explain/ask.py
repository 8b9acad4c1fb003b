"""Features of the SAEs of a store → explanations by a language model, and how well they tell held-out texts apart.

    feature → material → one question for an explanation → questions of detection and fuzzing, a few texts each
            → balanced accuracy, beside that of another feature's explanation, of a constant one, and of a classifier
              that looks at tokens alone

Every SAE gets the same number of features at the same quantiles of density, drawn with the same seed: differences
between SAEs are paired by them. An answer that cannot be read is asked for again, then counted as failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosae.browse.explain import prompts
from cosae.browse.explain.endpoint import Chat, Messages
from cosae.browse.explain.log import Asked
from cosae.browse.explain.material import Material, Text, material
from cosae.browse.explain.options import ASKED_BASELINES, ExplainOptions
from cosae.browse.explain.score import balanced_accuracy, mean_of, paired, unigram
from cosae.browse.store.explained import write_explanations
from cosae.browse.store.format import EXPLANATIONS
from cosae.browse.store.reader import FeatureStore
from cosae.browse.store.records import Explanation, Row, Score
from cosae.errors import CosaeError
from cosae.io.atomic import write_text, written
from cosae.io.progress import SILENT, Progress

LOG, SUMMARY = "explain.jsonl", "explain.json"
CONSTANT = "any text"
KINDS = ("detection", "fuzzing")
CHARACTERS_PER_TOKEN, EXPLANATION_TOKENS = 3.5, 30
"""Of English, roughly; what an explanation is taken to have where its length is not known yet."""


@dataclass(frozen=True)
class Chosen:
    """One feature with its texts; place: which of the drawn ones it is, the same in all SAEs."""

    sae: str
    id: int
    place: int
    material: Material


@dataclass
class Bill:
    """Questions, and tokens of questions and answers."""

    questions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, messages: Messages, tokens_out: int) -> None:
        self.questions += 1
        self.tokens_in += round(sum(len(one["content"]) for one in messages) / CHARACTERS_PER_TOKEN)
        self.tokens_out += tokens_out

    def cost(self, price_in: float, price_out: float) -> float:
        """At prices of a million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


@dataclass
class Found:
    """What was found: by SAE the explanations, and the summary that explain.json holds."""

    explanations: dict[str, dict[int, Explanation]]
    summary: dict[str, Any] = field(default_factory=dict)


def choose(store: FeatureStore, saes: Sequence[str], options: ExplainOptions, seed: int) -> list[Chosen]:
    """The features, with their texts. Raises CosaeError where none has examples enough."""
    options.check()
    quantile_n = np.random.default_rng(seed).uniform(size=4 * options.n_features)
    found: list[Chosen] = []
    for sae in saes:
        alive = [row.id for row in _rows(store, sae)]
        if options.feature:
            ids = list(options.feature)
        else:
            drawn = (alive[min(int(q * len(alive)), len(alive) - 1)] for q in quantile_n) if alive else iter(())
            ids = list(drawn)
        mine: dict[int, Chosen] = {}
        for place, id in enumerate(ids):
            if id in mine or (not options.feature and len(mine) == options.n_features):
                continue
            texts = material(store, store.feature(sae, id), options.examples, seed)
            if texts is not None:
                mine[id] = Chosen(sae, id, place, texts)
        found += mine.values()
    if not found:
        raise CosaeError("none of these features has examples enough to explain: build the store on more --tokens.")
    return found


def _rows(store: FeatureStore, sae: str) -> list[Row]:
    """Alive features by density."""
    n = store.sae(sae).d_sae
    rows: list[Row] = []
    for offset in range(0, n, 1000):
        rows += store.table(sae, "density", filters={"dead": False}, offset=offset, limit=1000).rows
    return rows


def bill(store: FeatureStore, chosen: Sequence[Chosen], options: ExplainOptions) -> Bill:
    """What it would cost if every answer could be read at once; tokens as of English text."""
    found = Bill()
    words = " ".join(["word"] * EXPLANATION_TOKENS)
    for one in chosen:
        found.add(prompts.explain(_marked(store, one.material.shown)), 2 * EXPLANATION_TOKENS)
        for kind, times in (("detection", 1 + len(_asked(options))), ("fuzzing", 1)):
            for part in _parts(one.material.judged, options.per_question):
                for _ in range(times):
                    found.add(prompts.judge(kind, words, _texts(store, kind, part)), 3 * len(part))
    return found


def explain_features(
    store: FeatureStore,
    chosen: Sequence[Chosen],
    chat: Chat,
    options: ExplainOptions,
    seed: int = 0,
    log: Path | None = None,
    progress: Progress = SILENT,
) -> Found:
    """Ask, score, and write what was found beside the store's features, where earlier explanations of others stay.

    log  the file of questions and answers; by default explain.jsonl in the store. Raises CosaeError where an endpoint
    gives no answer: what was answered is kept, and the same call goes on.
    """
    asked = Asked(store.folder / LOG if log is None else log, chat)
    try:
        asking = _Asking(store, asked, options, seed)
        with progress.phase("explaining", len(chosen), "features"):
            told = asking.each(lambda one: asking.explanation(one), chosen, progress)
        others = _shuffled(chosen, told, seed)
        with progress.phase("judging explanations", len(chosen), "features"):
            scored = asking.each(lambda one: asking.scores(one, told[one.sae, one.id], others), chosen, progress)
    finally:
        asked.close()
    found = Found({sae: {} for sae in dict.fromkeys(one.sae for one in chosen)})
    for one in chosen:
        if (found_one := scored[one.sae, one.id]) is not None:
            found.explanations[one.sae][one.id] = found_one
    found.summary = _summary(store, chosen, found, asked, options, seed)
    with written(store.folder, "make room and give the same command again"):
        for sae, explanations in found.explanations.items():
            path = store.folder / store.folder_of(sae) / EXPLANATIONS
            write_explanations(path, {**store.explanations(sae), **explanations})
        write_text(store.folder / SUMMARY, json.dumps(found.summary, indent=1) + "\n")
    return found


Key = tuple[str, int]


class _Asking:
    """One round of questions on a store."""

    def __init__(self, store: FeatureStore, asked: Asked, options: ExplainOptions, seed: int) -> None:
        self.store, self.asked, self.options, self.seed = store, asked, options, seed

    def each(self, do: Any, chosen: Sequence[Chosen], progress: Progress) -> dict[Key, Any]:
        """Of every feature, several at once where the chat answers several; the first error ends all."""
        found: dict[Key, Any] = {}
        with ThreadPoolExecutor(self.asked.chat.parallel) as pool:
            try:
                for one, value in zip(chosen, pool.map(do, chosen), strict=True):
                    found[one.sae, one.id] = value
                    progress.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _ask(self, messages: Messages, about: dict[str, Any], read: Any, words: str) -> Any:
        """The first answer that can be read; None where none can."""
        options, question = self.options, messages
        for attempt in range(options.retries + 1):
            answer = self.asked.ask(
                question, {**about, "attempt": attempt}, options.max_tokens, options.temperature, self.seed, attempt
            )
            if (found := read(answer)) is not None:
                return found
            question = prompts.again(messages, answer, words)
        return None

    def explanation(self, one: Chosen) -> str | None:
        messages = prompts.explain(_marked(self.store, one.material.shown))
        about = {"sae": one.sae, "feature": one.id, "asked": "explanation"}
        found: str | None = self._ask(messages, about, prompts.read_explanation, prompts.AGAIN_EXPLAIN)
        return found

    def judged(self, one: Chosen, kind: str, explanation: str, what: str) -> Score:
        """Balanced accuracy of the answers on the texts of a feature."""
        said: list[int | None] = []
        for part in _parts(one.material.judged, self.options.per_question):
            n = len(part)
            messages = prompts.judge(kind, explanation, _texts(self.store, kind, part))
            about = {"sae": one.sae, "feature": one.id, "asked": kind, "of": what}
            words = prompts.AGAIN.format(n=n)
            answers = self._ask(messages, about, lambda answer, n=n: prompts.read_judgements(answer, n), words)
            said += [None] * n if answers is None else answers
        return balanced_accuracy([text.positive for text in one.material.judged], said, self.seed)

    def scores(self, one: Chosen, explanation: str | None, others: dict[Key, str]) -> Explanation | None:
        """None where there is no explanation."""
        if explanation is None:
            return None
        baselines: dict[str, Score] = {}
        for name in self.options.baselines:
            if name == "unigram":
                texts = one.material
                said = unigram(texts.shown, texts.silent, texts.judged)
                baselines[name] = balanced_accuracy([text.positive for text in texts.judged], said, self.seed)
            elif (words := CONSTANT if name == "constant" else others.get((one.sae, one.id))) is not None:
                baselines[name] = self.judged(one, "detection", words, name)
        detection, fuzzing = (self.judged(one, kind, explanation, "explanation") for kind in KINDS)
        return Explanation(explanation, self.asked.chat.model, detection, fuzzing, baselines)


def _shuffled(chosen: Sequence[Chosen], told: dict[Key, str | None], seed: int) -> dict[Key, str]:
    """The explanation of another feature of the same SAE for each: the next one in a drawn order."""
    found: dict[Key, str] = {}
    for sae in dict.fromkeys(one.sae for one in chosen):
        mine = [one.id for one in chosen if one.sae == sae and told[sae, one.id] is not None]
        order = [mine[i] for i in np.random.default_rng(seed).permutation(len(mine))]
        for id, other in zip(order, [*order[1:], *order[:1]], strict=True):
            words = told[sae, other]
            if other != id and words is not None:
                found[sae, id] = words
    return found


def _summary(
    store: FeatureStore, chosen: Sequence[Chosen], found: Found, asked: Asked, options: ExplainOptions, seed: int
) -> dict[str, Any]:
    """By SAE the means, and the paired differences of the others from the first."""
    saes: dict[str, Any] = {}
    by_place: dict[str, dict[str, dict[int, float]]] = {}
    for sae, explanations in found.explanations.items():
        mine = [one for one in chosen if one.sae == sae]
        values = list(explanations.values())
        parts: dict[str, list[Score | None]] = {name: [getattr(one, name) for one in values] for name in KINDS}
        parts |= {name: [one.baselines.get(name) for one in values] for name in options.baselines}
        means = {name: mean_of(scores, seed) for name, scores in parts.items()}
        saes[sae] = {
            "features": len(mine),
            "unexplained": len(mine) - len(values),
            **{name: None if one is None else asdict(one) for name, one in means.items()},
        }
        by_place[sae] = {
            name: {
                one.place: score.value
                for one in mine
                if one.id in explanations
                and (score := getattr(explanations[one.id], name)) is not None
                and score.value is not None
            }
            for name in KINDS
        }
    first = next(iter(by_place))
    return {
        "model": asked.chat.model,
        "seed": seed,
        "options": asdict(options),
        "asked": asked.asked,
        "answered_before": asked.known,
        "tokens_in": asked.tokens_in,
        "tokens_out": asked.tokens_out,
        "saes": saes,
        "paired": [
            {
                "sae": sae,
                "versus": first,
                **{name: paired(by_place[first][name], by_place[sae][name], seed) for name in KINDS},
            }
            for sae in by_place
            if sae != first
        ],
    }


def _asked(options: ExplainOptions) -> list[str]:
    return [name for name in options.baselines if name in ASKED_BASELINES]


def _parts(texts: Sequence[Text], size: int) -> list[Sequence[Text]]:
    return [texts[first : first + size] for first in range(0, len(texts), size)]


def _texts(store: FeatureStore, kind: str, texts: Sequence[Text]) -> list[str]:
    if kind == "fuzzing":
        return _marked(store, texts)
    return ["".join(store.spell(id) for id in text.ids_W) for text in texts]


def _marked(store: FeatureStore, texts: Sequence[Text]) -> list[str]:
    return [prompts.marked([store.spell(id) for id in text.ids_W], text.on_W) for text in texts]
