"""SAEBench 0.6's evals, each through its own main: what it needs, how it is called, where its results lie.

Enters: adapted SAEs and a `Job`. Leaves: SAEBench's result files. Nothing of SAEBench is copied (it declares no
licence): every eval's configuration class and `run_eval` are imported from the installed package when they are called.

A model in a local folder is enough: TransformerLens reads one once the folder is among the names it knows, and
sae-probes finds activations that were written beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosae.errors import CosaeError, check_choice
from cosae.interop.sae_probes.activations import write_activations
from cosae.interop.sae_probes.datasets import datasets
from cosae.interop.saebench.adapter import SAEBenchSAE
from cosae.interop.saebench.settings import Job
from cosae.interop.saebench.variance import VarianceTally, tallied
from cosae.io.digest import file_digest, value_digest
from cosae.models.load import load_model

Named = Sequence[tuple[str, SAEBenchSAE]]

CORE_DEFAULTS: dict[str, Any] = {
    "n_eval_reconstruction_batches": 200,
    "n_eval_sparsity_variance_batches": 2000,
    "eval_batch_size_prompts": 16,
    "exclude_special_tokens_from_reconstruction": True,
    "dataset": "Skylion007/openwebtext",
    "context_size": 128,
}
"""The settings SAEBench's own script for custom SAEs gives core."""


@dataclass(frozen=True)
class Eval:
    """How one eval is called, and what it asks of SAE and surroundings."""

    call: Callable[[Job, Named, dict[str, Any]], dict[str, Any]]
    decodes: bool = False
    reads_model: bool = True
    data: str = ""
    """Where the texts come from that have to be downloaded; "" for none."""


def call(name: str, job: Job, saes: Named) -> dict[str, dict[str, Any]]:
    """Run one eval on every SAE through SAEBench's main; results are files under job.out.

    Returns {SAE name: numbers of ours to put beside SAEBench's}. Whatever SAEBench raises passes through.
    """
    settings, wants = job.settings, EVALS[name]
    random.seed(settings.seed)
    np.random.seed(settings.seed)  # noqa: NPY002  # SAEBench draws from the global generators
    torch.manual_seed(settings.seed)
    # SAEBench's sparse_probing gives two sizes one name, which newer jaxtyping and beartype refuse.
    import_module("jaxtyping").config.update("jaxtyping_disable", True)
    results = job.out / name
    results.mkdir(parents=True, exist_ok=True)  # absorption writes into it without making it
    gradients = torch.is_grad_enabled()
    # A relative folder goes before the hub for `datasets`, and absorption writes to ./artifacts.
    with known_model(job), contextlib.chdir(settings.data if wants.data and settings.data else job.artifacts):
        try:
            return wants.call(job, saes, {**job.options.get(name, {})})
        finally:
            torch.set_grad_enabled(gradients)  # absorption switches them on for good
            if not any(results.iterdir()):
                results.rmdir()


@contextlib.contextmanager
def known_model(job: Job) -> Iterator[None]:
    """While open, TransformerLens' from_pretrained(model_name) reads settings.model_path, if there is one.

    The folder is offered under a name made from its content: TransformerLens guesses architectures from names, and
    absorption keeps probes by name.
    """
    folder = job.settings.model_path
    if folder is None:
        yield
        return
    models = import_module("transformer_lens.supported_models")
    link = job.artifacts / f"model-{model_digest(folder)}"
    if not link.exists():
        link.symlink_to(folder.resolve(), target_is_directory=True)
    models.OFFICIAL_MODEL_NAMES.append(str(link))
    models.MODEL_ALIASES[str(link)] = [job.settings.model_name]
    try:
        yield
    finally:
        models.OFFICIAL_MODEL_NAMES.remove(str(link))
        del models.MODEL_ALIASES[str(link)]


def model_digest(folder: Path) -> str:
    """12 hex digits of a model folder's configuration and weights."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return value_digest([[file.name, file_digest(file)] for file in files if file.is_file()])[:12]


def _configured(name: str, kind: str, options: Mapping[str, Any], given: Mapping[str, Any], package: str = "") -> Any:
    made = getattr(import_module(f"sae_bench.evals.{package or name}.eval_config"), kind)
    _check_options(name, options, [f.name for f in dataclasses.fields(made)])
    try:
        return made(**{**given, **options})
    except ValueError as error:  # pydantic's: several lines, the useful ones after the first
        said = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CosaeError(f"options of {name} do not fit SAEBench's configuration: {said or error}.") from None


def _check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in options:
        check_choice(f"an option of {name}", key, sorted(allowed))


def _core(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    core = import_module("sae_bench.evals.core.main")
    _check_options("core", options, list(CORE_DEFAULTS))
    settings = {**CORE_DEFAULTS, **options}
    # core retries whatever fails and then goes on without a word but to its log: see first that there are texts.
    texts = import_module("datasets").load_dataset(settings["dataset"], split="train", streaming=True)
    next(iter(texts))
    with tallied(core) as measured:
        found = core.multiple_evals(
            selected_saes=list(saes),
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            output_folder=str(job.out / "core"),
            dtype=job.settings.dtype,
            device=job.settings.device,
            force_rerun=True,
            **settings,
        )
    theirs = {one["sae_set"]: one["metrics"]["reconstruction_quality"]["explained_variance"] for one in found}
    tallies = {name: measured.get(id(sae), VarianceTally()) for name, sae in saes if name in theirs}
    return {name: {"explained_variance": tally.report(theirs[name])} for name, tally in tallies.items()}


def _run_eval(
    name: str, kind: str, job: Job, saes: Named, options: dict[str, Any], package: str = "", **arguments: Any
) -> dict[str, Any]:
    """An eval whose main is `run_eval` and whose configuration names the model."""
    settings = job.settings
    given = {"model_name": settings.model_name, "random_seed": settings.seed}
    given |= {"llm_batch_size": settings.llm_batch_size, "llm_dtype": settings.dtype}
    config = _configured(name, kind, options, given, package)
    return _call_main(name, config, job, saes, package, **arguments)


def _call_main(name: str, config: Any, job: Job, saes: Named, package: str = "", **arguments: Any) -> dict[str, Any]:
    main = import_module(f"sae_bench.evals.{package or name}.main")
    out = job.out if package else job.out / name  # scr_and_tpp adds /scr or /tpp itself
    main.run_eval(config, list(saes), job.settings.device, str(out), True, **arguments)
    return {}


def _sparse_probing(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    kept = str(job.artifacts)
    return _run_eval("sparse_probing", "SparseProbingEvalConfig", job, saes, options, artifacts_path=kept)


def _scr_or_tpp(name: str, job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    options, kept = {**options, "perform_scr": name == "scr"}, str(job.artifacts)
    return _run_eval(name, "ScrAndTppEvalConfig", job, saes, options, "scr_and_tpp", artifacts_path=kept)


def _absorption(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    for name, sae in saes:
        if sae.cfg.hook_name != f"blocks.{sae.cfg.hook_layer}.hook_resid_post":
            raise CosaeError(f"absorption only reads blocks.N.hook_resid_post. Got {sae.cfg.hook_name} for {name}.")
    return _run_eval("absorption", "AbsorptionEvalConfig", job, saes, options)


def _sae_probes(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    name, settings = "sparse_probing_sae_probes", job.settings
    given = {
        "model_name": settings.model_name,
        "random_seed": settings.seed,
        "results_path": str(job.artifacts / "sae_probes_results"),
        "model_cache_path": str(job.artifacts / "sae_probes_activations"),
    }
    config = _configured(name, "SparseProbingSaeProbesEvalConfig", options, given)
    if settings.model_path is not None:
        model, tokenizer = load_model(settings.model_path, dtype=settings.dtype, device=settings.device)
        for hook_name in sorted({sae.cfg.hook_name for _, sae in saes}):
            write_activations(
                model,
                tokenizer,
                hook_name,
                datasets(only=config.dataset_names),
                config.model_cache_path,
                model_name=config.model_name,
                batch_texts=settings.llm_batch_size,
            )
    return _call_main(name, config, job, saes)


def _meta_structure(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    config = _configured("meta_structure", "MetaStructureEvalConfig", options, {"random_seed": job.settings.seed})
    return _call_main("meta_structure", config, job, saes)


PAIRS = "LabHC/bias_in_bios and canrager/amazon_reviews_mcauley_1and5"
EVALS: dict[str, Eval] = {
    "core": Eval(_core, decodes=True, data="Skylion007/openwebtext, unless its option dataset names a local folder"),
    "sparse_probing": Eval(_sparse_probing, data="eight data sets such as LabHC/bias_in_bios and fancyzhx/ag_news"),
    "sparse_probing_sae_probes": Eval(_sae_probes),  # the texts ship with sae-probes
    "scr": Eval(partial(_scr_or_tpp, "scr"), decodes=True, data=PAIRS),
    "tpp": Eval(partial(_scr_or_tpp, "tpp"), decodes=True, data=PAIRS),
    "absorption": Eval(_absorption),
    "meta_structure": Eval(_meta_structure, reads_model=False),  # looks at W_dec alone
}
