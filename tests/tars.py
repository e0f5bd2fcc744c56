"""Small tars of photographs, as img2dataset would have written them, for the tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(number: int, size: tuple[int, int] = (96, 72), **settings) -> bytes:
    """A JPEG with something of everything in it: slopes, edges, grain; another for each number."""
    random = np.random.default_rng(number)
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    waves = [np.sin(x * random.uniform(2, 20) + y * random.uniform(2, 20) + random.uniform(0, 6)) for _ in range(3)]
    pixels = np.stack(waves, -1) * 80 + 128 + random.normal(0, 8, (height, width, 3))
    pixels[(x - 0.4) ** 2 + (y - 0.4) ** 2 < random.uniform(0.01, 0.08)] = random.integers(0, 255, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90, **settings)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


SIZES = ((96, 72), (72, 96), (80, 80))


def write_tars(folder: Path, shards: int = 3, each: int = 20, broken: tuple[int, ...] = ()) -> Path:
    """Tars of JPEG, caption and metadata; the pictures whose numbers are in `broken` are cut off in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(each):
                number = shard * each + i
                picture = photograph(number, SIZES[number % 3])
                key, kind = f"{number:09d}", "cat" if number % 5 == 0 else "dog"
                meta = {"key": key, "punsafe": (number % 10) / 10, "similarity": 0.25 + number / 1000, "kind": kind, "width": 96, "height": 72}
                add(tar, f"{key}.jpg", picture[: len(picture) // 2] if number in broken else picture)
                add(tar, f"{key}.txt", f"photograph number {number} of a {kind}".encode())
                add(tar, f"{key}.json", json.dumps(meta).encode())
    return folder
