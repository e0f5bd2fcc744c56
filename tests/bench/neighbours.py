"""Exact nearest neighbours: difflit against faiss's flat index, in turns, with the same number of threads.

python tests/bench/neighbours.py [--queries 2000] [--gallery 100000] [--dimensions 512] [--rounds 5]; needs faiss-cpu for the comparison."""

import argparse
import platform
import statistics
import time

import torch

from difflit.neighbours import neighbours


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--gallery", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads; {args.queries} queries × {args.gallery} × {args.dimensions}")
    draw = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, args.dimensions, generator=draw) for n in (args.queries, args.gallery))
    try:
        import faiss

        faiss.omp_set_num_threads(args.threads)
    except ImportError:
        faiss = None

    def theirs(k):
        index = faiss.IndexFlatL2(args.dimensions)
        index.add(gallery.numpy())
        return index.search(queries.numpy(), k)

    def took(call):
        """What it gives, seconds on the clock, seconds of processor time."""
        start = time.perf_counter(), time.process_time()
        return call(), time.perf_counter() - start[0], time.process_time() - start[1]

    for k in (1, 50):
        ours, other, worked, same = [], [], [], 1.0
        for _ in range(args.rounds):
            found, seconds, mine = took(lambda: neighbours(queries, gallery, k))  # noqa: B023
            ours.append(seconds)
            if faiss is not None:
                (_, index), seconds, its = took(lambda: theirs(k))  # noqa: B023
                other.append(seconds)
                worked.append(its / mine)
                same = float((found.index[:, 0] == torch.from_numpy(index[:, 0])).double().mean())
        line = f"k = {k}: difflit {statistics.median(ours):.2f} s ({min(ours):.2f}…{max(ours):.2f})"
        if other:
            ratios = sorted(b / a for a, b in zip(ours, other))
            line += (f", faiss {statistics.median(other):.2f} s ({min(other):.2f}…{max(other):.2f}); speed in units of faiss's "
                     f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}…{ratios[-1]:.2f}), by processor time {statistics.median(worked):.2f} "
                     f"({min(worked):.2f}…{max(worked):.2f}); the same nearest for {same:.4f}")
        print(line, flush=True)


if __name__ == "__main__":
    main()
