"""SAEBench 0.6: cosae SAEs through its evals, results under its own keys and file names.

Enters: SAEs and the names of evals. Leaves: `out/{eval}/{sae}_custom_sae_eval_results.json` as SAEBench writes them,
each with one key more, `cosae`, and `out/summary.json`. SAEBench is called, here or in another environment.

>>> from cosae.interop.saebench.run import run_evals
>>> run_evals({"cosine": sae}, ["meta_structure", "sparse_probing_sae_probes"], "evals", python="/path/to/python")
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError, check_choice, sentences
from cosae.interop.public import NEUTRAL, without_places
from cosae.interop.read import read_sae
from cosae.interop.saebench.adapter import DTYPES, SAEBenchSAE
from cosae.interop.saebench.environment import run_elsewhere
from cosae.interop.saebench.evals import EVALS, Named, call
from cosae.interop.saebench.reasons import chain, errors_logged, one_sentence
from cosae.interop.saebench.settings import Job, Settings
from cosae.io.atomic import kept_until_new, write_text
from cosae.io.fetched.packages import MODELS
from cosae.models.embedded import model_path as embedded_path
from cosae.models.gguf import is_gguf
from cosae.models.load import place_of
from cosae.sae.model import SAE
from cosae.shown import counted

VERSION = "0.6.0"
"""The SAEBench whose evals these calls fit."""
Options = Mapping[str, Mapping[str, Any]]


def run_evals(
    saes: Mapping[str, SAE | str | Path],
    evals: str | Sequence[str],
    out: str | Path,
    *,
    options: Options | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """SAEBench's evals of these SAEs; one that cannot run stops none of the others.

    saes      by name (it becomes part of file names): SAEs, or folders or files of any format cosae reads
    evals     names from EVALS
    out       results go to out/{eval}/; what SAEBench prints, to out/saebench.log
    options   by eval: fields of its SAEBench configuration, such as {"meta_structure": {"train_steps": 200}}
    settings  the fields of `Settings`: python, model_name, model_path, hook_name, hook_layer, data, dtype, …

    Returns {"results": {eval: {sae: file}}, "numbers": {eval: {sae: SAEBench's metrics}}, "failed": {eval: sentence}};
    the same is in out/summary.json, where files are relative to `out`. Neither that nor the log keeps a path of this
    machine. Raises CosaeError for anything that can be told before an eval runs.
    """
    out, asked = Path(out), Settings(**settings)
    loaded = {name: sae if isinstance(sae, SAE) else read_sae(sae) for name, sae in saes.items()}
    evals = [evals] if isinstance(evals, str) else list(dict.fromkeys(evals))
    _check(loaded, evals, out, asked)
    asked, plain = _with_places(loaded, asked), _plain_options(options or {})
    for name, sae in loaded.items():  # the same sentences here as over there, before anything is started
        _adapt(name, sae, asked)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix=".saebench.", dir=out))
            log = out / "saebench.log"
            opened.callback(lambda: write_text(log, without_places(log.read_text("utf-8", "replace"))))
            if asked.python is None:
                with (  # what SAEBench prints, and its progress bars
                    log.open("a", encoding="utf-8") as printed,
                    contextlib.redirect_stdout(printed),
                    contextlib.redirect_stderr(printed),
                ):
                    answer = evaluate_here(loaded, evals, out.resolve(), asked, plain)
            else:
                answer = run_elsewhere(loaded, evals, out.resolve(), asked, plain, Path(folder), log)
        write_text(out / "summary.json", json.dumps(_to_share(answer), indent=2))
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose a folder you can write to.") from None
    return dict(answer)


def _to_share(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer without places of this machine; files relative to the folder of results."""
    results = {
        name: {sae: f"{name}/{Path(file).name}" for sae, file in files.items()}
        for name, files in answer["results"].items()
    }
    return {**answer, "results": results, "failed": {name: without_places(s) for name, s in answer["failed"].items()}}


def run(
    saes: Mapping[str, SAE | str | Path] | Sequence[str | Path], evals: Sequence[str], out: str | Path, **settings: Any
) -> str:
    """The body of a command: run_evals, then a table as text. Folders without names are called after themselves.

    Raises CosaeError, after everything that could run has run, where an eval could not.
    """
    if not isinstance(saes, Mapping):
        folders = [Path(place) for place in saes]
        if len({place.name for place in folders}) < len(folders):
            raise CosaeError("two folders of SAEs have the same name, and so would their results: rename one.")
        saes = {place.resolve().name: place for place in folders}
    answer = run_evals(saes, evals, out, **settings)
    lines = [
        f"{name:<26} {sae:<20} {metric} = {value:.4g}"
        for name, by_sae in answer["numbers"].items()
        for sae, numbers in by_sae.items()
        for metric, value in numbers.items()
        if isinstance(value, int | float)
    ]
    if answer["failed"]:
        done = f"{counted(len(answer['results']), 'other eval')} done, in {out}" if answer["results"] else ""
        raise CosaeError(sentences(done, *answer["failed"].values()))
    return "\n".join(lines)


def evaluate_here(
    saes: Mapping[str, SAE], evals: Sequence[str], out: Path, settings: Settings, options: Options
) -> dict[str, Any]:
    """run_evals' work in an environment that has SAEBench; paths are absolute and the model is known."""
    missing = [
        name for name in ("sae_bench", "sae_probes", "transformer_lens") if importlib.util.find_spec(name) is None
    ]
    if missing:
        install = f"pip install sae-bench=={VERSION} in an environment of its own, and give its interpreter as python"
        raise CosaeError(f"SAEBench needs {missing[0]}, which is not installed here: {install}.")
    answer: dict[str, Any] = {"results": {}, "numbers": {}, "failed": {}}
    for name in evals:
        adapted = [(sae, _adapt(sae, saes[sae], settings)) for sae in saes]
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out) as artifacts:
            try:
                job = Job(out, Path(artifacts), settings, options)
                answer["results"][name], answer["numbers"][name] = _evaluate(name, job, adapted)
            except CosaeError as error:
                answer["failed"][name] = str(error)
    return answer


def _evaluate(name: str, job: Job, saes: Named) -> tuple[dict[str, str], dict[str, Any]]:
    """One eval: files and metrics by SAE. Raises CosaeError with one sentence on whatever went wrong."""
    for sae_name, sae in saes:
        if EVALS[name].decodes and not sae.decodes_alone:
            kind = f"frame {sae.sae.cfg.frame}, norm_restoring {sae.sae.cfg.norm_restoring}"
            raise CosaeError(f"{name} decodes without tokens' lengths: leave {name} out for {sae_name} ({kind}).")
    files = {sae_name: job.result_file(name, sae_name) for sae_name, _ in saes}
    with kept_until_new(files.values()), errors_logged() as said:
        try:
            ours = call(name, job, saes)
        except CosaeError:
            raise
        except Exception as error:
            traceback.print_exc()  # into the log
            raise CosaeError(one_sentence(name, job, [*said, *chain(error)])) from error
        if not all(file.is_file() for file in files.values()):
            letters = "the model tells too few first letters apart (options min_GT_probe_f1 and min_feats_for_eval)"
            silent = [letters if name == "absorption" else "it ended without a result"]
            raise CosaeError(one_sentence(name, job, said or silent))
        numbers = {sae_name: _finish(files[sae_name], sae, ours.get(sae_name, {})) for sae_name, sae in saes}
    return {sae_name: str(file) for sae_name, file in files.items()}, numbers


def _finish(file: Path, sae: SAEBenchSAE, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Add our key to a result file, and give SAEBench's metrics by name."""
    result = json.loads(file.read_text("utf-8"))
    result["cosae"] = {**ours, "sae": sae.sae.cfg.to_dict()}
    write_text(file, json.dumps(result, indent=2))
    groups = result["eval_result_metrics"].values()
    numbers = {key: value for group in groups for key, value in group.items() if value is not None}
    if "explained_variance" in ours:
        numbers["cosae_fve"] = ours["explained_variance"]["fve"]
    return numbers


def _adapt(name: str, sae: SAE, settings: Settings) -> SAEBenchSAE:
    try:
        given = ("model_name", "hook_name", "hook_layer", "device", "dtype")
        return SAEBenchSAE(sae, **{field: getattr(settings, field) for field in given})
    except CosaeError as error:
        raise CosaeError(f"{name}: {error}") from None


def _check(saes: Mapping[str, SAE], evals: Sequence[str], out: Path, asked: Settings) -> None:
    if (unknown := [name for name in evals if name not in EVALS]) or not evals:
        raise CosaeError(f"evals must be one or more of {', '.join(EVALS)}. Got {(unknown or ['none'])[0]!r} instead.")
    if not saes:
        raise CosaeError("there must be at least one SAE to evaluate. Got none.")
    if odd := [name for name in saes if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", name)]:
        raise CosaeError(f"names of SAEs become file names: letters, digits and . _ + = , - only. Got {odd[0]!r}.")
    check_choice("dtype", asked.dtype, DTYPES)
    job = Job(out, out, asked)
    there = [file for name in evals for sae in saes if (file := job.result_file(name, sae)).exists()]
    if there and not asked.force:
        raise CosaeError(f"{there[0]} exists already: choose another out, or force its replacement.")


def _with_places(saes: Mapping[str, SAE], asked: Settings) -> Settings:
    """The settings with the model's name for results, and its folder where it lies on disk ("embedded" and what was
    fetched do too; of a GGUF file, that of its dequantised weights)."""
    name, folder = asked.model_name, asked.model_path
    if name is None:
        named = {str(sae.metadata["model"]) for sae in saes.values() if sae.metadata.get("model")}
        if len(named) != 1:
            raise CosaeError(f"model_name must be given: the SAEs name {', '.join(sorted(named)) or 'no model'}.")
        name = named.pop()
    if folder is None and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        name = NEUTRAL["model"].replace(" ", "-")  # results are made to be shared
    if folder is None and name == "embedded":
        folder = embedded_path()
    if folder is None and name in MODELS:
        folder = Path(place_of(name))
    if folder is None and is_gguf(Path(name).expanduser()):
        folder, name = Path(name), NEUTRAL["model"].replace(" ", "-")
    if folder is not None and is_gguf(folder.expanduser()):
        folder = Path(place_of(folder.expanduser()))
    if folder is not None and not (folder.expanduser() / "config.json").is_file():
        raise CosaeError(f"model_path must be a folder of a Hugging Face model. Got {folder}, without config.json.")
    if asked.data is not None and not asked.data.is_dir():
        raise CosaeError(f"data must be a folder with copies of data sets. Got {asked.data}, which is none.")
    return replace(
        asked,
        model_name=name,
        model_path=None if folder is None else folder.expanduser().resolve(),
        data=None if asked.data is None else asked.data.resolve(),
    )


def _plain_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    unknown = [name for name in options if name not in EVALS]
    if unknown or not all(isinstance(one, Mapping) for one in options.values()):
        raise CosaeError(f"options must be a mapping for each eval of {', '.join(EVALS)}. Got {unknown or options!r}.")
    try:
        return dict(json.loads(json.dumps({name: dict(one) for name, one in options.items()})))
    except (TypeError, ValueError):
        raise CosaeError("options must be plain numbers, texts, lists and mappings, as JSON has them.") from None
