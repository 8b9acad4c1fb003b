"""Train a standard and a cosine SAE on one tensor, on the same batches, and compare them.

python examples/fit_tensor.py [--steps 300]
"""

import argparse

import cosae
from cosae.activations.synthetic import SyntheticSource, World

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps

# any float tensor (N, d) works; in this one the norm of a token does not depend on its content
x = SyntheticSource(World(d_in=64, n_features=256, norm="log_normal", sigma=0.7)).sample(40_000)[0].x_ND
run = cosae.fit(x, ["standard", "cosine"], d_sae=512, k=8, steps=steps, lr=3e-3, evaluate=True)

print(f"{'arm':<10} {'FVE':>6} {'median token FVE':>17} {'L0':>6} {'a':>6}")
for name, sae in run.saes.items():
    found = run.evaluation["reconstruction"][name]["sinks_out"]
    a = float(sae.scale_a.detach())
    print(f"{name:<10} {found['fve']:6.3f} {found['median_token_fve']:17.3f} {found['l0']:6.2f} {a:6.2f}")
for row in run.evaluation["paired_fve"]:
    if row["sinks"] == "sinks_out":
        interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        print(f"FVE of {row['arm']} − {row['versus']}: {row['difference']:+.3f} {interval}")

codes = run.saes["cosine"].encode(x[:3])
for token in range(3):
    entries = slice(int(codes.offset_B1[token]), int(codes.offset_B1[token + 1]))
    print(f"row {token}: features {codes.feature_E[entries].tolist()}")
