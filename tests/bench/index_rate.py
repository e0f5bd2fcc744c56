"""How fast tars are indexed, and how fast samples are read from them by number.

A LAION-like set is made (JPEGs of about 47 kB, txt, JSON of about 700 bytes, written by the WebDataset library) and stays in the page cache. Indexing
is compared with the obvious loop (tarfile, json, Pillow for the size, SHA-256) and with the WebDataset library's own reader, which only delivers bytes;
reading with a bare `pread` of the same bytes in the same order. All take turns in one process and are timed by its processor time, so that a busy machine
counts for little. Prints samples a second on one core, and how many times faster difflit is: medians over the rounds with their spread.

    OMP_NUM_THREADS=1 python tests/bench/index_rate.py [--rounds 9] [--tars 4] [--samples 1000] [--folder /tmp/…]

Measured on one of 2 cores of an AMD EPYC, medians (lowest…highest) of 9 rounds: `scan_shard` 38,145 samples/s (19,979…39,407), 6.68 (3.46…7.34) times the
obvious loop and 4.92 (2.56…5.46) times the library; `index_shards`, joined and written, once: 21,859; `read` 131,888 (127,886…134,357), 0.71 (0.70…0.75) of a
bare `pread`; with metadata 99,762 (87,963…101,458).
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from difflit.shards import ShardIndex, index_shards, scan_shard


def photograph(number):
    """A JPEG of about 47 KB, 400 by 300 pixels or so."""
    rng = np.random.default_rng(number)
    size = (int(rng.integers(340, 440)), int(rng.integers(260, 330)))
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 10, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_set(folder, tars, samples):
    """Tars as img2dataset writes them."""
    pictures = [photograph(n) for n in range(48)]
    exif = json.dumps({"Image Orientation": "Horizontal (normal)", "Image XResolution": "72", "EXIF ColorSpace": "sRGB", "EXIF ExifImageWidth": "1200"})
    for t in range(tars):
        with open(folder / f"{t:05d}.tar", "wb") as file, webdataset.TarWriter(file) as writer:
            for k in range(samples):
                n = t * samples + k
                said = {"caption": f"a photograph of thing number {n} on a beach", "url": f"https://example.com/pictures/2013/04/a-thing-{n}.jpg",
                        "key": f"{n:09d}", "status": "success", "error_message": None, "width": 400, "height": 300, "original_width": 1200,
                        "original_height": 900, "exif": exif, "sha256": "a" * 64, "punsafe": 0.01, "pwatermark": 0.1, "similarity": 0.33}
                content = pictures[n % len(pictures)] + n.to_bytes(8, "big")  # every hash another, as in life
                writer.write({"__key__": said["key"], "jpg": content, "txt": said["caption"], "json": json.dumps(said).encode()})
    return sorted(str(p) for p in folder.glob("*.tar"))


def ours(paths):
    for path in paths:
        scan_shard(path)


def plain(paths):
    """What a first script does to know the same."""
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith("jpg"):
                    Image.open(io.BytesIO(content)).size, hashlib.sha256(content).digest(), member.offset_data
                elif member.name.endswith("json"):
                    json.loads(content)


def library(paths):
    """The WebDataset library's reader, nothing decoded."""
    for _ in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
        pass


def spent(work, *arguments):
    """Seconds of processor time."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def show(name, rates, reference=None):
    """Median and spread of a rate, and of its ratio round by round."""
    ratio = ""
    if reference is not None:
        ratios = sorted(b / a for a, b in zip(rates, reference))
        ratio = f"   ours {statistics.median(ratios):.2f}× ({ratios[0]:.2f}…{ratios[-1]:.2f})"
    print(f"{name:44} {statistics.median(rates):9,.0f} samples/s ({min(rates):,.0f}…{max(rates):,.0f}){ratio}")


def measure_reading(index, rounds):
    """Random access, against the bare system call."""
    rows = np.random.default_rng(0).integers(0, len(index), 20_000).tolist()
    handles = [os.open(s.path, os.O_RDONLY) for s in index.shards]
    where = [(handles[index.columns["shard"][r]], int(index.columns["image_bytes"][r]), int(index.columns["image_offset"][r])) for r in rows]

    def bare():
        for handle, count, offset in where:
            os.pread(handle, count, offset)

    def reading(metadata):
        for row in rows:
            index.read(row, metadata)

    found = [[len(rows) / spent(*work) for work in ((bare,), (reading, False), (reading, True))] for _ in range(rounds)]
    for handle in handles:
        os.close(handle)
    pread, alone, told = zip(*found)
    show("index.read(row), hash checked", alone)
    show("index.read(row, metadata=True)", told)
    show("bare pread of the picture, random order", pread, alone)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rounds", 9), ("tars", 4), ("samples", 1000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        paths = make_set(Path(folder), chosen.tars, chosen.samples)
        total, size = chosen.tars * chosen.samples, sum(os.path.getsize(p) for p in paths)
        print(f"{total} samples in {len(paths)} tars, {size / total / 1e3:.1f} kB each")
        rounds = [[total / spent(work, paths) for work in (ours, plain, library)] for _ in range(chosen.rounds + 1)][1:]  # the first warms up
        mine, obvious, theirs = zip(*rounds)
        show("scan_shard", mine)
        show("tarfile + json + Pillow's header + SHA-256", obvious, mine)
        show("webdataset, bytes only", theirs, mine)
        start = time.process_time()
        index = index_shards(folder, folder=Path(folder) / "index", workers=1)
        first = time.process_time() - start
        again = statistics.median(spent(lambda: index_shards(folder, folder=Path(folder) / "index")) for _ in range(5))
        print(f"index_shards, joined and written: {total / first:,.0f} samples/s; nothing changed: {again * 1e3:.1f} ms")
        assert isinstance(index, ShardIndex) and len(index) == total
        measure_reading(index, chosen.rounds)


if __name__ == "__main__":
    main()
