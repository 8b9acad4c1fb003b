"""A synthetic world with known features: which score finds and detects them if norms are random?

python examples/known_truth.py [--steps 300] [--sigma 0.7]
"""

import argparse

import cosae
from cosae.activations.synthetic import World
from cosae.recipe import Recipe

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--sigma", type=float, default=0.7, help="standard deviation of the log norm")
arguments = parser.parse_args()

arms = ["standard", "standard_unit_frame", "cosine", "cosine_per_feature"]
for norm in ("none", "log_normal"):
    world = World(d_in=24, n_features=48, l0=3, spread_steps=50, norm=norm, sigma=arguments.sigma)
    recipe = Recipe(name=norm).changed({
        "data.world": world, "d_sae": 64, "k": 3, "filter.window_tokens": 8192,
        "training.steps": arguments.steps, "training.batch_tokens": 256, "training.buffer_tokens": 8192,
        "training.optimizer.lr": 5e-3, "training.optimizer.warmup_steps": 50,
        "evaluation.held_out_tokens": 8192, "evaluation.calibration_tokens": 8192, "evaluation.resamples": 200,
    })  # fmt: skip
    run = cosae.fit(recipe, arms, evaluate=True)
    print(f"\n{run.run['setting']}\n{'arm':<20} {'recovery F1':>11} {'MCC':>6} {'FVE':>6} {'L0':>5}")
    for name, found in run.evaluation["recovery"].items():
        fve = run.evaluation["reconstruction"][name]["sinks_out"]["fve"]
        print(f"{name:<20} {found['f1']:11.3f} {found['mcc']:6.3f} {fve:6.3f} {found['l0']:5.2f}")
