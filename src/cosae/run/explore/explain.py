"""`cosae explain`: labels for the features of a store, from an endpoint or from a chat model in this process.

RUN | SAE … | STORE → the store (built where there is none) → features and texts → questions → explanations
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cosae.browse.explain.ask import Bill, bill, choose, explain_features
from cosae.browse.explain.endpoint import Chat, Endpoint, LocalChat
from cosae.browse.explain.options import Asking, ExplainOptions
from cosae.browse.store.reader import open_store
from cosae.io.progress import SILENT, Progress
from cosae.recipe import DataConfig
from cosae.report.terminal import text_table
from cosae.run.dataset.model import open_model
from cosae.run.explore.browse import prepare
from cosae.run.requests import BrowseRequest


def explain(
    paths: Sequence[Path],
    request: BrowseRequest,
    asking: Asking,
    options: ExplainOptions,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> str:
    """Explain, and return what was found as text for a terminal; of a dry run what it would cost.

    Raises CosaeError for what cannot be read or asked: what was answered before is kept, and the same call goes on.
    """
    asking.check()
    options.check()
    folder = prepare(paths, request, out, progress=progress)
    with closing(open_store(folder)) as store:
        with progress.phase("choosing features and texts"):
            chosen = choose(store, [one.name for one in store.saes], options, request.seed)
        if asking.dry_run:
            return _costs(bill(store, chosen, options), len(chosen), asking)
        with _chat(asking, request.device) as chat:
            found = explain_features(store, chosen, chat, options, request.seed, progress=progress)
        return screen(found.summary, folder)


@contextmanager
def _chat(asking: Asking, device: str) -> Iterator[Chat]:
    """Whoever answers; connections are closed at the end. Raises CosaeError where there is nobody."""
    if asking.local is not None:
        yield LocalChat(*open_model(DataConfig(model=asking.local), device), asking.local)
        return
    endpoint = Endpoint(str(asking.endpoint), str(asking.model), parallel=asking.parallel, timeout_s=asking.timeout)
    with closing(endpoint):
        yield endpoint


def _costs(found: Bill, features: int, asking: Asking) -> str:
    counts = f"{features:,} features: {found.questions:,} questions"
    tokens = f"about {found.tokens_in:,} tokens of questions and {found.tokens_out:,} of answers"
    cost = found.cost(asking.price_in, asking.price_out)
    priced = f"; {cost:,.2f} at these prices" if asking.price_in or asking.price_out else ""
    return f"{counts}, {tokens}{priced}. Answers that cannot be read are asked for again, and come on top."


def screen(summary: Mapping[str, Any], folder: Path) -> str:
    """Scores by SAE, and the differences from the first."""
    options = summary["options"]
    columns = ["detection", "fuzzing", *options["baselines"]]
    rows = []
    for sae, known in summary["saes"].items():
        failed = sum(one["failed"] for name in columns if (one := known[name]) is not None)
        explained = known["features"] - known["unexplained"]
        rows.append([sae, explained, *(_interval(known[name]) for name in columns), failed])
    title = f"balanced accuracy of {summary['model']}'s explanations, mean over features [95 % interval]"
    notes = [f"in {folder}; {summary['asked']:,} questions asked, {summary['answered_before']:,} answered before"]
    notes += ["failed: judgements that could not be read, which are in no number"]
    for one in summary["paired"]:
        for name in ("detection", "fuzzing"):
            if (pair := one[name]) is not None:
                span = f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"
                notes.append(f"{name}: {one['sae']} − {one['versus']} {span}, {pair['features']} features at a density")
    head = ["SAE", "features", *columns, "failed"]
    return text_table(head, rows, title=title, notes=notes, align="lr" + "r" * len(columns) + "r")


def _interval(score: Mapping[str, Any] | None) -> str | None:
    if score is None or score["value"] is None:
        return None
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
