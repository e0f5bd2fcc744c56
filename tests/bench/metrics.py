"""What a Fréchet distance costs at Inception's 2048 dimensions: difflit against torchmetrics, and against scipy's matrix root as in pytorch-fid.

All three get the same moments of the same features, and take turns. *Ours* is `frechet_distance` from two `Moments`, their groups still to be pooled; *each
further one* is a distance with a group left out against the same reference, of which an interval needs ten (its value is another one, of course);
*torchmetrics* is its `_compute_fid` (`eigvals` of the product); *sqrtm* is `scipy.linalg.sqrtm` of the product. With fewer pictures than dimensions there is
also `frechet_distance_of_features`. Besides: how fast pictures are added to the moments, and what the moments weigh.

    OMP_NUM_THREADS=1 python tests/bench/metrics.py [--rounds 3] [--dimensions 2048] [--pictures 4096 1000] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from difflit.metrics import FrechetDistances, Moments, frechet_distance, frechet_distance_of_features
from difflit.randomness import normal


def machine():
    "The processor, as Linux names it, and what computes."
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] if os.path.exists("/proc/cpuinfo") else []
    return (f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; "
            f"torch {torch.__version__}, scipy {scipy.__version__}")


def timed(run):
    start = time.perf_counter()
    value = float(run())
    return time.perf_counter() - start, value


def features(name, n, dimensions):
    "Correlated, positive, with a spectrum that falls as that of real features does."
    scale = torch.arange(1, dimensions + 1) ** -0.5
    turned = torch.linalg.qr(normal(0, "turn", range(dimensions), (dimensions,)))[0]
    return (normal(0, name, range(n), (dimensions,)) * scale) @ turned + 0.4


def by_root(a, b):
    "As pytorch-fid does it."
    s1, s2 = a.covariance.numpy(), b.covariance.numpy()
    return float((a.mean - b.mean).square().sum()) + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real


def compare(n, dimensions, rounds):
    "Seconds of each way in turns, and by how much the values differ."
    tables = [features("generated", n, dimensions), features("real", n, dimensions) * 1.1]
    moments = [Moments(dimensions) for _ in tables]
    start = time.perf_counter()
    for table, into in zip(tables, moments):
        for places in torch.arange(n).split(256):
            into.update(table[places], places)
    rate = 2 * n / (time.perf_counter() - start)
    a, b = (m.pooled() for m in moments)
    ways = {"ours, from moments": lambda: frechet_distance(*moments)}
    further, left_out = FrechetDistances(*moments), iter(range(10))
    ways["ours, each further one"] = lambda: further.of(sorted(set(range(10)) - {next(left_out)}))
    if n <= dimensions:
        ways["ours, from features"] = lambda: frechet_distance_of_features(*tables)
    ways |= {"torchmetrics": lambda: _compute_fid(a.mean, a.covariance, b.mean, b.covariance), "sqrtm": lambda: by_root(a, b)}
    seconds, values = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            spent, values[name] = timed(way)
            seconds[name].append(spent)
    weight = sum(t.numel() * t.element_size() for t in moments[0].state().values())
    print(f"{n} pictures, {dimensions} dimensions: state {weight / 1e6:.1f} MB, {rate:.0f} pictures/s added in batches of 256")
    found = {"state_bytes": weight, "pictures_per_second": rate}
    for name in ways:
        line = f"  {name:22} {statistics.median(seconds[name]):6.2f} s, value {values[name]:.9f}"
        found[name] = {"seconds": seconds[name], "value": values[name]}
        for ours in (w for w in ways if w.startswith("ours") and not name.startswith("ours")):
            ratios = sorted(t / o for t, o in zip(seconds[name], seconds[ours]))
            line += f"; {statistics.median(ratios):.1f}× ({ratios[0]:.1f}…{ratios[-1]:.1f}) the time of {ours}"
            found[name][f"ratio to {ours}"] = [ratios[0], statistics.median(ratios), ratios[-1]]
        print(line, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 11))
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--pictures", type=int, nargs="*", default=[4096, 1000])
    parser.add_argument("--json")
    asked = parser.parse_args()
    print(machine())
    found = {"machine": machine(), **{str(n): compare(n, asked.dimensions, asked.rounds) for n in asked.pictures}}
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
