"""Tables of data sets in a cache: made at the same moment, several of the same data, and what a prune may take."""
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from difflit.cached import CachedSource, list_sets, make_set, picture_keys
from difflit.caching import CacheError, Recipe, Store, caption_keys, list_stores
from difflit.cli import app
from difflit.config import FillSettings, resolve
from difflit.data import DataError
from difflit.encoders import open_encoders
from difflit.filling import block_size, find_waste, forgotten, prune_cache
from difflit.folders import FolderSource
from difflit.job_data import cached_split, fill_caches, open_split

ROOT = Path(__file__).parents[1]
SMALL = {"vae": "tiny", "text_encoder": "tiny", "image_size": 32, "workers": 1}


def album(folder: Path, count: int, size: tuple[int, int] = (40, 40)) -> Path:
    "Pictures of noise with captions, and two held out."
    for i in range(count + 2):
        place = folder / ("train" if i < count else "validation") / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(place)
        place.with_suffix(".txt").write_text(f"caption {i}")
    return folder


def settings(tmp_path: Path, **given: object) -> FillSettings:
    return resolve({**SMALL, "cache": str(tmp_path / "cache"), "data": str(tmp_path / "album"), **given}, cls=FillSettings)


def waste(cache: Path, **gone: object) -> list[int]:
    return [w.orphans for w in find_waste(cache, gone=forgotten(cache, **gone))]  # type: ignore[arg-type]


def _make(cache: str, folder: str, start: float, answers: object) -> None:
    source = FolderSource(folder)
    while time.time() < start:
        pass
    try:
        table = make_set(cache, source, "al")
        answers.put((len(table), list(table.captions)[:1]))  # type: ignore[attr-defined]
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]


def test_a_table_made_by_several_at_once(tmp_path: Path) -> None:
    folder, context = album(tmp_path / "album", 30), multiprocessing.get_context("fork")
    for trial in range(8):
        answers, cache = context.Queue(), tmp_path / f"cache {trial}"
        processes = [context.Process(target=_make, args=(str(cache), str(folder), time.time() + 0.3, answers)) for _ in range(4)]
        for process in processes:
            process.start()
        assert [answers.get(timeout=30) for _ in processes] == [(30, ["caption 0"])] * 4
        for process in processes:
            process.join()
        assert [len(t) for t in list_sets(cache)] == [30] and not list((cache / "sets").glob(".*"))


def test_half_written_tables_are_not_seen(tmp_path: Path) -> None:
    table = make_set(tmp_path / "cache", FolderSource(album(tmp_path / "album", 4)), "al")
    shutil.copytree(table.folder, table.folder.with_name(".train-0.partial"))
    assert len(list_sets(tmp_path / "cache")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_only_be_read(tmp_path: Path) -> None:
    source = FolderSource(album(tmp_path / "album", 4))
    table = make_set(tmp_path / "cache", source, "al")
    table.folder.chmod(0o555)
    assert len(make_set(tmp_path / "cache", source, "al")) == 4
    table.folder.chmod(0o755)


def test_the_table_used_last_is_the_current_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    album(tmp_path / "album", 20)
    whole, few, far = settings(tmp_path), settings(tmp_path, limit=4), settings(tmp_path, data="cache")
    fill_caches(whole)
    assert "states of these data" not in caplog.text and len(open_split(far, "train")) == 20
    fill_caches(few)
    with caplog.at_level(logging.WARNING, logger="difflit"):
        assert len(open_split(far, "train")) == 4
    said = caplog.text
    assert "holds 2 states of these data" in said and "4 samples" in said and "20 samples" in said and "limit=4" in said and "@" in said
    fill_caches(whole)
    assert len(open_split(far, "train")) == 20
    digest = next(t for t in list_sets(far.cache) if len(t) == 4).about["digest"]
    for name in (f"cache:{tmp_path / 'album'}@{digest[:8]}", f"cache:@{digest[:8]}"):
        assert len(open_split(settings(tmp_path, data=name), "train")) == 4 and len(open_split(settings(tmp_path, data=name), "validation")) == 2
    with pytest.raises(DataError, match="digest that begins with 00000000.*it holds .*used"):
        open_split(settings(tmp_path, data="cache:@00000000"), "train")


def test_corrected_captions_and_back_again(tmp_path: Path) -> None:
    folder, far = album(tmp_path / "album", 6), settings(tmp_path, data="cache")
    right = {path: path.read_text() for path in folder.rglob("*.txt")}
    fill_caches(settings(tmp_path))
    for path in right:
        path.write_text(f"WRONG {path.stem}")
    fill_caches(settings(tmp_path))
    assert open_split(far, "train").captions(1) == ["WRONG 000"] and open_split(far, "validation").captions(1) == ["WRONG 006"]
    for path, text in right.items():
        path.write_text(text)
    fill_caches(settings(tmp_path))
    assert open_split(far, "train").captions(1) == ["caption 0"] and open_split(far, "validation").captions(1) == ["caption 6"]
    assert waste(tmp_path / "cache") == [0, 0]
    prune_cache(tmp_path / "cache")
    assert [r.done for r in fill_caches(settings(tmp_path))] == [0, 0, 0]
    wrong = next(t for t in list_sets(far.cache) if t.captions[0] == "WRONG 000").about["digest"]
    assert sum(waste(tmp_path / "cache", forget=[wrong[:8]])) == 6  # its held-out captions have a table of their own


def test_all_tables_count(tmp_path: Path) -> None:
    album(tmp_path / "album", 12)
    cache = tmp_path / "cache"
    for limit in (None, 4, 3, None, 3):
        fill_caches(settings(tmp_path, limit=limit))
    assert waste(cache) == [0, 0]
    tables = [t for t in list_sets(cache) if t.about["split"] == "train"]
    assert [len(t) for t in tables] == [3, 12, 4]
    assert waste(cache, forget=[tables[1].about["digest"][:8]]) == [8, 8]
    assert waste(cache, older_than=1) == [0, 0] and sum(waste(cache, older_than=0)) > 20
    with pytest.raises(CacheError, match="it must be one of"):
        forgotten(cache, ["abcdefgh"])
    inv = CliRunner().invoke
    told = inv(app, ["cache", "prune", str(cache), "--forget", tables[1].about["digest"][:8], "-n"]).output
    assert "12 samples" in told and "8 of 14 entries" in told, told
    assert len(list_sets(cache)) == 4
    assert "freed" in inv(app, ["cache", "prune", str(cache), "--forget", tables[1].about["digest"][:8], "--yes"]).output
    assert sorted(len(t) for t in list_sets(cache)) == [2, 3, 4]
    assert [len(w.store) for w in find_waste(cache)] == [6, 7]  # and the empty caption
    assert [r.done for r in fill_caches(settings(tmp_path, limit=4))] == [0, 0, 0]


def test_prompts_and_imports_are_no_orphans(tmp_path: Path) -> None:
    album(tmp_path / "album", 4)
    (tmp_path / "prompts.txt").write_text("a purple hat\na green boat\n")
    fill_caches(settings(tmp_path, prompts=str(tmp_path / "prompts.txt")))
    theirs = Store(tmp_path / "cache", Recipe("latents", "x", "1" * 64, (4, 2, 2), "fp16", settings={"image_size": [32, 32], "imported": ".img_x"}))
    theirs.append(np.array([[5, 5]], np.uint64), torch.zeros(1, 4, 2, 2))
    assert waste(tmp_path / "cache") == [0, 0, 0]
    prune_cache(tmp_path / "cache")
    assert len(Store(tmp_path / "cache", theirs.recipe)) == 1
    assert fill_caches(settings(tmp_path, prompts=str(tmp_path / "prompts.txt")))[-1].done == 0
    assert "(prompts): 2 captions" in CliRunner().invoke(app, ["cache", "show", str(tmp_path / "cache")]).output


def test_other_precisions_are_other_stores(tmp_path: Path) -> None:
    album(tmp_path / "album", 4)
    assert [r.done for r in fill_caches(settings(tmp_path, fill_precision="bf16"))] == [4, 2, 7]
    assert [r.done for r in fill_caches(settings(tmp_path, fill_precision="bf16"))] == [0, 0, 0]
    assert [r.done for r in fill_caches(settings(tmp_path, fill_precision="fp32"))] == [4, 2, 7]
    assert [r.done for r in fill_caches(settings(tmp_path))] == [0, 0, 0]  # auto on a processor


def test_a_shape_without_a_store_is_named(tmp_path: Path) -> None:
    album(tmp_path / "album" / "wide", 3, (64, 32))
    source = FolderSource(album(tmp_path / "square", 3, (48, 48)))
    store = Store(tmp_path / "cache", Recipe("latents", "x", "1" * 64, (4, 2, 4), "fp16", settings={"image_size": [64, 32]}))
    store.append(picture_keys(source), torch.zeros(3, 4, 2, 4))
    assert len(CachedSource(source, [store], {})) == 3
    with pytest.raises(CacheError, match="3 of 3 pictures .* belong to sizes of which the cache has no latents .48 × 48"):
        CachedSource(source, [store], {}, buckets=[(48, 48), (64, 32)])


def test_buckets_find_stores_of_other_names(tmp_path: Path) -> None:
    album(tmp_path / "album", 4, (60, 36))
    how = settings(tmp_path, buckets=True)
    fill_caches(how)
    for folder in list((tmp_path / "cache" / "latents").iterdir()):
        folder.rename(folder.with_name("another-name-" + folder.name.partition("-")[2]))
    encoders = open_encoders(how)
    assert len(cached_split(how, encoders, open_split(how, "train"), "train")) == 4


def test_imported_by_a_manifest(tmp_path: Path) -> None:
    folder, inv = album(tmp_path / "album", 6), CliRunner().invoke
    fill_caches(settings(tmp_path))
    latents = str(next((tmp_path / "cache" / "latents").iterdir()))
    manifest, elsewhere, other = tmp_path / "all.csv", tmp_path / "elsewhere", str(tmp_path / "other")
    done = inv(app, ["cache", "export", latents, str(folder), ".img_x", "--manifest", str(manifest)])
    assert done.exit_code == 0, done.output
    elsewhere.mkdir()
    for path in folder.rglob("*.img_x"):
        path.rename(elsewhere / f"{path.stem}.safetensors")
    text = manifest.read_text()
    for i in range(8):
        split = "train" if i < 6 else "validation"
        text = text.replace(f"album/{split}/{i:03d}.img_x", f"elsewhere/{i:03d}.safetensors")
    manifest.write_text(text)
    options = [str(manifest), other, "--vae", "tiny", "--image-size", "32", "--factor", "1", "--any-age"]
    assert "say --suffix .img_NAME" in str(inv(app, ["cache", "import", *options]).exception)
    taken = inv(app, ["cache", "import", *options, "--suffix", ".img_mine"])
    assert "8 done" in taken.output and "imported=.img_mine" in taken.output, (taken.output, taken.exception)
    mine = settings(tmp_path, cache=other, imported=".img_mine")
    fill_caches(mine)
    encoders = open_encoders(mine)
    assert len(cached_split(mine, encoders, open_split(mine, "train"), "train")) == 6
    more = FolderSource(album(folder, 9))
    with pytest.raises(CacheError, match="difflit cache import … --suffix .img_mine"):
        cached_split(mine, encoders, more, "train")


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from difflit import filling
from difflit.folders import FolderSource
from means import Means
class Slow(Means):
    def encode(self, images):
        print("batch", flush=True)
        return super().encode(images)
source = FolderSource({folder!r})
print("ready", flush=True)
sys.stdin.readline()
report = filling.fill_latents(source, {cache!r}, Slow(seconds={seconds}), image_size=32, batch_size=16)
print("done", report.done, flush=True)
"""


def child(tmp_path: Path, seconds: float) -> subprocess.Popen:
    code = CHILD.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "album"), cache=str(tmp_path / "cache"), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_small_fill_is_shared_and_survives(tmp_path: Path) -> None:
    "With the settings that a user has: 200 pictures are shared by two, and two seconds of work are not lost."
    assert [block_size(n) for n in (1, 200, 380, 10_000)] == [16, 16, 32, 512]
    album(tmp_path / "album", 200)
    dies = child(tmp_path, 0.5)
    dies.stdin.write("\n")  # type: ignore[union-attr]
    dies.stdin.flush()  # type: ignore[union-attr]
    for _ in range(6):
        assert dies.stdout and dies.stdout.readline() == "batch\n"
    dies.send_signal(signal.SIGKILL)
    dies.wait()
    [store] = list_stores(tmp_path / "cache")
    there = len(store)
    assert there >= 32
    both = [child(tmp_path, 0.1) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    done = [int(process.communicate(timeout=60)[0].split()[-1]) for process in both]
    assert sum(done) == 200 - there and min(done) >= 32, (there, done)


def test_captions_of_a_table_are_found(tmp_path: Path) -> None:
    table = make_set(tmp_path / "cache", FolderSource(album(tmp_path / "album", 4)), "al", how={"limit": 4, "select": "", "seed": 0})
    assert table.about["how"] == {"limit": 4, "seed": 0}
    assert np.array_equal(table.caption_keys, caption_keys(list(table.captions)))
