"""How many samples a second a selection judges and finds duplicates among, on one core.

The table is made up: as many rows as asked for, with the columns of an index of tars; one in twenty pictures is a copy, one in twenty a near-copy
with two bits of its perceptual hash flipped. Captions are judged on a million rows, near-duplicates are sought among a million hashes.

    OMP_NUM_THREADS=1 python tests/bench/selection_rate.py [--rows 10000000] [--repeats 3]
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from difflit.files import digest_bytes
from difflit.selection import SeenBefore, exact_duplicates, near_duplicates, parse_rules, select

WHERE = ("punsafe < 0.5 and similarity >= 0.28 and aesthetic > 4 and watermark < 0.8 and short_side >= 64 and 0.5 <= aspect <= 2 "
         "and 3 <= caption_chars <= 300 and class != 'map'")


class Table:
    """Columns as an index has them, mapped from files in a folder."""

    categories = {"class": ["photo", "drawing", "map"]}
    shards: list = []

    def __init__(self, folder, rows):
        rng = np.random.default_rng(0)
        score = lambda: np.where(rng.random(rows, np.float32) < 0.05, np.float32("nan"), rng.random(rows, np.float32))
        made = {"punsafe": score(), "similarity": score(), "aesthetic": score() * 10, "watermark": score()}
        made |= {side: rng.integers(20, 2000, rows, np.int32) for side in ("width", "height", "caption_chars")}
        made |= {"class": rng.integers(-1, 3, rows, np.int32), "split": np.full(rows, -1, np.int8), "lot": hashes(rng, rows), "hash64": hashes(rng, rows)}
        copies = rng.permutation(rows)[: rows // 10]
        made["hash64"][copies[: rows // 20]] = made["hash64"][copies[rows // 20 : rows // 20 * 2]]
        self.folder, self.rows = folder, rows
        for name, column in made.items():
            np.save(folder / f"{name}.npy", column)
        self.columns = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in made}

    def __len__(self):
        return self.rows

    def digest(self):
        return digest_bytes(f"made up, {self.rows} rows")

    def captions(self, ids):
        return [f"a photograph of harbour number {i} in the rain" for i in ids]

    ids = captions


def hashes(rng, count):
    """Random 64-bit numbers."""
    return rng.integers(0, 2**64, count, np.uint64, endpoint=False)


def rate(count, work, repeats):
    """The median rate in millions a second and the spread, over repeats."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(count / (time.perf_counter() - start) / 1e6)
    return f"{statistics.median(rates):.3g} M/s ({min(rates):.3g}…{max(rates):.3g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table, million = Table(Path(folder), given.rows), np.arange(min(given.rows, 1_000_000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rules = parse_rules(WHERE)
        print(f"{given.rows:,} rows, {len(rules.rules)} rules over columns: {rate(given.rows, lambda: rules.accept(table), given.repeats)}")
        for text in (r"matches(caption, r'\bstock\b')", r"matches(caption, r'(\w+)s?\s\1')", "'stock' in caption"):
            print(f"{text}: {rate(len(million), lambda: parse_rules(text).accept(table, million), 1)}")  # noqa: B023
        print(f"exact duplicates: {rate(given.rows, lambda: exact_duplicates(table.columns['hash64']), given.repeats)}")
        start = time.perf_counter()
        chosen = select(table, WHERE, split="train", unique="exact")
        print(f"select: {len(chosen):,} of {given.rows:,} in {time.perf_counter() - start:.2f} s", end="; ")
        start = time.perf_counter()
        select(table, WHERE, split="train", unique="exact")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"again, from what was kept: {1e3 * (time.perf_counter() - start):.1f} ms; {peak / 1024:.0f} MB more memory at the most")
        print(chosen)
    rng = np.random.default_rng(1)
    looks = hashes(rng, 1_000_000)
    looks[:50_000] = looks[50_000:100_000] ^ (np.uint64(1) << rng.integers(0, 64, 50_000).astype(np.uint64)) ^ np.uint64(1)
    for distance in (2, 4, 6):
        start = time.perf_counter()
        kept = near_duplicates(looks, distance).sum()
        print(f"near-duplicates among 1,000,000 hashes up to {distance} bits: {time.perf_counter() - start:.2f} s, {1_000_000 - kept:,} found")
    seen, contents = SeenBefore(2_000_000), [os.urandom(100) for _ in range(500_000)]
    print(f"SeenBefore: {rate(len(contents), lambda: [seen.add(c) for c in contents], 1)} of 100 bytes")


if __name__ == "__main__":
    main()
