"""A model card written from an SAE's own metadata: what it is, how it was trained, what was measured, how to load it.

Nothing is claimed that the files do not say; what they do not say is called unknown.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cosae.interop.public import Public
from cosae.io.escape import code_span, markdown
from cosae.sae.model import SAE

TAGS = ("cosae", "saelens", "sparse-autoencoder")
BARS = "▁▂▃▄▅▆▇█"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")


def card(
    repo: str,
    saes: Mapping[str, SAE],
    metrics: Mapping[str, Any],
    license: str,
    title: str = "",
    public: Public = Public(),  # noqa: B008  it is frozen
) -> str:
    """The README.md of a repository, or of a folder in it.

    saes     SAE by its folder in the repository, "" for the root
    metrics  by the same folders: what `arm_metrics` returns; folders may be missing
    license  identifier as the hub knows them, such as mit
    public   what of the metadata is published
    """
    front = ["---", "library_name: cosae", f"license: {license}", "tags:", *(f"- {tag}" for tag in TAGS), "---"]
    parts = ["\n".join(front), f"# {markdown(title or repo.split('/')[-1])}"]
    saes = {path: _published(sae, public) for path, sae in saes.items()}
    metrics = {path: public.metadata(one) for path, one in metrics.items()}
    some, several = next(iter(saes.values())), len(saes) > 1
    where = f"{_model(some.metadata)} at {_site(some)}"
    if several:
        parts.append(f"Sparse autoencoders (SAEs) for activations of {where}, trained side by side.")
        parts.append(_overview(saes, metrics))
    else:
        parts.append(f"A sparse autoencoder (SAE) for activations of {where}.")
    parts += [_one(path, sae, metrics.get(path), alone=not several) for path, sae in saes.items()]
    return "\n\n".join([*parts, _loading(repo, next(iter(saes))), _warning(some)]) + "\n"


def _published(sae: SAE, public: Public) -> SAE:
    shown = copy.copy(sae)
    shown.metadata = public.metadata(sae.metadata)
    return shown


def arm_metrics(evaluation: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """The numbers of one arm in a run's evaluation.json: held-out tokens, with and without attention sinks."""
    found = _reach(evaluation, "reconstruction", arm)
    if not isinstance(found, Mapping):
        return {}
    return {
        "held_out_tokens": evaluation.get("tokens"),
        **{name: found[name] for name in ("sinks_out", "sinks_in", "n_sinks") if name in found},
        "norms": {k: _reach(evaluation, "norms", k) for k in ("median", "mean", "cv", "quantiles", "quantile_levels")},
    }


def histogram_text(value_n: Sequence[float] | np.ndarray, bins: int = 24) -> str:
    """Bars of equal bins between the least and the largest value, as one line of block characters."""
    counts, edges = np.histogram(np.asarray(value_n, np.float64), bins)
    return f"{edges[0]:.3g} |{_bars(counts)}| {edges[-1]:.3g}"


def _bars(counts: Sequence[int] | np.ndarray) -> str:
    most = max(max(counts), 1)
    return "".join(BARS[-(-int(n) * (len(BARS) - 1) // int(most))] if n else " " for n in counts)


def _overview(saes: Mapping[str, SAE], metrics: Mapping[str, Any]) -> str:
    lines = ["| folder | score | selector | features | k | FVE | L0 |", "|---|---|---|---|---|---|---|"]
    for path, sae in saes.items():
        fve, l0 = (_number(_reach(metrics.get(path), "sinks_out", name)) for name in ("fve", "l0"))
        cfg = sae.cfg
        lines.append(f"| {code_span(path)} | {cfg.score} | {cfg.selector} | {cfg.d_sae:,} | {cfg.k} | {fve} | {l0} |")
    return "\n".join(lines)


def _one(path: str, sae: SAE, metrics: Mapping[str, Any] | None, alone: bool) -> str:
    cfg, metadata = sae.cfg, sae.metadata
    rows = [
        ("score", f"`{cfg.score}`: " + _score_words(sae).replace("|", "\\|")),
        ("selector", f"`{cfg.selector}`"),
        ("k", f"{cfg.k} features per token" + ("" if cfg.selector in ("topk", "abs_topk") else " in the mean")),
        ("width", f"{cfg.d_sae:,} features of {cfg.d_in:,} dimensions"),
        ("frame", f"`{cfg.frame}`" + (", norm restoring" if cfg.norm_restoring else "")),
        ("site", _site(sae)),
        ("inference threshold", "calibrated" if sae.calibrated else "none yet: calibrate before use"),
    ]
    if cfg.prefixes:
        rows.append(("Matryoshka prefixes", ", ".join(f"{p:,}" for p in cfg.prefixes)))
    heading = "What it is" if alone else code_span(path)
    parts = [f"## {heading}", _table(rows), _exponents(sae), "### What was measured", _measured(metadata, metrics)]
    parts += ["### Norms of the training activations", _norms(metadata), "### Training", _training(metadata)]
    return "\n\n".join(part for part in parts if part)


def _score_words(sae: SAE) -> str:
    owner, value_owner = sae.score.family.exponent_owner, sae.score.family.value_owner
    if sae.cfg.score == "inner":
        return "⟨x − c, w⟩ + β"
    words = f"exp(b) · |x − c|^a · cos(x − c, w) + β with a {_owned(owner, sae.scale_a)}"
    if sae.value_exponent is None or value_owner is None:
        return words
    return f"{words}; a code is |x − c|^δ times that, with δ {_owned(value_owner, sae.value_exponent)}"


def _owned(owner: str, value: Tensor) -> str:
    if owner == "fixed":
        return f"= {float(value.detach().reshape(-1)[0]):g} fixed"
    return "learned" + ("" if owner == "shared" else f" ({owner})")


def _exponents(sae: SAE) -> str:
    if sae.score.is_plain:
        return "The exponent a of the norm is 1: every code scales with the length of the activation."
    said = [_spread("exponent", "a", sae.scale_a, "0: blind to the norm, 1: inner product")]
    if sae.value_exponent is not None:
        said.append(_spread("value exponent", "δ", sae.value_exponent, "a + δ = 1: codes grow with the norm"))
    return "\n\n".join(said)


def _spread(name: str, symbol: str, value: Tensor, meaning: str) -> str:
    a_F = value.detach().float().cpu().reshape(-1).numpy()
    if len(a_F) == 1:
        return f"The {name} {symbol} of the norm is {a_F[0]:.4f} for all features ({meaning})."
    low, middle, high = np.quantile(a_F, [0.05, 0.5, 0.95])
    return (
        f"{name.capitalize()}s {symbol} over features: median {middle:.4f}, 5 % below {low:.4f}, 5 % above {high:.4f} "
        f"({meaning}).\n\n```\n{symbol}: {histogram_text(a_F)}\n```"
    )


def _measured(metadata: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    if not metrics or not isinstance(metrics.get("sinks_out"), Mapping):
        l0 = metadata.get("l0_calibrated")
        found = f" The threshold was calibrated to L0 {_number(l0)}." if isinstance(l0, int | float) else ""
        return f"No evaluation came with the file: fraction of variance explained (FVE) and L0 are unknown.{found}"
    lines = ["| held-out tokens | FVE | FVE, mean of batches | median token | L0 | dead |", "|---|---|---|---|---|---|"]
    for name, words in (("sinks_out", "without attention sinks"), ("sinks_in", "all")):
        one = metrics.get(name)
        if isinstance(one, Mapping):
            values = " | ".join(_number(one.get(key)) for key in ("fve", "fve_per_batch", "median_token_fve", "l0"))
            dead = _number(one.get("dead_frac", one.get("dead")))
            lines.append(f"| {_number(one.get('tokens'))} ({words}) | {values} | {dead} |")
    note = (
        "FVE is 1 − Σ|x − x̂|² / Σ|x − mean x|² about the mean of all these tokens; the second column averages FVEs of "
        "batches, each about its own mean, as other libraries report it."
    )
    counts, edges = (_reach(metrics["sinks_out"], "l0_histogram", name) for name in ("counts", "edges"))
    if isinstance(counts, Sequence) and isinstance(edges, Sequence) and sum(counts):
        note += f"\n\n```\nactive features per token: {edges[0]:g} |{_bars(counts)}| {edges[-1]:g}\n```"
    return "\n".join(lines) + "\n\n" + note


def _norms(metadata: Mapping[str, Any]) -> str:
    norm = metadata.get("norm_summary")
    if not isinstance(norm, Mapping) or "median_norm" not in norm:
        return "Unknown: the file does not say."
    rows = [
        ("median \\|x\\|", _number(norm.get("median_norm"))),
        ("mean \\|x\\|", _number(norm.get("mean_norm"))),
        ("largest / median", _number(norm.get("max_over_median"))),
        ("tokens looked at", _number(norm.get("window_tokens"))),
    ]
    quantiles = norm.get("quantiles")
    if isinstance(quantiles, Sequence) and len(quantiles) == 9:
        levels = "0, 1, 5, 25, 50, 75, 95, 99, 100 %"
        rows.append((f"\\|x\\| at {levels}", ", ".join(map(_number, quantiles))))
    rows.append(("training filter", _filter(metadata)))
    return _table(rows)


def _filter(metadata: Mapping[str, Any]) -> str:
    policy = _reach(metadata, "filter", "policy")
    if not isinstance(policy, Mapping):
        return "unknown"
    share = _reach(metadata, "norm_summary", "filtered_frac")
    dropped = f"; it drops {100 * share:.2f} % of tokens" if isinstance(share, int | float) else ""
    if policy.get("kind") == "norm":
        return f"tokens of at least {_number(policy.get('factor'))} × the median norm were left out{dropped}"
    return {"none": "none", "position_0": f"the first token of each sequence was left out{dropped}"}.get(
        str(policy.get("kind")), markdown(policy.get("kind"))
    )


def _training(metadata: Mapping[str, Any]) -> str:
    recipe = metadata.get("recipe") if isinstance(metadata.get("recipe"), Mapping) else {}
    training, data = _reach(recipe, "training") or {}, _reach(recipe, "data") or {}
    kind = _reach(metadata, "perturbation", "kind")
    perturbed = "none" if kind in (None, "none") else f"{markdown(kind)}, put on the activations on purpose"
    rows = [
        ("model", _model(metadata)),
        ("text", markdown(_joined(data.get("corpus") or metadata.get("dataset") or "unknown"))),
        ("context", _number(data.get("context") or metadata.get("context"))),
        ("tokens", _number(metadata.get("tokens"))),
        ("steps × tokens per step", f"{_number(training.get('steps'))} × {_number(training.get('batch_tokens'))}"),
        ("learning rate", _number(_reach(training, "optimizer", "lr"))),
        ("norm perturbation", perturbed),
        ("seed", markdown(metadata.get("seed", "unknown"))),
        ("commit", code_span(metadata["commit"]) if metadata.get("commit") else "unknown"),
    ]
    text = _table(rows)
    if recipe:
        hidden = json.loads(json.dumps({k: v for k, v in recipe.items() if k != "arms"}, default=str))
        body = json.dumps(hidden, indent=1).replace("```", "'''")
        text += f"\n\n<details><summary>The recipe, whole</summary>\n\n```json\n{body}\n```\n\n</details>"
    return text


def _loading(repo: str, path: str) -> str:
    place, theirs = repo, "SAE.load_from_disk('sae')  # the folder pulled above"
    if path:
        place, theirs = f"{repo}:{path}", f"SAE.from_pretrained({repo!r}, {path!r})"
    return (
        "## How to load it\n\nWith cosae:\n\n"
        f"```python\nimport cosae\nfrom cosae.interop.hub import pull\n\n"
        f"sae = cosae.load(pull({place!r}, out='sae'))\n"
        "codes = sae.encode(x)  # x (..., d_in)\n```\n\n"
        "With SAELens (cosae's import makes the cosine scores known to it):\n\n"
        f"```python\nimport cosae.interop.saelens.plugin\nfrom sae_lens import SAE\n\nsae = {theirs}\n```"
    )


def _warning(sae: SAE) -> str:
    median = _reach(sae.metadata, "norm_summary", "median_norm")
    known = f" (median {_number(median)} in training)" if isinstance(median, int | float) else ""
    if sae.score.is_plain and sae.cfg.frame == "raw":
        body = (
            "This SAE scores by inner product: activations that are twice as long give codes about twice as large, and "
            "more features pass the threshold."
        )
    else:
        body = (
            "A cosine score does not shrink with the activation: tokens far shorter or longer than those of training "
            "(and attention sinks, where training left them out) are still given features at nearly full strength."
        )
    return (
        f"## If norms differ from training\n\n{body} Compare the norms of your activations{known} with the table above "
        "before you rely on its codes; `cosae audit` does that and says what changes."
    )


def _model(metadata: Mapping[str, Any]) -> str:
    model = metadata.get("model")
    if not isinstance(model, str) or not model:
        return "a model the file does not name"
    return "cosae's embedded model" if model == "embedded" else code_span(model)


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _site(sae: SAE) -> str:
    names = dict.fromkeys(str(sae.metadata[n]) for n in ("site", "hook_name", "hf_hook_name") if sae.metadata.get(n))
    return " = ".join(code_span(name) for name in names) or "a site the file does not name"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "unknown" if value is None else markdown(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _reach(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
