"""A run's directory with plausible numbers, as `train` would leave it: what the report is tested and looked at with."""

import json
from pathlib import Path

import numpy as np

ARMS = {
    "standard": ("inner", "raw", None),
    "standard, unit frame": ("inner", "unit", None),
    "unit-row": ("inner_unit", "raw", None),
    "global": ("cosine", "raw", 0.31),
    "per-feature": ("cosine_per_feature", "raw", 0.12),
    "base+delta": ("cosine_base_delta", "raw", 0.22),
}
_FLOORS = {"token_identity": -0.12, "norm": -0.3, "best_dimension": -0.1, "random_sae": -0.2, "logistic": 0.06}
_RULES = ("auroc", "mean_difference")


def write_run(
    path, name="natural", setting="natural", arms=ARMS, concepts=60, sinks=True, gain=0.004, seed=0, world=False
):
    """A finished, evaluated, probed run at `path`; gain is how much better the last arms are than the first."""
    path = Path(path)
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    edge = {arm: gain * i for i, arm in enumerate(arms)}
    _write(path / "run.json", _run(name, setting, arms))
    lines = [json.dumps(_metrics(step, arms, edge, rng)) for step in range(0, 2401, 40)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluation = {
        "tokens": 262144,
        "documents": 311,
        "norms": _norms(rng, sinks),
        "reconstruction": {arm: _reconstruction(edge[arm], arms[arm][0], sinks) for arm in arms},
        "paired_fve": [
            {"arm": arm, "versus": next(iter(arms)), "sinks": s, "difference": edge[arm],
             "low": edge[arm] - 0.003, "high": edge[arm] + 0.003, "median_token_difference": edge[arm] / 2,
             "median_token_low": edge[arm] / 2 - 0.002, "median_token_high": edge[arm] / 2 + 0.002}
            for s in ("sinks_in", "sinks_out") for arm in list(arms)[1:]
        ],
        "exponents": {arm: _exponent(*arms[arm], rng) for arm in arms},
        "probing": {s: _probing(arms, edge, concepts, rng) for s in ("sinks_out", "sinks_in")} if concepts else None,
        "features": {arm: [_feature(i) for i in (7, 130)] for arm in list(arms)[:2]},
        "recovery": {arm: {"mcc": 0.7 + edge[arm], "f1": 0.6, "n_tokens": 4096} for arm in arms} if world else None,
    }  # fmt: skip
    _write(path / "evaluation.json", evaluation)
    return path


def _feature(number):
    example = {"value": 3.25, "before": "def f(x):\n    ", "token": "return", "after": " x + 1"}
    return {"feature": number, "density": 0.0123, "largest": 3.25, "examples": [example, {**example, "value": 2.0}]}


def _write(path, value):
    path.write_text(json.dumps(value, allow_nan=False))


def _run(name, setting, arms):
    return {
        "format": "cosae-run", "version": 2, "status": "finished", "name": name, "setting": setting,
        "seconds": 301.4, "commit": "4a1b89c0ffee4a1b89c0ffee", "seed": 42, "tokens": 4915200,
        "stream_digest": "9f2c1d0be71a55e3",
        "packages": {"torch": "2.13.0", "transformers": "4.57.1", "python": "3.11.9"},
        "hardware": {"cpu": "x86_64", "cores": 2, "device": "cpu"},
        "norm_summary": {"window_tokens": 65536, "median_norm": 21.3, "mean_norm": 21.9, "max_over_median": 2.6,
                       "quantiles": [9.1, 12.0, 14.1, 18.4, 21.3, 24.8, 30.2, 35.5, 55.0], "total_variance": 402.0,
                       "filtered_frac": 0.0039},
        "filter": {"policy": {"kind": "position_0", "factor": 10.0, "window_tokens": 65536,
                              "drop_special": False}, "median_norm": 21.3, "seen_tokens": 65536},
        "source": {"model": "embedded", "site": "resid_post.4", "corpus": "pylib", "corpus_digest": "77ab01"},
        "recipe": {"steps": 2400, "batch_tokens": 2048,
                   "schedule": {"lr": 3e-4, "warmup": 100, "decay_from": 0.8, "shape": "linear"},
                   "loss": {"reconstruction": "mean over d", "aux_k": 0.03125, "frame": "raw"},
                   "filter": {"policy": "position_0"}, "activations": {"context": 256, "pack": True}},
        "arms": {
            arm: {"d_sae": 3072, "k": 32, "score": score, "selector": "batch_topk", "frame": frame, "seed": 42,
                  "kernel": "cpu", "tokens_per_second": 17000 + 311 * i, "a_moving": a is not None and a > 0.3,
                  "stopped": None, "l0_target": 32, "l0_calibrated": 32.02}
            for i, (arm, (score, frame, a)) in enumerate(arms.items())
        },
    }  # fmt: skip


def _metrics(step, arms, edge, rng):
    t = step / 2400
    row = {}
    for arm, (score, frame, a) in arms.items():
        fve = 0.86 * (1 - np.exp(-9 * t - 0.05)) + edge[arm] + rng.normal(0, 0.004)
        row[arm] = {
            "loss": (1 - fve) * (1.0 if frame == "unit" else 2.1), "fve": fve, "l0": 32 + rng.normal(0, 0.2),
            "dead_frac": 0.09 * t * (1 - t) + 0.002 * len(arm) * t, "lr": 3e-4,
            "a": None if a is None else a * (1 - np.exp(-3 * t)),
            "a_quantiles": [a * t * q for q in (-1, 0.4, 1, 1.7, 3)] if score.endswith(("feature", "delta")) else None,
        }  # fmt: skip
    return {"step": step, "tokens": step * 2048, "seconds": step * 0.12, "arms": row}


def _norms(rng, sinks):
    norms = np.concatenate([21.3 * rng.lognormal(0, 0.2, 20000), 52 * rng.lognormal(0, 0.02, 80 if sinks else 0)])
    edges = np.geomspace(norms.min() * 0.999, norms.max() * 1.001, 65)
    return {
        "tokens": 262144, "median": 21.3, "mean": 21.8, "cv": 0.23, "largest_over_median": 2.61,
        "quantile_levels": [0, 0.5, 1], "quantiles": [9.0, 21.3, 55.6],
        "sinks_out": {"mean": 21.7, "cv": 0.2, "quantiles": [9.0, 21.3, 41.0], "largest_over_median": 2.05},
        "filter": {"removed_tokens": 1024 if sinks else 0, "removed_frac": 0.0039 if sinks else 0.0,
                   "smallest_over_median": 2.3, "largest_over_median": 2.61, "variance_frac": 0.031},
        "position_0_tokens": 1024, "position_0_over_median": 2.44,
        "log_norm_by_token": {"r2": 0.71, "tokens": 261120, "ids": 3803, "folds": 5, "split_by": "document",
                              "seed": 0},
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(norms, edges)[0].tolist(),
                      "sink_counts": np.histogram(norms[20000:], edges)[0].tolist()},
    }  # fmt: skip


def _reconstruction(edge, score, sinks):
    def numbers(fve, blown):
        quartile = [
            {"norm_low": low, "norm_high": low + 4, "tokens": 65000, "fve": fve - 0.02 + 0.01 * q,
             "fve_global": fve, "median_token_fve": fve - 0.03, "cosine": 0.95, "norm_ratio": 0.93, "l0": 32.0}
            for q, low in enumerate((9.0, 18.4, 21.3, 24.8))
        ]  # fmt: skip
        quartile[3]["fve"] = -185.1 if blown else quartile[3]["fve"]
        return {
            "tokens": 262144, "fve": fve, "fve_per_batch": fve - 0.002, "fve_per_batch_tokens": 4096,
            "median_token_fve": fve - 0.031, "cosine": 0.951, "norm_ratio": 0.94, "l0": 32.1 + edge,
            "l0_quantiles": [4, 14, 24, 31, 39, 55, 140], "dead_frac": 0.012, "rare_frac": 0.2, "rare_below": 1e-4,
            "median_norm": 21.3, "by_norm_quartile": quartile,
        }  # fmt: skip

    blown = sinks and score.startswith("inner")
    return {"sinks_in": numbers(0.78 + edge, blown), "sinks_out": numbers(0.845 + edge, False), "n_sinks": 1024}


def _exponent(score, frame, a, rng):
    if a is None:
        return {"kind": "fixed", "value": 1.0, "mean": 1.0, "quantiles": None}
    if score == "cosine":
        return {"kind": "scalar", "value": a, "mean": a, "quantiles": None}
    values = rng.normal(a, 0.15, 3072)
    counts, edges = np.histogram(values, 40)
    return {"kind": "per_feature", "mean": float(values.mean()),
            "quantiles": np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}  # fmt: skip


def _probing(arms, edge, n_concepts, rng):
    half = n_concepts // 2
    concepts = [
        {"name": f"{'keyword' if i < half else 'inside'}.concept_{i}", "group": "lexical" if i < half else "contextual",
         "description": "as named", "positives_train": 900 + i, "positives_held_out": 300 + i}
        for i in range(n_concepts)
    ]  # fmt: skip
    groups = {
        "all": np.ones(n_concepts, bool),
        "lexical": np.arange(n_concepts) < half,
        "contextual": np.arange(n_concepts) >= half,
    }
    ease = np.where(groups["lexical"], 0.95, 0.8) + rng.normal(0, 0.05, n_concepts)

    def values(shift):
        auroc = np.clip(ease + shift + rng.normal(0, 0.01, n_concepts), 0.45, 0.999)
        return {"auroc": auroc.tolist(), "average_precision": (auroc**3 * 0.7).tolist()}

    def means(found):
        return {
            group: {m: _mean(np.array(v)[chosen]) for m, v in found.items() if m != "latent"}
            for group, chosen in groups.items()
        }

    by_arm = {
        arm: {r: {"latent": [0] * n_concepts, **values(edge[arm] - 0.03 * k)} for k, r in enumerate(_RULES)}
        for arm in arms
    }
    baselines = {name: values(shift) for name, shift in _FLOORS.items()}
    base = next(iter(arms))
    return {
        "n_train": 200000, "n_held_out": 262144, "seed": 0, "min_positives": 200, "concepts": concepts,
        "arms": by_arm, "baselines": baselines,
        "summary": {arm: {r: means(f) for r, f in rules.items()} for arm, rules in by_arm.items()}
        | {name: {"baseline": means(found)} for name, found in baselines.items()},
        "paired": [
            {"arm": arm, "versus": base, "rule": r, "group": g, "metric": m,
             **_gap(np.array(by_arm[arm][r][m])[chosen] - np.array(by_arm[base][r][m])[chosen])}
            for arm in list(arms)[1:] for r in _RULES for g, chosen in groups.items()
            for m in ("auroc", "average_precision")
        ],
    }  # fmt: skip


def _mean(values):
    half = 1.96 * values.std() / len(values) ** 0.5
    return {"mean": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half)}


def _gap(values):
    found = _mean(values)
    return {"difference": found["mean"], "low": found["low"], "high": found["high"]}
