"""SAEBench 0.6's evals, each through its own main: what it needs, how it is called, where its results lie.

Enters: adapted SAEs and a `Job`. Leaves: SAEBench's result files. Nothing of SAEBench is copied (it declares no
licence): every eval's configuration class and `run_eval` are imported from the installed package when they are called.

    core                       model, a text data set         encodes and decodes
    sparse_probing             model, 8 data sets             encodes
    sparse_probing_sae_probes  model                          encodes; the texts ship with sae-probes
    scr, tpp                   model, 2 data sets             encode and decode
    absorption                 model                          encodes; only blocks.N.hook_resid_post
    meta_structure             nothing                        looks at W_dec

A model in a local folder is enough: TransformerLens reads one once the folder is among the names it knows, and
sae-probes finds activations that were written beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosae.errors import CosaeError
from cosae.interop.saebench.adapter import SAEBenchSAE
from cosae.interop.saebench.variance import VarianceTally, tallied

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
class Job:
    """What every eval of one call shares.

    out         SAEBench's results go to out/{eval}; absolute, like every path here
    artifacts   folder for activations and the like; it is there, and goes when the eval is done
    model_name  as the results call it; the name TransformerLens knows, unless model_path is given
    model_path  a local Hugging Face model
    data        a folder with local copies of data sets, by their names on the hub: LabHC/bias_in_bios/train.jsonl …
    options     by eval: fields of its SAEBench configuration (core: arguments of its multiple_evals)
    """

    out: Path
    artifacts: Path
    model_name: str
    model_path: Path | None = None
    data: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    llm_batch_size: int = 32
    seed: int = 42
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
    random.seed(job.seed)
    np.random.seed(job.seed)  # noqa: NPY002  # SAEBench draws from the global generators
    torch.manual_seed(job.seed)
    _without_shape_checks()
    results = job.out / name
    results.mkdir(parents=True, exist_ok=True)  # absorption writes into it without making it
    gradients = torch.is_grad_enabled()
    options = {**job.options.get(name, {})}
    # A relative folder goes before the hub for `datasets`, and absorption writes to ./artifacts.
    with known_model(job), contextlib.chdir(job.data if EVALS[name].data and job.data else job.artifacts):
        try:
            return EVALS[name].call(job, saes, options)
        finally:
            torch.set_grad_enabled(gradients)  # absorption switches them on for good
            if not any(results.iterdir()):
                results.rmdir()


def _without_shape_checks() -> None:
    """SAEBench's sparse_probing gives two sizes one name, which newer jaxtyping and beartype refuse."""
    import_module("jaxtyping").config.update("jaxtyping_disable", True)


def result_file(name: str, job: Job, sae: str) -> Path:
    """Where SAEBench puts the result of an SAE that was handed in as an object."""
    return job.out / name / f"{sae}_custom_sae_eval_results.json"


@contextlib.contextmanager
def known_model(job: Job) -> Iterator[None]:
    """While open, TransformerLens' from_pretrained(model_name) reads job.model_path, if there is one.

    The folder is offered under a name made from its content: TransformerLens guesses architectures from names, and
    absorption keeps probes by name.
    """
    if job.model_path is None:
        yield
        return
    models = import_module("transformer_lens.supported_models")
    link = job.artifacts / f"model-{model_digest(job.model_path)}"
    if not link.exists():
        link.symlink_to(job.model_path.resolve(), target_is_directory=True)
    models.OFFICIAL_MODEL_NAMES.append(str(link))
    models.MODEL_ALIASES[str(link)] = [job.model_name]
    try:
        yield
    finally:
        models.OFFICIAL_MODEL_NAMES.remove(str(link))
        del models.MODEL_ALIASES[str(link)]


def model_digest(folder: Path) -> str:
    """12 hex digits of a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()[:12]


def _configured(kind: Any, given: Mapping[str, Any], options: Mapping[str, Any], name: str) -> Any:
    """SAEBench's configuration dataclass, or a sentence on the option that does not fit."""
    allowed = [f.name for f in dataclasses.fields(kind)]
    _check_options(name, options, allowed)
    try:
        return kind(**{**given, **options})
    except ValueError as error:  # pydantic's: several lines, the useful ones after the first
        said = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CosaeError(f"options of {name} do not fit SAEBench's configuration: {said or error}.") from None


def _check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise CosaeError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(sorted(allowed))}.")


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
            dtype=job.dtype,
            device=job.device,
            force_rerun=True,
            **settings,
        )
    theirs = {one["sae_set"]: one["metrics"]["reconstruction_quality"]["explained_variance"] for one in found}
    empty = VarianceTally()
    return {
        name: {"explained_variance": measured.get(id(sae), empty).report(theirs[name])}
        for name, sae in saes
        if name in theirs
    }


def _sparse_probing(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    main = import_module("sae_bench.evals.sparse_probing.main")
    kind = import_module("sae_bench.evals.sparse_probing.eval_config").SparseProbingEvalConfig
    config = _configured(kind, _model_settings(job), options, "sparse_probing")
    main.run_eval(config, list(saes), job.device, str(job.out / "sparse_probing"), True, artifacts_path=_kept(job))
    return {}


def _scr(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    return _scr_or_tpp(job, saes, options, "scr")


def _tpp(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    return _scr_or_tpp(job, saes, options, "tpp")


def _scr_or_tpp(job: Job, saes: Named, options: dict[str, Any], name: str) -> dict[str, Any]:
    main = import_module("sae_bench.evals.scr_and_tpp.main")
    kind = import_module("sae_bench.evals.scr_and_tpp.eval_config").ScrAndTppEvalConfig
    config = _configured(kind, _model_settings(job), {**options, "perform_scr": name == "scr"}, name)
    main.run_eval(config, list(saes), job.device, str(job.out), True, artifacts_path=_kept(job))  # adds /scr or /tpp
    return {}


def _absorption(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    for name, sae in saes:
        if sae.cfg.hook_name != f"blocks.{sae.cfg.hook_layer}.hook_resid_post":
            raise CosaeError(f"absorption only reads blocks.N.hook_resid_post. Got {sae.cfg.hook_name} for {name}.")
    main = import_module("sae_bench.evals.absorption.main")
    kind = import_module("sae_bench.evals.absorption.eval_config").AbsorptionEvalConfig
    config = _configured(kind, _model_settings(job), options, "absorption")
    main.run_eval(config, list(saes), job.device, str(job.out / "absorption"), True)
    return {}


def _sae_probes(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    main = import_module("sae_bench.evals.sparse_probing_sae_probes.main")
    kind = import_module("sae_bench.evals.sparse_probing_sae_probes.eval_config").SparseProbingSaeProbesEvalConfig
    given = {
        "model_name": job.model_name,
        "random_seed": job.seed,
        "results_path": str(job.artifacts / "sae_probes_results"),
        "model_cache_path": str(job.artifacts / "sae_probes_activations"),
    }
    config = _configured(kind, given, options, "sparse_probing_sae_probes")
    if job.model_path is not None:
        _write_activations(job, {sae.cfg.hook_name for _, sae in saes}, config)
    out = str(job.out / "sparse_probing_sae_probes")
    main.run_eval(config, list(saes), job.device, out, True)
    return {}


def _write_activations(job: Job, hook_names: set[str], config: Any) -> None:
    from cosae.interop.sae_probes.activations import write_activations
    from cosae.interop.sae_probes.datasets import datasets
    from cosae.models.load import load_model

    model, tokenizer = load_model(job.model_path or job.model_name, dtype=job.dtype, device=job.device)
    for hook_name in sorted(hook_names):
        write_activations(
            model,
            tokenizer,
            hook_name,
            datasets(only=config.dataset_names),
            config.model_cache_path,
            model_name=config.model_name,
            batch_texts=job.llm_batch_size,
        )


def _meta_structure(job: Job, saes: Named, options: dict[str, Any]) -> dict[str, Any]:
    main = import_module("sae_bench.evals.meta_structure.main")
    kind = import_module("sae_bench.evals.meta_structure.eval_config").MetaStructureEvalConfig
    config = _configured(kind, {"random_seed": job.seed}, options, "meta_structure")
    main.run_eval(config, list(saes), job.device, str(job.out / "meta_structure"), True)
    return {}


def _model_settings(job: Job) -> dict[str, Any]:
    return {
        "model_name": job.model_name,
        "random_seed": job.seed,
        "llm_batch_size": job.llm_batch_size,
        "llm_dtype": job.dtype,
    }


def _kept(job: Job) -> str:
    return str(job.artifacts)


EVALS: dict[str, Eval] = {
    "core": Eval(_core, decodes=True, data="Skylion007/openwebtext, unless its option dataset names a local folder"),
    "sparse_probing": Eval(_sparse_probing, data="eight data sets such as LabHC/bias_in_bios and fancyzhx/ag_news"),
    "sparse_probing_sae_probes": Eval(_sae_probes),
    "scr": Eval(_scr, decodes=True, data="LabHC/bias_in_bios and canrager/amazon_reviews_mcauley_1and5"),
    "tpp": Eval(_tpp, decodes=True, data="LabHC/bias_in_bios and canrager/amazon_reviews_mcauley_1and5"),
    "absorption": Eval(_absorption),
    "meta_structure": Eval(_meta_structure, reads_model=False),
}
