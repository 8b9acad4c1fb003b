"""A long run grows in nothing: resident memory and the cost of a token are flat over hundreds of buffer refills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys, time
from pathlib import Path
from cosae.activations.stream import ActivationStream
from cosae.activations.synthetic import World
from cosae.recipe import Recipe
from cosae.run.execute import Logs, execute
from cosae.train.arm import Arm

seen = []
plain = ActivationStream._begin_round
def counted(self):
    plain(self)
    resident = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    seen.append((int(resident.split()[1]), time.process_time()))
ActivationStream._begin_round = counted
arms = tuple(Arm.of(s, "cosine_per_feature", selector=s) for s in ("batch_topk", "jumprelu", "gated"))
changes = {
    "d_sae": 256, "k": 4, "filter.window_tokens": 4096, "training.steps": int(sys.argv[3]),
    "training.batch_tokens": 256, "training.buffer_tokens": 4096, "training.log_every": 1,
    "training.checkpoint_every": 100, "evaluation.held_out_tokens": 1000, "evaluation.calibration_tokens": 1000,
    "evaluation.resamples": 20, "evaluation.probing": False,
}
if sys.argv[1] == "world":
    changes["data.world"] = World(d_in=32, n_features=64, l0=3, norm="log_normal")
else:
    changes |= {"data.corpus": sys.argv[4], "data.context": 64, "data.batch_sequences": 16}
execute(Recipe(name="long", arms=arms).changed(changes), Path(sys.argv[2]), logs=Logs(progress=False))
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_and_cost_are_flat_over_two_hundred_and_fifty_refills(tmp_path: Path) -> None:
    """Means of the second and the last tenth of the refills: the first tenth is where caches fill."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "world", str(tmp_path / "run"), "2100"],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seen = json.loads(done.stdout)
    assert len(seen) >= 250
    tenth = len(seen) // 10
    early, late = seen[tenth : 2 * tenth], seen[-tenth:]
    resident = [sum(kilobytes for kilobytes, _ in part) / tenth for part in (early, late)]
    cost = [(part[-1][1] - part[0][1]) / (tenth - 1) for part in (early, late)]
    print(f"{len(seen)} refills; resident {resident[0] / 1024:.1f} → {resident[1] / 1024:.1f} MiB, ", end="")
    print(f"CPU a refill {1000 * cost[0]:.1f} → {1000 * cost[1]:.1f} ms")
    assert resident[1] / resident[0] < 1.02
    assert cost[1] / cost[0] < 1.25  # of CPU time, beside whatever else the machine does
