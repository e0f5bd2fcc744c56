"""How many samples a second come out of a cache: random batches of 32 from stores against one file per sample, .npz and a WebDataset tar.

A sample is a latent and the states of its caption, in fp16: 4×64×64 (or moments, 8×64×64) with 77×768 of CLIP, with 128×4096 of T5, or with as
many rows of T5 as the caption has tokens (30 in the middle), filled up with zeros on reading. What others store of a sample lies in one file, which
is to their advantage; the tar is read in its own order, for it has no other. All in the page cache, one process, the ways taking turns; ratios are
those of the same turn. `--ways` compares ways to read the same file, `--find` looks up keys, `--cold` drops the pages before.

    OMP_NUM_THREADS=1 python tests/bench/cache.py [--samples 1000] [--turns 9] [--seconds 0.4] [--lmdb] [--ways] [--find 10000000] [--cold]
"""

import argparse
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from difflit.caching import Recipe, Store, _Keys

BATCH, TOKENS = 32, 128
CASES = {"latents 4×64×64, text 77×768": (4, 77, 768, False), "moments 8×64×64, text 77×768": (8, 77, 768, False),
         "latents 4×64×64, T5 128×4096": (4, TOKENS, 4096, False), "latents 4×64×64, T5 ragged": (4, TOKENS, 4096, True)}


def samples(case, count):
    """Latents and states; a few rows of noise are made and used again, the readers do not mind."""
    channels, tokens, width, ragged = CASES[case]
    draw = np.random.default_rng(0)
    noise = torch.from_numpy(draw.standard_normal((tokens, width), np.float32)).half()
    for _ in range(count):
        length = min(tokens, int(draw.lognormal(np.log(30), 0.5)) + 1) if ragged else tokens
        yield {"latent": torch.from_numpy(draw.standard_normal((channels, 64, 64), np.float32)).half(), "states": noise[:length].clone()}


def fill(folder, case, count, lmdb):
    """The same samples in every form."""
    channels, tokens, width, ragged = CASES[case]
    pictures = Store(folder, Recipe("latents", "vae", "0", (channels, 64, 64), "fp16"))
    texts = Store(folder, Recipe("text", "t5" if ragged else "clip", "0", (tokens, width), "fp16", ragged=ragged))
    keys = np.stack([np.arange(count), np.arange(count)], 1).astype(np.uint64)
    (folder / "files").mkdir()
    (folder / "npz").mkdir()
    base = lmdb.open(str(folder / "lmdb"), map_size=1 << 36) if lmdb else None
    made = []
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for i, sample in enumerate(samples(case, count)):
            save_file(sample, folder / "files" / f"{i}.safetensors")
            np.savez(folder / "npz" / f"{i}.npz", **{k: v.numpy() for k, v in sample.items()})
            for name, value in sample.items():
                buffer = io.BytesIO()
                np.save(buffer, value.numpy())
                entry = tarfile.TarInfo(f"{i:06}.{name}.npy")
                entry.size = buffer.tell()
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
            if base:
                with base.begin(write=True) as writing:
                    writing.put(str(i).encode(), save(sample))
            made.append(sample)
            if len(made) == 100 or i == count - 1:
                here = keys[i + 1 - len(made) : i + 1]
                pictures.append(here, torch.stack([m["latent"] for m in made]))
                texts.append(here, [m["states"] for m in made])
                made = []
    return pictures, texts, pictures.find(keys), texts.find(keys), base


def together(batch, tokens):
    """Samples as a batch, as a collate function makes it."""
    states, mask = torch.zeros(len(batch), tokens, batch[0]["states"].shape[1], dtype=torch.float16), torch.zeros(len(batch), tokens, dtype=torch.bool)
    if all(len(b["states"]) == tokens for b in batch):
        states, mask = torch.stack([b["states"] for b in batch]), mask.fill_(True)
    else:
        for i, b in enumerate(batch):
            states[i, : len(b["states"])], mask[i, : len(b["states"])] = b["states"], True
    return torch.stack([b["latent"] for b in batch]), states, mask


def from_tar(path):
    """Samples of a tar, again and again, by webdataset if it is there."""
    try:
        import webdataset
    except ImportError:
        webdataset = None
    while True:
        if webdataset:
            for s in webdataset.WebDataset(str(path), shardshuffle=False).decode():
                yield {"latent": torch.from_numpy(s["latent.npy"]), "states": torch.from_numpy(s["states.npy"])}
            continue
        with tarfile.open(path, "r|") as tar:
            sample = {}
            for entry in tar:
                sample[entry.name.split(".")[1]] = torch.from_numpy(np.load(io.BytesIO(tar.extractfile(entry).read())))
                if ".states" in entry.name:
                    yield sample
                    sample = {}


def readers(folder, case, count, lmdb):
    """For each form a function that gives a batch of the samples with these numbers."""
    from safetensors.torch import load

    tokens = CASES[case][1]
    pictures, texts, picture_rows, text_rows, base = fill(folder, case, count, lmdb)
    tar = from_tar(folder / "samples.tar")

    def npz(i):
        with np.load(folder / "npz" / f"{i}.npz") as found:
            return {k: torch.from_numpy(found[k]) for k in ("latent", "states")}

    def of_lmdb(numbers):
        with base.begin(buffers=False) as reading:
            return together([load(reading.get(str(i).encode())) for i in numbers], tokens)

    ways = {
        "store": lambda numbers: (pictures.read(picture_rows[numbers]), texts.read_text(text_rows[numbers])),
        "file each, .safetensors": lambda numbers: together([load_file(folder / "files" / f"{i}.safetensors") for i in numbers], tokens),
        "file each, .npz": lambda numbers: together([npz(i) for i in numbers], tokens),
        "webdataset tar": lambda numbers: together([next(tar) for _ in numbers], tokens),
    } | ({"lmdb": of_lmdb} if base else {})
    check, plain = ways["store"](np.arange(BATCH)), ways["file each, .safetensors"](np.arange(BATCH))
    assert torch.equal(check[0], plain[0]) and torch.equal(check[1]["states"], plain[1]) and torch.equal(check[1]["mask"], plain[2])
    return ways


def turn(read, count, seconds, seed):
    """Samples a second of one way."""
    draw, done, start = np.random.default_rng(seed), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        read(draw.integers(0, count, BATCH))
        done += BATCH
    return done / (time.perf_counter() - start)


def race(ways, count, turns, seconds, first):
    """Medians, spreads, and ratios of the same turn."""
    for read in ways.values():
        read(np.arange(BATCH))
    rates = {name: [] for name in ways}
    for t in range(turns):
        for name, read in ways.items():
            rates[name].append(turn(read, count, seconds, t))
    for name, found in rates.items():
        ratio = [a / b for a, b in zip(rates[first], found)]
        print(f"  {name:26} {statistics.median(found) / 1e3:8.1f} k/s ({min(found) / 1e3:.1f}…{max(found) / 1e3:.1f})   "
              f"{first} ×{statistics.median(ratio):.1f} ({min(ratio):.1f}…{max(ratio):.1f})", flush=True)


def ways_to_read(folder, count, shape):
    """The same cells by mapping and by reading, into new memory and into memory used again."""
    store = Store(folder, Recipe("latents", "vae", str(shape), shape, "fp16"))
    keys = np.stack([np.arange(count), np.arange(count)], 1).astype(np.uint64)
    for i in range(0, count, 100):
        store.append(keys[i : i + 100], torch.randn(len(keys[i : i + 100]), *shape))
    rows, items = store.find(keys), int(np.prod(shape))
    mapped = torch.from_numpy(np.memmap(store.rows_file, np.float16, "c", shape=(len(store._cells), items)))
    out, handle, size = torch.empty(BATCH, items, dtype=torch.float16), os.open(store.rows_file, os.O_RDONLY), items * 2

    words = np.empty((BATCH, items), np.int16)

    def preadv(numbers, out):
        view = memoryview(out.numpy().reshape(-1)).cast("B")
        for place, row in enumerate(rows[numbers].tolist()):
            os.preadv(handle, [view[place * size : (place + 1) * size]], row * size)

    return {
        "store": lambda n: store.read(rows[n]),
        "numpy.take, memory again": lambda n: np.take(store._cells, rows[n], 0, words, "clip"),
        "numpy.take, new memory": lambda n: np.take(store._cells, rows[n], 0),
        "index_select, memory again": lambda n: torch.index_select(mapped, 0, torch.from_numpy(rows[n]), out=out),
        "index_select, new memory": lambda n: torch.index_select(mapped, 0, torch.from_numpy(rows[n])),
        "preadv, memory again": lambda n: preadv(n, out),
        "preadv, new memory": lambda n: preadv(n, torch.empty(BATCH, items, dtype=torch.float16)),
    }


def cold(folder, count, turns):
    """Samples a second when no page is in memory: every sample once, in random order, through one thread and through eight."""
    ways = readers(folder, "moments 8×64×64, text 77×768", count, None)
    for threads in (1, 8):
        for name in ("store", "file each, .safetensors"):
            rates = []
            for t in range(turns):
                for path in folder.rglob("*"):
                    if path.is_file():
                        with open(path, "rb") as file:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                order = np.random.default_rng(t).permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)
                start = time.perf_counter()
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda n, read=ways[name]: read(n) and None, order))
                rates.append(order.size / (time.perf_counter() - start))
            print(f"  {name:26} {threads} threads {statistics.median(rates) / 1e3:8.1f} k/s ({min(rates) / 1e3:.1f}…{max(rates) / 1e3:.1f})", flush=True)


def find(count):
    """Looking keys up among many."""
    keys, table = np.random.default_rng(0).integers(0, 2**63, (count, 2), np.uint64), _Keys()
    start = time.perf_counter()
    table.add(keys, np.arange(count), np.ones(count, np.int64))
    print(f"  {count} keys taken in: {time.perf_counter() - start:.1f} s")
    for many in (BATCH, min(count, 1_000_000)):
        wanted, times = keys[np.random.default_rng(1).integers(0, count, many)], []
        for _ in range(5):
            start = time.perf_counter()
            table.find(wanted)
            times.append(time.perf_counter() - start)
        print(f"  {many} of them found in {statistics.median(times) * 1e3:.3g} ms ({min(times) * 1e3:.3g}…{max(times) * 1e3:.3g})")


def check(folder, count):
    """Bytes a second of `verify`."""
    store = Store(folder, Recipe("latents", "vae", "0", (8, 64, 64), "fp16"))
    for first in range(0, count, 100):
        keys = np.stack([np.arange(first, first + 100)] * 2, 1).astype(np.uint64)
        store.append(keys, torch.randn(100, 8, 64, 64))
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        assert store.verify().whole
        rates.append(store.bytes / (time.perf_counter() - start) / 1e9)
    print(f"  verify {statistics.median(rates):.2f} GB/s ({min(rates):.2f}…{max(rates):.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a turn")
    parser.add_argument("--case", type=int, help="only this one, 0…3")
    for name in ("lmdb", "ways", "cold"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--find", type=int, default=0, help="so many keys")
    parser.add_argument("--check", action="store_true", help="how fast checksums are compared")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {BATCH}, median (least…most) of {given.turns} turns")
    lmdb = __import__("lmdb") if given.lmdb else None
    if given.find:
        return find(given.find)
    with tempfile.TemporaryDirectory() as folder:
        if given.check:
            return check(Path(folder), given.samples)
        if given.cold:
            return cold(Path(folder), given.samples, 3)
        if given.ways:
            for shape in ((4, 64, 64), (8, 64, 64), (1, 77, 768), (1, 128, 4096)):
                print("×".join(map(str, shape)))
                race(ways_to_read(Path(folder), given.samples, shape), given.samples, given.turns, given.seconds, "store")
        for number, case in enumerate(CASES if not given.ways else ()):
            if given.case in (None, number):
                place = Path(folder) / str(number)
                place.mkdir()
                print(case)
                race(readers(place, case, given.samples, lmdb), given.samples, given.turns, given.seconds, "store")
                shutil.rmtree(place)


if __name__ == "__main__":
    main()
