"""Shared by all tests: the repository's folder, tiny run settings, and quiet environment variables for child processes."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = {"steps": 4, "batch_size": 8, "score_images": 8, "sampler_steps": 2, "validation_images": 16, "precision": "fp32", "workers": 0}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True, scope="session")
def quiet():
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


CAPTIONS = {
    "latin": "a café in São Paulo", "cyrillic": "красная площадь", "arabic": "مدينة في الليل", "hebrew": "עיר בלילה", "chinese": "夜晚的城市",
    "japanese": "夜の街", "korean": "밤의 도시", "devanagari": "रात में शहर", "thai": "เมืองในเวลากลางคืน", "emoji": "a city 🌃 at night",
}


def photograph(number: int, size=(90, 60)) -> Image.Image:
    "Smooth random colours, different for each number."
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def save(folder: Path, name: str, image: Image.Image, caption: str | bytes | None, **settings) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    "A folder with every kind of trouble; ten pictures in it are good."
    folder = tmp_path / "messy"
    turned = Image.Exif()
    turned[0x0112] = 8
    grey16 = Image.fromarray(np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16))
    good = [
        ("latin.jpg", photograph(0), {}),
        ("cyrillic.gif", photograph(1).quantize(32), {}),
        ("arabic.jpg", photograph(2).convert("CMYK"), {}),
        ("hebrew.png", photograph(3).convert("RGBA"), {}),
        ("chinese.png", grey16, {}),
        ("japanese.jpg", photograph(5), {"exif": turned}),
        ("korean.webp", photograph(6, (300, 40)), {}),
        ("deep/er/devanagari.tif", photograph(7).convert("LAB"), {}),
        ("thai.png", photograph(8).convert("1"), {}),
        ("emoji.bmp", photograph(9, (7, 9)), {}),
    ]
    for name, image, settings in good:
        save(folder, name, image, CAPTIONS[Path(name).stem], **settings)
    whole = (folder / "latin.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.txt").write_text("cut in half")
    (folder / "fake.png").write_text("no picture at all")
    (folder / "fake.txt").write_text("a lie")
    save(folder, "silent.png", photograph(20), None)
    save(folder, "utf16.png", photograph(21), "wide letters".encode("utf-16"))
    save(folder, "bomb.png", Image.new("1", (11000, 11000)), "a bomb")
    (folder / "alone.txt").write_text("alone")
    save(tmp_path, "outside.png", photograph(22), None)
    (folder / "escape.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    return folder
