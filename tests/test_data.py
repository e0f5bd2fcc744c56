"""What crosses the data notebooks: messy folders through to batches, all sources alike, nothing lost in silence."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, photograph, save

from difflit.data import DataError, Sample
from difflit.folders import FolderSource
from difflit.loading import Loader, open_source
from difflit.sources import ShapesSource



def test_messy_folder_trains(messy: Path) -> None:
    train, validation = FolderSource(messy), open_source(str(messy), split="validation")
    samples = {s.id: s for source in (train, validation) for s in source}
    assert {Path(i).stem: s.caption for i, s in samples.items()} == CAPTIONS
    assert all(s.image.mode == "RGB" for s in samples.values())
    assert samples["japanese.jpg"].image.size == (60, 90)
    with Loader(train, batch_size=len(train), image_size=24, workers=2) as loader:
        for batch in islice(loader, 3):
            assert batch["image"].shape == (len(train), 3, 24, 24) and batch["image"].isfinite().all()
            assert -1 <= batch["image"].min() and batch["image"].max() <= 1
            assert sorted(batch["id"]) == sorted(e.id for e in train.entries)


def test_what_is_skipped_has_a_reason(messy: Path) -> None:
    reasons = {s.where: s.why for s in FolderSource(messy).skipped}
    expected = {
        "cut.jpg": "truncated", "fake.png": "not an image", "silent.png": "no caption", "utf16.png": "not UTF-8", "bomb.png": "bomb",
        "alone.txt": "caption without its picture", "escape.png": "leads out of the folder", "loop": "link to a folder",
    }
    assert reasons.keys() == expected.keys()
    for where, words in expected.items():
        assert words in reasons[where], (where, reasons[where])


def test_same_stem_does_not_collide(tmp_path: Path) -> None:
    for i, name in enumerate(("a/x.png", "b/x.png", "b/c/x.png", "x.png")):
        save(tmp_path, name, photograph(i), f"picture {i}")
    save(tmp_path, "x.jpg", photograph(9), None)  # shares x.txt with x.png, and is another picture
    samples = [s for split in ("train", "validation") for s in FolderSource(tmp_path, split=split)]
    assert len({s.id for s in samples}) == 5
    assert {s.id: s.caption for s in samples} == {
        "a/x.png": "picture 0", "b/x.png": "picture 1", "b/c/x.png": "picture 2", "x.png": "picture 3", "x.jpg": "picture 3"}


@pytest.mark.parametrize("table", ["captions.json", "metadata.jsonl", "metadata.csv"])
def test_tables_agree(tmp_path: Path, table: str) -> None:
    content = {
        "captions.json": '{"a.png": {"caption": "eine Brücke", "split": "train"}, "sub/b.png": {"caption": "橋", "split": "val"}}',
        "metadata.jsonl": '{"file_name": "a.png", "text": "eine Brücke"}\n{"file_name": "sub/b.png", "text": "橋", "split": "validation"}\n',
        "metadata.csv": "﻿file_name,text,split\na.png,eine Brücke,train\nsub/b.png,橋,dev\n",
    }
    (tmp_path / table).write_text(content[table], encoding="utf-8")
    for i, name in enumerate(("a.png", "sub/b.png")):
        save(tmp_path, name, photograph(i), None)
    assert FolderSource(tmp_path).captions() == ["eine Brücke"]
    assert FolderSource(tmp_path, split="validation").captions() == ["橋"]
    with pytest.raises(DataError, match="split 'test'"):
        FolderSource(tmp_path, split="test")


def test_tables_cannot_reach_out(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    save(tmp_path, "secret.png", photograph(0), None)
    save(folder, "fine.png", photograph(1), "fine")
    rows = [f'{{"file_name": "{name}", "text": "x"}}' for name in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png")]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    source = FolderSource(folder)
    assert source.captions() == ["fine"] and len(source.skipped) == 3
    assert all("there is no" in s.why for s in source.skipped)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="among 0 files. Looked for images"):
        open_source(tmp_path)
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "cat.txt").write_text("a cat")
    with pytest.raises(DataError, match="cat.jpg: "):
        open_source(tmp_path)
    with pytest.raises(DataError, match="neither an existing folder nor a source"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "captions.json").write_text('{"cat.jpg": ')
    with pytest.raises(DataError, match="captions.json cannot be read"):
        open_source(tmp_path)


def test_a_file_that_vanishes_stops_the_run_by_name(messy: Path) -> None:
    source = FolderSource(messy)
    gone = source.entries[0].id
    os.remove(messy / gone)
    with Loader(source, batch_size=len(source), image_size=8, workers=1) as loader, pytest.raises(DataError, match=gone):
        next(loader)


def test_a_folder_and_its_origin_give_equal_batches(tmp_path: Path) -> None:
    shapes = ShapesSource(limit=12)
    for i in range(12):
        for split in ("train", "validation"):
            save(tmp_path, f"{split}/{i:02d}.png", shapes[i].image, shapes[i].caption)
    settings = dict(batch_size=8, image_size=32, seed=3, uncond_p=0.3)
    with Loader(shapes, **settings) as a, Loader(open_source(tmp_path), **settings) as b:
        for one, other in islice(zip(a, b), 4):
            assert torch.equal(one["image"], other["image"]) and one["caption"] == other["caption"]


@pytest.mark.parametrize("name", ["shapes", "digits", "emoji"])
def test_loader_is_the_same_for_all_workers_and_ranks(name: str) -> None:
    def stream(workers: int, world: int) -> list:
        batches: list = []
        for rank in range(world):
            settings = dict(batch_size=10, image_size=16, seed=1, uncond_p=0.2, rank=rank, world=world, workers=workers, flip=True)
            with Loader(open_source(name, limit=25), **settings) as loader:
                batches.append(list(islice(loader, 6)))
        return [(torch.cat([p["image"] for p in parts]), torch.cat([p["position"] for p in parts]), sum((p["caption"] for p in parts), []))
                for parts in zip(*batches)]

    expected = stream(0, 1)
    for workers, world in ((1, 1), (4, 1), (0, 2), (4, 2)):
        for one, other in zip(expected, stream(workers, world), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


@pytest.mark.parametrize("name", ["shapes", "digits", "emoji"])
@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_captions_are_dropped_at_the_rate_asked_for(name: str, p: float) -> None:
    with Loader(open_source(name, limit=200), batch_size=100, image_size=8, uncond_p=p) as loader:
        captions = [c for batch in islice(loader, 20) for c in batch["caption"]]
    share = captions.count("") / len(captions)
    assert abs(share - p) <= 4 * (p * (1 - p) / len(captions)) ** 0.5


def test_shapes_are_the_same_in_another_process() -> None:
    code = "from difflit.sources import ShapesSource as S; s = S(seed=4); print([s[i].caption for i in (0, 77, 10**9)], s.digest())"
    here = ShapesSource(seed=4)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert out.stdout.strip() == f"{[here[i].caption for i in (0, 77, 10**9)]} {here.digest()}"


def test_held_out_captions_never_train() -> None:
    held_out = set(ShapesSource(split="validation", seed=9).captions(2000)) | set(ShapesSource(split="test", seed=9).captions(2000))
    assert not held_out & set(ShapesSource(seed=1).captions(5000))


def test_a_user_adds_a_source_by_decorator() -> None:
    from difflit.data import SOURCES, Source, source

    @source("mine")
    class Mine(Source):
        name = "mine"

        def __init__(self, *, split="train", seed=0, image_size=32, limit=None):
            self.skipped = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Sample:
            return Sample(photograph(self._checked(index)), f"mine {index}", str(index))

    try:
        with Loader(open_source("mine"), batch_size=3, image_size=8) as loader:
            assert sorted(next(loader)["caption"]) == ["mine 0", "mine 1", "mine 2"]
    finally:
        del SOURCES["mine"]
