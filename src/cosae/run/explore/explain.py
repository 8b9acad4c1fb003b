"""`cosae explain`: labels for the features of a store, from an endpoint or from a chat model in this process.

    RUN | SAE … | STORE → the store (built where there is none) → features and texts → questions → explanations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosae.browse.explain.ask import Bill, ExplainOptions, bill, choose, explain_features
from cosae.browse.explain.endpoint import Chat, Endpoint, LocalChat
from cosae.browse.store.reader import open_store
from cosae.errors import CosaeError, check_positive
from cosae.io.progress import SILENT, Progress
from cosae.recipe import DataConfig
from cosae.report.terminal import text_table
from cosae.run.dataset.model import open_model
from cosae.run.explore.browse import prepare
from cosae.run.requests import BrowseRequest


@dataclass(frozen=True)
class Asking:
    """Whom to ask: an endpoint by its address, or a chat model in this process."""

    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. The key is read from COSAE_EXPLAIN_KEY
    or OPENAI_API_KEY and never written."""
    name: str | None = None
    """Name of the model at the endpoint."""
    local: str | None = None
    """Chat model to run in this process instead: a folder, smollm2 (once fetched) or a repository."""
    parallel: int = 4
    """Questions that an endpoint is asked at once."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    dry_run: bool = False
    """Ask nothing: print how many questions and tokens it would be, and what they cost."""
    price_in: float = 0.0
    """For --dry-run: price of a million tokens of questions."""
    price_out: float = 0.0
    """For --dry-run: price of a million tokens of answers."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed, and unless exactly one is asked."""
        for name in ("price_in", "price_out"):
            check_positive(name, getattr(self, name), zero=True)
        if self.endpoint is not None and self.local is not None:
            raise CosaeError("an endpoint or a local model is asked, not both: drop --endpoint or --local.")
        if self.dry_run:
            return
        if self.price_in or self.price_out:
            raise CosaeError("prices are for --dry-run: add it, or drop --price-in and --price-out.")
        if self.endpoint is None and self.local is None:
            raise CosaeError("explain needs somebody to ask: --endpoint URL with --name MODEL, or --local MODEL.")
        if self.endpoint is not None and not self.name:
            raise CosaeError("explain needs the name of the endpoint's model: --name MODEL.")
        if self.local is not None and self.name is not None:
            raise CosaeError("--name is of an endpoint's model, which --local does without: drop it.")

    def chat(self, device: str) -> Chat:
        """Whoever answers. Raises CosaeError where there is nobody."""
        if self.local is not None:
            return LocalChat(*open_model(DataConfig(model=self.local), device), self.local)
        return Endpoint(str(self.endpoint), str(self.name), parallel=self.parallel, timeout_s=self.timeout)


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
        chat = asking.chat(request.device)
        found = explain_features(store, chosen, chat, options, request.seed, progress=progress)
        return screen(found.summary, folder)


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
