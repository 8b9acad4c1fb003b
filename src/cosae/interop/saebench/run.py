"""The door to SAEBench 0.6: cosae SAEs through its evals, results under its own keys and file names.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.interop.read import read_sae
from cosae.interop.saebench.adapter import DTYPES, SAEBenchConfig, SAEBenchMetadata, SAEBenchSAE, tl_hook_name
from cosae.interop.saebench.environment import run_elsewhere
from cosae.interop.saebench.evals import EVALS, Job, Named, call, result_file
from cosae.interop.saebench.reasons import chain, errors_logged, one_sentence, why_nothing
from cosae.sae.model import SAE

__all__ = [
    "EVALS",
    "SAEBenchConfig",
    "SAEBenchMetadata",
    "SAEBenchSAE",
    "evaluate_here",
    "run",
    "run_evals",
    "tl_hook_name",
]

VERSION = "0.6.0"
"""The SAEBench whose evals these calls fit."""


def run_evals(
    saes: Mapping[str, SAE | str | Path],
    evals: Sequence[str],
    out: str | Path,
    *,
    model_name: str | None = None,
    model_path: str | Path | None = None,
    hook_name: str | None = None,
    hook_layer: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    llm_batch_size: int = 32,
    seed: int = 42,
    data: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    python: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """SAEBench's evals of these SAEs; one that cannot run stops none of the others.

    saes            by name (it becomes part of file names): SAEs, or folders or files of any format cosae reads
    evals           names from EVALS
    out             results go to out/{eval}/; what SAEBench prints, to out/saebench.log
    model_name      default: what the SAEs' facts say. "embedded" is the model in the package
    model_path      folder of a Hugging Face model: no name TransformerLens knows, and no hub, is needed then
    hook_name, hook_layer   where the SAEs read; default: their facts'
    dtype           of the model, and of what goes in and out of the SAEs: float32, bfloat16, float16, float64
    data            folder with copies of the data sets the hub would give, under their names there:
                    data/LabHC/bias_in_bios/train.jsonl …; what is not in it is downloaded
    options         by eval: fields of its SAEBench configuration, such as {"meta_structure": {"train_steps": 200}}
    python          interpreter of an environment with SAEBench; default: this one
    force           replace results that are there

    Returns {"results": {eval: {sae: file}}, "numbers": {eval: {sae: SAEBench's metrics}}, "failed": {eval: sentence}};
    the same is in out/summary.json. Raises CosaeError for anything that can be told before an eval runs.
    """
    out = Path(out)
    loaded = {name: sae if isinstance(sae, SAE) else read_sae(sae) for name, sae in saes.items()}
    if isinstance(evals, str):
        evals = [evals]
    _check(loaded, evals, out, dtype, force)
    model_name, model_path = _model(loaded, model_name, model_path)
    arguments: dict[str, Any] = {
        "evals": list(dict.fromkeys(evals)),
        "out": str(out.resolve()),
        "model_name": model_name,
        "model_path": None if model_path is None else str(model_path),
        "data": None if data is None else str(_folder(data)),
        "hook_name": hook_name,
        "hook_layer": hook_layer,
        "device": device,
        "dtype": dtype,
        "llm_batch_size": llm_batch_size,
        "seed": seed,
        "options": _plain_options(options or {}),
    }
    for name, sae in loaded.items():  # the same sentences here as over there, before anything is started
        _adapt(name, sae, arguments)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saebench.", dir=out) as folder:
            log = out / "saebench.log"
            if python is None:
                with _logged(log):
                    answer = evaluate_here(loaded, **arguments)
            else:
                answer = run_elsewhere(Path(python), loaded, arguments, Path(folder), log)
        _write_json(out / "summary.json", answer)
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose a folder you can write to.") from None
    return dict(answer)


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
        done = f"{len(answer['results'])} other evals are done, in {out}. " if answer["results"] else ""
        raise CosaeError(done + " ".join(answer["failed"].values()))
    return "\n".join(lines)


def evaluate_here(saes: Mapping[str, SAE], *, evals: Sequence[str], out: str, **arguments: Any) -> dict[str, Any]:
    """run_evals' work in an environment that has SAEBench; arguments as run_evals passes them on, all plain."""
    missing = [
        name for name in ("sae_bench", "sae_probes", "transformer_lens") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise CosaeError(
            f"SAEBench's evals need {missing[0]}, which is not installed here: pip install sae-bench=={VERSION} in an "
            "environment of its own, and give that environment's interpreter as python."
        )
    answer: dict[str, Any] = {"results": {}, "numbers": {}, "failed": {}}
    for name in evals:
        adapted = [(sae, _adapt(sae, saes[sae], arguments)) for sae in saes]
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out) as artifacts:
            job = Job(
                out=Path(out),
                artifacts=Path(artifacts),
                model_name=arguments["model_name"],
                model_path=None if arguments["model_path"] is None else Path(arguments["model_path"]),
                data=None if arguments["data"] is None else Path(arguments["data"]),
                **{key: arguments[key] for key in ("device", "dtype", "llm_batch_size", "seed", "options")},
            )
            try:
                answer["results"][name], answer["numbers"][name] = _evaluate(name, job, adapted)
            except CosaeError as error:
                answer["failed"][name] = str(error)
    return answer


def _evaluate(name: str, job: Job, saes: Named) -> tuple[dict[str, str], dict[str, Any]]:
    """One eval: files and metrics by SAE. Raises CosaeError with one sentence on whatever went wrong."""
    for sae_name, sae in saes:
        if EVALS[name].decodes and not sae.decodes_alone:
            raise CosaeError(
                f"{name} decodes from codes alone, and {sae_name} (frame {sae.sae.cfg.frame}, norm_restoring "
                f"{sae.sae.cfg.norm_restoring}) also needs each token's length: leave {name} out for it."
            )
    with errors_logged() as said:
        try:
            ours = call(name, job, saes)
        except CosaeError:
            raise
        except Exception as error:
            traceback.print_exc()  # into the log
            raise CosaeError(one_sentence(name, job, [*said, *chain(error)])) from error
    files = {sae_name: result_file(name, job, sae_name) for sae_name, _ in saes}
    missing = [sae_name for sae_name, file in files.items() if not file.is_file()]
    if missing:
        raise CosaeError(one_sentence(name, job, said or why_nothing(name)))
    numbers = {
        sae_name: _finish(file, dict(saes)[sae_name], ours.get(sae_name, {})) for sae_name, file in files.items()
    }
    return {sae_name: str(file) for sae_name, file in files.items()}, numbers


def _finish(file: Path, sae: SAEBenchSAE, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Add our key to a result file, and give SAEBench's metrics by name."""
    result = json.loads(file.read_text("utf-8"))
    result["cosae"] = {**ours, "sae": sae.sae.cfg.to_dict()}
    _write_json(file, result)
    numbers: dict[str, Any] = {}
    for group in result["eval_result_metrics"].values():
        numbers |= {key: value for key, value in group.items() if value is not None}
    if "explained_variance" in ours:
        numbers["cosae_fve"] = ours["explained_variance"]["fve"]
    return numbers


def _adapt(name: str, sae: SAE, arguments: Mapping[str, Any]) -> SAEBenchSAE:
    try:
        return SAEBenchSAE(
            sae, **{key: arguments[key] for key in ("model_name", "hook_name", "hook_layer", "device", "dtype")}
        )
    except CosaeError as error:
        raise CosaeError(f"{name}: {error}") from None


def _check(saes: Mapping[str, SAE], evals: Sequence[str], out: Path, dtype: str, force: bool) -> None:
    unknown = [name for name in evals if name not in EVALS]
    if unknown or not evals:
        raise CosaeError(f"evals must be one or more of {', '.join(EVALS)}. Got {(unknown or ['none'])[0]!r} instead.")
    if not saes:
        raise CosaeError("there must be at least one SAE to evaluate. Got none.")
    odd = [name for name in saes if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", name)]
    if odd:
        raise CosaeError(f"names of SAEs become file names: letters, digits and . _ + = , - only. Got {odd[0]!r}.")
    if dtype not in DTYPES:
        raise CosaeError(f"dtype must be one of {', '.join(DTYPES)}. Got {dtype!r} instead.")
    job = Job(out=out, artifacts=out, model_name="")
    there = [file for name in evals for sae in saes if (file := result_file(name, job, sae)).exists()]
    if there and not force:
        raise CosaeError(f"{there[0]} exists already: choose another out, or force its replacement.")
    for file in there:
        file.unlink()


def _model(saes: Mapping[str, SAE], model_name: str | None, model_path: str | Path | None) -> tuple[str, Path | None]:
    """A name for results and, for a model on disk, its folder. A name that is a folder is one; so is "embedded"."""
    named = {str(sae.metadata["model"]) for sae in saes.values() if sae.metadata.get("model")}
    if model_name is None:
        if len(named) != 1:
            raise CosaeError(f"model_name must be given: the SAEs name {', '.join(sorted(named)) or 'no model'}.")
        model_name = named.pop()
    if model_path is None and Path(model_name).expanduser().is_dir():
        model_path = Path(model_name).expanduser()
        model_name = model_path.resolve().name
    if model_path is None and model_name == "embedded":
        from cosae.models.embedded import model_path as embedded_path

        model_path = embedded_path()
    if model_path is not None and not (Path(model_path).expanduser() / "config.json").is_file():
        raise CosaeError(f"model_path must be a folder of a Hugging Face model. Got {model_path}, without config.json.")
    return model_name, None if model_path is None else Path(model_path).expanduser().resolve()


def _folder(data: str | Path) -> Path:
    if not Path(data).is_dir():
        raise CosaeError(f"data must be a folder with copies of data sets. Got {data}, which is none.")
    return Path(data).resolve()


def _plain_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    unknown = [name for name in options if name not in EVALS]
    if unknown or not all(isinstance(one, Mapping) for one in options.values()):
        raise CosaeError(f"options must be a mapping for each eval of {', '.join(EVALS)}. Got {unknown or options!r}.")
    try:
        plain: dict[str, dict[str, Any]] = json.loads(json.dumps({name: dict(one) for name, one in options.items()}))
    except (TypeError, ValueError):
        raise CosaeError("options must be plain numbers, texts, lists and mappings, as JSON has them.") from None
    return plain


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    """What SAEBench prints, and its progress bars, go to the log."""
    with (
        log.open("a", encoding="utf-8") as printed,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        yield


def _write_json(place: Path, value: Any) -> None:
    staged = place.with_name(f".{place.name}.part")
    staged.write_text(json.dumps(value, indent=2), encoding="utf-8")
    staged.replace(place)
