"""Tars made of any source: nothing lost, the same bytes every time, whole after any interruption."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import CAPTIONS, photograph, save
from PIL import Image
from tars import add
from tars import photograph as jpeg
from tars import write_tars

from difflit import repacking
from difflit.augmentation import prepare
from difflit.data import DamagedSample, DataError, Encoded, Sample, Source
from difflit.decoding import peek
from difflit.files import digest_file
from difflit.folders import FolderSource
from difflit.loading import Loader
from difflit.repacking import Shrink, decibels, member_name, repack, shrink, stage, write_shards, write_tar
from difflit.selection import ShardSource
from difflit.shards import index_shards, verify_shards
from difflit.sources import DigitsSource, ShapesSource


def both_splits(folder: Path, out: Path, **settings) -> list[repacking.TarReport]:
    return [write_shards(FolderSource(folder, split=split), out, name=split, **settings) for split in ("train", "validation")]


def test_messy_folder_equals_its_tars(messy: Path, tmp_path: Path) -> None:
    both_splits(messy, tmp_path / "tars", samples_per_shard=4)
    for split in ("train", "validation"):
        folder, tarred = FolderSource(messy, split=split), ShardSource([str(tmp_path / "tars")], split=split)
        assert [(s.id, s.caption) for s in folder] == [(s.id, s.caption) for s in tarred]
        assert [folder.encoded(i).content for i in range(len(folder))] == [tarred.encoded(i).content for i in range(len(folder))]
    assert not index_shards(tmp_path / "tars").problems
    settings = dict(batch_size=8, image_size=24, seed=2, crop=0.5, flip=True, jitter=0.3, uncond_p=0.2)
    with Loader(FolderSource(messy), **settings) as one, Loader(ShardSource([str(tmp_path / "tars")]), workers=2, **settings) as other:
        for a, b in islice(zip(one, other), 4):
            assert a["id"] == b["id"] and a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])


def test_hold_out_is_the_same_for_one_unsplit_tar(tmp_path: Path) -> None:
    for i in range(60):
        save(tmp_path / "album", f"{'ab'[i % 2]}/{i:02d}.png", photograph(i, (12, 12)), f"picture {i}")
    train = FolderSource(tmp_path / "album")
    everything = [s for split in ("validation", "train") for s in (FolderSource(tmp_path / "album", split=split))]
    write_tar(tmp_path / "one" / "00000.tar", [Encoded((tmp_path / "album" / s.id).read_bytes(), s.caption, s.id) for s in everything])
    assert sorted(s.id for s in ShardSource([str(tmp_path / "one")])) == sorted(s.id for s in train)


def test_names_have_a_way_back() -> None:
    names = ["a.jpg", "a.b.jpg", "a%2Eb.jpg", "a%252Eb.jpg", ".a.jpg", "%2Ea.jpg", "a\nb.jpg", "a%0Ab.jpg", "a%20b.jpg", "v1.2/a.jpg", "ü/ы.jpg",
             "__x__/a.jpg", "%5F_x__/a.jpg", "__x__.jpg", "a\udcff.jpg", "a%DCFF.jpg", "a\udcff/b.jpg", "a%DCFF/b.jpg", "a..jpg", "a%2E.jpg", "a%.jpg",
             "a%25.jpg"]
    made = [member_name(n) for n in names]
    assert len(set(made)) == len(names)
    for name in made:
        assert name.rpartition("/")[2].count(".") == 1
        assert webdataset.tariterators.base_plus_ext(name) == (name[:-4], "jpg")
    assert made[names.index("a%20b.jpg")] == "a%20b.jpg" and made[names.index("ü/ы.jpg")] == "ü/ы.jpg"


class Odd(Source):
    """Names, metadata and pictures as nobody would expect them."""

    name = "odd"

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("encoded is enough")

    def encoded(self, index: int, metadata: bool = True) -> Encoded:
        self._checked(index)
        whole = jpeg(index)
        metadata = [{"big": 2**80}, {"nan": float("nan"), "inf": float("inf")}, {3: {"x": (1, 2)}}, {"path": Path("x")}, {"array": np.arange(3)},
                    {"half": "\ud800"}, {}][index]
        name = ["x.jpg", "x.JPG", "x", "bad.jpg", "a.b.c.png", "long/" + "n" * 200 + ".jpg", "ü.jpg"][index]
        return Encoded(whole if index != 3 else b"no picture", f"caption {index} 夜", name, metadata)

    def digest(self) -> str:
        return "odd"


def test_odd_names_and_metadata(tmp_path: Path) -> None:
    report = write_shards(Odd(), tmp_path)
    assert report.samples == 6 and report.damaged[0][0] == "bad.jpg" and "not an image" in report.damaged[0][1]
    assert dict(report.renamed) == {"x.JPG": "x%2EJPG.JPG", "x": "x%2Ejpg.jpg", "a.b.c.png": "a%2Eb%2Ec.png"}
    index = index_shards(tmp_path)
    assert not index.problems and len(index) == 6
    assert sorted(set(index.captions())) == sorted(f"caption {i} 夜" for i in (0, 1, 2, 4, 5, 6))
    with webdataset.WebDataset(report.paths, shardshuffle=False) as samples:
        assert [s["txt"].decode() for s in samples] == index.captions()
    assert index.read(1, metadata=True).metadata == {"nan": None, "inf": None}


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    digests = []
    for n, workers in enumerate((1, 4)):
        report = write_shards(DigitsSource(limit=50), tmp_path / str(n), samples_per_shard=7, workers=workers)
        digests.append([digest_file(p) for p in report.paths])
        assert len(report.paths) == 8 and report.samples == 50
        time.sleep(1.1 * (1 - n))  # another second on the clock
    assert digests[0] == digests[1]


def test_drawn_pictures_lose_nothing(tmp_path: Path) -> None:
    source = ShapesSource(limit=6, image_size=32)
    write_shards(source, tmp_path, name="train")
    write_shards(ShapesSource(split="validation", limit=2, image_size=32), tmp_path, name="validation")
    tarred = ShardSource([str(tmp_path)])
    for a, b in zip(source, tarred, strict=True):
        assert (f"{a.id}.png", a.caption) == (b.id, b.caption) and np.array_equal(np.asarray(a.image), np.asarray(b.image))


@pytest.mark.parametrize("when", [0.0, 0.02, 0.1, 0.3])
def test_killed_writer_goes_on(tmp_path: Path, when: float) -> None:
    "Killed at any moment and started again: the same tars as without."
    expected = {Path(p).name: digest_file(p) for p in write_shards(DigitsSource(limit=300), tmp_path / "expected", samples_per_shard=20).paths}

    def child() -> None:
        write_shards(DigitsSource(limit=300), tmp_path / "out", samples_per_shard=20, workers=2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    time.sleep(when)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    for path in (tmp_path / "out").glob("*.tar"):
        assert digest_file(path) == expected[path.name]  # what has its name is whole
    report = write_shards(DigitsSource(limit=300), tmp_path / "out", samples_per_shard=20)
    assert {Path(p).name: digest_file(p) for p in report.paths} == expected
    assert not list((tmp_path / "out").glob(".*"))


def test_other_settings_write_anew(tmp_path: Path) -> None:
    source = DigitsSource(limit=10)
    assert write_shards(source, tmp_path).kept == 0
    assert write_shards(source, tmp_path).kept == 1
    assert write_shards(source, tmp_path, kind="jpeg").kept == 0
    (tmp_path / "train-000000_stats.json").write_text("{broken")
    assert write_shards(source, tmp_path, kind="jpeg").kept == 0
    with pytest.raises(DataError, match="which is no part of these"):
        write_shards(DigitsSource(limit=10), tmp_path, samples_per_shard=5)
        write_shards(DigitsSource(limit=10), tmp_path, samples_per_shard=10)


def test_unreadable_file_stops(tmp_path: Path) -> None:
    "What is damaged is listed; what cannot be read may be there again tomorrow, and no tar without it may look finished."
    save(tmp_path / "album", "a.png", photograph(0), "a")
    save(tmp_path / "album", "b.png", photograph(1), "b")
    sources = [FolderSource(tmp_path / "album", split=s) for s in ("train", "validation")]
    (tmp_path / "album" / "a.png").unlink()
    (tmp_path / "album" / "b.png").unlink()
    with pytest.raises(OSError):
        write_shards(sources[0], tmp_path / "tars")
    assert not list((tmp_path / "tars").glob("*"))


def test_repack_keeps_everything_but_size(tmp_path: Path) -> None:
    old = write_tars(tmp_path / "old", shards=3, each=9, broken=(4, 20))
    report = repack(old, tmp_path / "new", image_size=16, factor=1.5)
    before, after = index_shards(old), index_shards(tmp_path / "new")
    assert [i for i, _ in report.damaged] == ["000000004.jpg", "000000020.jpg"]
    assert after.ids() == [i for i in before.ids() if i not in ("000000004.jpg", "000000020.jpg")]
    assert [s.name for s in after.shards] == [s.name for s in before.shards]
    for row in range(len(after)):
        new, was = after.read(row, metadata=True), before.read(before.find(after.id(row)), metadata=True)
        width, height = peek(was.content).size
        assert min(peek(new.content).size) == 24 and new.caption == was.caption
        assert abs(np.divide(*peek(new.content).size) - width / height) < 0.05
        assert new.metadata == was.metadata | {"original_width": width, "original_height": height}
        assert decibels(prepare(new, (16, 16)), prepare(was, (16, 16))) > 30
    assert sum(w.images_after_bytes for w in report.shards) < 0.5 * sum(w.images_before_bytes for w in report.shards)
    assert report.samples == 25 and len([v for w in report.shards for v in w.decibels.values()]) == 25


def test_repack_resumes_and_notices_changes(tmp_path: Path) -> None:
    old = write_tars(tmp_path / "old", shards=3, each=5)
    first = repack(old, tmp_path / "new", image_size=16)
    assert repack(old, tmp_path / "new", image_size=16).kept == 3
    with tarfile.open(old / "00001.tar", "w") as tar:
        add(tar, "x.jpg", jpeg(77))
        add(tar, "x.txt", b"another one")
    again = repack(old, tmp_path / "new", image_size=16)
    assert again.kept == 2 and again.samples == 11
    assert repack(old, tmp_path / "new", image_size=12).kept == 0
    assert [w.name for w in first.shards] == [w.name for w in again.shards]


def test_repack_keeps_folders_and_equal_names(tmp_path: Path) -> None:
    "Two tars with the same samples' names in two folders that say which split they are."
    for split in ("train", "val"):
        write_tar(tmp_path / "old" / split / "0.tar", [Encoded(jpeg(len(split)), split, "same.jpg"), Encoded(jpeg(9), split, f"{split}.jpg")])
    report = repack(tmp_path / "old", tmp_path / "new", image_size=16)
    assert not report.renamed and sorted(w.name for w in report.shards) == ["train/0.tar", "val/0.tar"]
    for split, name in (("train", "train"), ("validation", "val")):
        assert {s.caption for s in ShardSource([str(tmp_path / "new")], split=split)} == {name}


def test_every_guise_is_shrunk_upright(messy: Path, tmp_path: Path) -> None:
    report = repack(FolderSource(messy), tmp_path / "train", image_size=8, factor=2)
    report2 = repack(FolderSource(messy, split="validation"), tmp_path / "train", image_size=8, factor=2, name="validation")
    assert not report.damaged and not report2.damaged
    samples = {s.caption: s for split in ("train", "validation") for s in ShardSource([str(tmp_path / "train")], split=split)}
    assert set(samples) == set(CAPTIONS.values())
    assert samples[CAPTIONS["japanese"]].image.size == (16, 24)  # turned
    assert samples[CAPTIONS["emoji"]].image.size == (7, 9)  # never enlarged
    endings = {c: samples[v].id.rpartition(".")[2] for c, v in CAPTIONS.items()}
    assert endings["latin"] == "jpg" and endings["korean"] == "webp" and endings["hebrew"] == "png" and endings["cyrillic"] == "png"


def test_progressive_and_inks_become_plain() -> None:
    image = photograph(3, (60, 40))
    for mode, settings in (("RGB", {"progressive": True}), ("L", {"progressive": True}), ("CMYK", {}), ("CMYK", {"progressive": True})):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "JPEG", quality=92, **settings)
        new, what = shrink(Encoded(buffer.getvalue(), "", "x.jpg"), Shrink(64))
        header = peek(new.content)
        assert (what, header.progressive, header.plain, header.size) == ("rewritten", False, True, (60, 40)), mode
        assert decibels(prepare(new, (40, 40)), prepare(Encoded(buffer.getvalue(), "", "x.jpg"), (40, 40))) > 38, mode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_pictures_are_never_repacked(kind: str) -> None:
    buffer = io.BytesIO()
    photograph(4, (300, 200)).save(buffer, kind)
    whole = buffer.getvalue()
    for share in (0.0, 0.3, 0.7, 0.97):
        for size in (20, 500):
            with pytest.raises(DamagedSample):
                shrink(Encoded(whole[: int(share * len(whole))], "", f"x.{kind.lower()}"), Shrink(size))


def test_staging_by_many_at_once(tmp_path: Path) -> None:
    old = write_tars(tmp_path / "old", shards=6, each=4)
    together = subprocess.run([sys.executable, "-c", """
import multiprocessing, sys
from difflit.repacking import stage
def run(_):
    s = stage(sys.argv[1], sys.argv[2], reserve_bytes=0)
    return s.copied, s.found, s.paths
import json
with multiprocessing.get_context("fork").Pool(5) as pool:
    print(json.dumps(pool.map(run, range(5), chunksize=1)))
""", str(old), str(tmp_path / "scratch")], capture_output=True, text=True, check=True)
    results = json.loads(together.stdout)
    assert sorted(r[:2] for r in results) == [[0, 6]] * 4 + [[6, 0]] and len({tuple(r[2]) for r in results}) == 1
    assert index_shards(results[0][2]).digest() == index_shards(old).digest()
    assert not verify_shards(results[0][2]).problems


def test_killed_copiers_leave_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    old = write_tars(tmp_path / "old", shards=3, each=4)

    def child(n: int) -> None:
        calls = iter(range(100))
        repacking.digest_file = lambda path: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else digest_file(path)  # type: ignore[assignment,func-returns-value]
        stage(old, tmp_path / "scratch", reserve_bytes=0, workers=1)

    for n in (0, 1):
        process = multiprocessing.get_context("fork").Process(target=child, args=(n,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    staged = stage(old, tmp_path / "scratch", reserve_bytes=0)
    assert (staged.copied, staged.found) == (2, 1)
    assert [Path(p).read_bytes() for p in staged.paths] == [p.read_bytes() for p in sorted(old.glob("*.tar"))]
    assert not list((tmp_path / "scratch").rglob(".*.partial"))


def test_bad_copies_are_noticed(tmp_path: Path, monkeypatch) -> None:
    old = write_tars(tmp_path / "old", shards=1, each=2)
    monkeypatch.setattr(repacking, "digest_file", lambda path: "0" * 64)
    monkeypatch.setattr(repacking.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="differs from it"):
        stage(old, tmp_path / "scratch", reserve_bytes=0)
    assert not list((tmp_path / "scratch" / "tars").iterdir())


def test_staging_keeps_order_names_and_splits(tmp_path: Path) -> None:
    for name in ("train/2.tar", "train/10.tar", "validation/1.tar"):
        write_tar(tmp_path / "set" / name, [Encoded(jpeg(len(name) + i), name, f"{name[0]}{len(name)}-{i}.jpg") for i in range(3)])
    staged = stage(tmp_path / "set", tmp_path / "scratch", reserve_bytes=0)
    assert ["/".join(p.split("/")[-2:]) for p in staged.paths] == ["train/2.tar", "train/10.tar", "validation/1.tar"]
    one, other = index_shards(tmp_path / "set"), index_shards(staged.paths)
    assert one.digest() == other.digest() and one.ids() == other.ids()
    assert ShardSource(other, split="validation").digest() == ShardSource(one, split="validation").digest()
    single = stage(tmp_path / "set" / "train" / "2.tar", tmp_path / "scratch", reserve_bytes=0)
    assert single.copied == 0 and Path(single.paths[0]).samefile(staged.paths[0])


def test_staged_set_resumes_a_run(tmp_path: Path) -> None:
    "A run that began on the shared disk goes on from the node's own."
    old = write_tars(tmp_path / "old", shards=3, each=12)
    settings = dict(batch_size=8, image_size=16, seed=1)
    with Loader(ShardSource([str(old)]), **settings) as loader:
        next(loader)
        state = loader.state_dict()
        expected = next(loader)
    staged = stage(old, tmp_path / "scratch", reserve_bytes=0)
    with Loader(ShardSource(staged.paths), **settings) as loader:
        loader.load_state_dict(state)
        batch = next(loader)
    assert batch["id"] == expected["id"] and torch.equal(batch["image"], expected["image"])


def test_png_and_picture_agree(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert np.array_equal(prepare(Encoded(buffer.getvalue(), "", "x.png"), (16, 16)), prepare(Sample(image, "", "x"), (16, 16)))


def licensed(path: Path, licence: str, **extra: bytes) -> None:
    "A tar with two samples, whose metadata say a licence, and with other files."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(2):
            add(tar, f"{i}.jpg", jpeg(i))
            add(tar, f"{i}.txt", f"picture {i}".encode())
            add(tar, f"{i}.json", json.dumps({"licence": licence, "n": i}).encode())
            for ending, content in extra.items():
                add(tar, f"{i}.{ending}", content)


@pytest.mark.parametrize("way", [lambda old, new: repack(old, new, image_size=16), lambda old, new: repack(ShardSource([str(old)]), new, image_size=16),
                                 lambda old, new: write_shards(ShardSource([str(old)]), new)], ids=["tars", "source", "write_shards"])
def test_changed_metadata_is_written_anew(tmp_path: Path, way) -> None:
    for licence, kept in (("CC0", 0), ("CC0", 1), ("CC1", 0)):
        licensed(tmp_path / "old" / "0.tar", licence)
        os.utime(tmp_path / "old" / "0.tar", ns=(0, sum(licence.encode()) * 10**9))
        assert way(tmp_path / "old", tmp_path / "new").kept == kept
        new = index_shards(tmp_path / "new")
        assert len(new) and {new.read(i, metadata=True).metadata["licence"] for i in range(len(new))} == {licence}


def test_changed_captions_are_written_anew(tmp_path: Path) -> None:
    for caption in ("one", "two"):
        write_tar(tmp_path / "old" / "0.tar", [Encoded(jpeg(0), caption, "0.jpg")])
        assert repack(tmp_path / "old", tmp_path / "new", image_size=16).kept == 0
        assert index_shards(tmp_path / "new").captions() == [caption]


def test_what_else_a_tar_holds_is_reported(tmp_path: Path) -> None:
    licensed(tmp_path / "old" / "0.tar", "CC0", npy=b"123", cls=b"7")
    licensed(tmp_path / "old" / "1.tar", "CC0", **{"npy": b"123", "seg.png": jpeg(3)})
    with tarfile.open(tmp_path / "old" / "1.tar", "a") as tar:
        add(tar, "README", b"hello")
        add(tar, "broken.jpg", b"no picture")
        add(tar, "broken.txt", b"its caption")
    for _ in range(2):
        report = repack(tmp_path / "old", tmp_path / "new", image_size=16)
        assert report.left_out == {".cls": [2, "0.cls"], ".npy": [4, "0.npy"], ".seg.png": [2, "0.seg.png"], "README": [1, "README"]}
        assert report.samples == 4 and {key for key, _ in report.damaged} == {"broken"}
        assert "2 × .cls, such as 0.cls" in str(report)
    assert report.kept == 2


def test_own_output_is_never_repacked(tmp_path: Path, monkeypatch) -> None:
    old = write_tars(tmp_path / "data", shards=2, each=3)
    index = index_shards(old)
    monkeypatch.chdir(tmp_path)
    for data, out in ((old, old / "small"), ("data", "data/small"), (["data/00000.tar", str(old)], "data"), (f"data/00000.tar::{old}", old / "a" / "b"),
                      ("data/*.tar", "data"), (index, old), (ShardSource(index), old)):
        with pytest.raises(DataError, match="would overwrite or read again its own tars"):
            repack(data, out, image_size=16)
    assert not (old / "small").exists() and sorted(p.name for p in old.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert repack("data/*.tar", "data/small", image_size=16).samples == 6 and repack("data/*.tar", "data/small", image_size=16).kept == 2
