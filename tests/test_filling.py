"""Caches filled from any source: only what is missing, by several processes, through kills, shortages and broken pictures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, photograph, save
from means import Means
from twins import CAPTIONS, tiny_clip, tiny_t5, tiny_vae

from difflit import filling
from difflit.augmentation import aspect_buckets, nearest_bucket
from difflit.cached import picture_keys
from difflit.caching import Store, caption_keys, list_stores, with_variant
from difflit.data import DataError, as_numbers
from difflit.filling import FillError, fill_latents, fill_text, latent_recipe, missing, variant_count, wanted_keys
from difflit.folders import FolderSource
from difflit.latent import Autoencoder, TextEncoder
from difflit.loading import Loader, open_source
from difflit.repacking import write_shards
from difflit.selection import ShardSource


def album(folder: Path, numbers=range(20), size=(64, 48)) -> Path:
    """Photographs in a train folder, and one held out."""
    for i in numbers:
        save(folder / "train", f"{i:03d}.jpg", photograph(i, size), f"picture {i}", quality=95)
    save(folder / "validation", "x.png", photograph(999), "held out")
    return folder


def entries(cache: Path, encoder, source, variant=0, **options) -> torch.Tensor:
    """What a cache says of a source's pictures, in order."""
    store = Store(cache, latent_recipe(encoder, **options), create=False)
    return store.read(store.find(with_variant(picture_keys(source), variant))).float()


def seen(source, encoder, size=32) -> torch.Tensor:
    """What the encoder says of the pictures that a loader delivers, in order."""
    with Loader(source, batch_size=len(source), image_size=size) as loader:
        batch = next(loader)
    order = {name: i for i, name in enumerate(batch["id"])}
    return encoder.encode(as_numbers(batch["image"]))[[order[name] for name in source.ids()]]


def test_entries_are_what_a_vae_says_of_a_loaders_pictures(tmp_path: Path) -> None:
    source, vae = FolderSource(album(tmp_path / "album")), Autoencoder(tiny_vae(factor=4), "twin")
    report = fill_latents(source, tmp_path / "cache", vae, image_size=32, batch_size=7, dtype="fp32", workers=3)
    assert (report.done, report.there, report.bad) == (20, 0, []) and report.seconds >= report.encode_seconds > 0
    torch.testing.assert_close(entries(tmp_path / "cache", vae, source, image_size=32, dtype="fp32"), seen(source, vae), atol=2e-5, rtol=1e-4)
    assert "20 computed" in str(report) and report.rate > 0 and 0 < report.busy <= 1


@pytest.mark.parametrize("options", [dict(trim=True), dict(decoder="pil"), dict(mean_only=True), dict(dtype="bf16")])
def test_settings(tmp_path: Path, options: dict) -> None:
    source, vae = FolderSource(album(tmp_path / "album", range(6))), Means()
    fill_latents(source, tmp_path / "cache", vae, image_size=32, **options)
    found, said = entries(tmp_path / "cache", vae, source, image_size=32, **options), seen(source, vae)
    assert len(list_stores(tmp_path / "cache")) == 1
    torch.testing.assert_close(found, said[:, : found.shape[1]], atol=0.03, rtol=0.02)


def test_an_edited_picture_is_computed_alone(tmp_path: Path) -> None:
    folder, cache, vae = album(tmp_path / "album"), tmp_path / "cache", Means()
    before = FolderSource(folder)
    fill_latents(before, cache, vae, image_size=32)
    save(folder / "train", "007.jpg", photograph(777, (64, 48)), "picture 7", quality=95)
    (folder / "train" / "008.txt").write_text("another caption")  # no reason to encode the picture again
    after = FolderSource(folder)
    vae.batches.clear()
    report = fill_latents(after, cache, vae, image_size=32)
    assert (report.there, report.done, vae.batches) == (19, 1, [1])
    torch.testing.assert_close(entries(cache, vae, after, image_size=32), seen(after, vae), atol=2e-3, rtol=2e-3)
    assert not torch.equal(entries(cache, vae, after, image_size=32)[7], entries(cache, vae, before, image_size=32)[7])  # the old one is still there
    save(folder / "train", "007.jpg", photograph(7, (64, 48)), "picture 7", quality=95)
    assert fill_latents(FolderSource(folder), cache, vae, image_size=32).done == 0


def test_any_change_of_the_recipe_is_another_store(tmp_path: Path) -> None:
    source, cache = FolderSource(album(tmp_path / "album", range(5))), tmp_path / "cache"
    changes = [{}, {"vae": Means(digest="b" * 64)}, {"image_size": 48}, {"image_size": (32, 48)}, {"dtype": "bf16"}, {"mean_only": True}, {"crop": 0.8},
               {"trim": True}, {"decoder": "pil"}, {"crop": 0.8, "flip": True}]
    for n, change in enumerate(changes, 1):
        options = {"image_size": 32, **change}
        vae = options.pop("vae", Means())
        wanted = 5 * variant_count(1, options.get("flip", False))
        assert fill_latents(source, cache, vae, **options).done == wanted, change
        assert len(list_stores(cache)) == n, change
        again = fill_latents(source, cache, Means("another name for it", vae.digest), **options)
        assert (again.there, again.done) == (wanted, 0), change


def test_tars_and_folders_share_a_cache(tmp_path: Path) -> None:
    "The same bytes are the same picture, wherever they lie."
    folder, cache, vae = FolderSource(album(tmp_path / "album")), tmp_path / "cache", Means()
    for split in ("train", "validation"):
        write_shards(FolderSource(tmp_path / "album", split=split), tmp_path / "tars", name=split, samples_per_shard=6)
    tarred = ShardSource([str(tmp_path / "tars")])
    assert fill_latents(tarred, cache, vae, image_size=32).done == 20
    assert fill_latents(folder, cache, vae, image_size=32).done == 0
    torch.testing.assert_close(entries(cache, vae, folder, image_size=32), seen(folder, vae), atol=2e-3, rtol=2e-3)


def test_made_pictures_and_copies(tmp_path: Path) -> None:
    source, vae = open_source("shapes", image_size=32, limit=30), Means()
    assert fill_latents(source, tmp_path, vae, image_size=32, indices=[3, 4, 3]).done == 2
    assert fill_latents(source, tmp_path, vae, image_size=32).done == 28
    torch.testing.assert_close(entries(tmp_path, vae, source, image_size=32), seen(source, vae), atol=2e-3, rtol=2e-3)
    folder = album(tmp_path / "album", range(4))
    save(folder / "train", "copy.jpg", photograph(2, (64, 48)), "a copy", quality=95)
    report = fill_latents(FolderSource(folder), tmp_path, vae, image_size=32)
    assert (report.wanted, report.done) == (4, 4)


def test_variants_follow_from_the_picture_alone(tmp_path: Path) -> None:
    folder, vae, options = album(tmp_path / "album", range(10, 16)), Means(), dict(image_size=32, crop=0.5, flip=True)
    fill_latents(FolderSource(folder), tmp_path / "one", vae, variants=3, dtype="fp32", **options)
    album(folder, range(30))  # neighbours before, between and behind
    source = FolderSource(folder)
    report = fill_latents(source, tmp_path / "two", vae, variants=2, dtype="fp32", workers=1, batch_size=5, **options)
    assert report.done == 30 * 4
    report = fill_latents(source, tmp_path / "two", vae, variants=3, dtype="fp32", **options)
    assert (report.there, report.done) == (120, 60)
    few = FolderSource(album(tmp_path / "again", range(10, 16)))
    found = [[entries(tmp_path / c, vae, few, v, dtype="fp32", **options) for v in range(6)] for c in ("one", "two")]
    for one, two in zip(*found):
        assert torch.equal(one, two)
    for v in range(0, 6, 2):
        torch.testing.assert_close(found[0][v].flip(-1), found[0][v + 1], atol=1e-5, rtol=1e-5)
        assert v == 0 or not torch.allclose(found[0][v], found[0][v - 2])


def test_buckets_have_a_store_each(tmp_path: Path) -> None:
    for i, size in enumerate([(64, 64), (96, 48), (48, 96), (100, 50), (64, 60)]):
        save(tmp_path / "album" / "train", f"{i}.jpg", photograph(i, size), f"picture {i}")
    save(tmp_path / "album" / "validation", "x.png", photograph(9), "held out")
    source, vae, buckets = FolderSource(tmp_path / "album"), Means(), aspect_buckets(64)
    report = fill_latents(source, tmp_path / "cache", vae, buckets=buckets)
    chosen = nearest_bucket(source.sizes(), buckets)
    assert report.done == 5 and len(report.stores) == len(set(chosen.tolist())) == 3 and "3 sizes" in str(report)
    for store in list_stores(tmp_path / "cache"):
        width, height = store.recipe.settings["image_size"]
        assert store.recipe.shape == (6, height // 8, width // 8)
        assert len(store) == sum(buckets[b] == (width, height) for b in chosen)
    with pytest.raises(DataError, match="which buckets need"):
        fill_latents(open_source("shapes", limit=3), tmp_path / "cache", vae, buckets=buckets)


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from difflit import filling
from difflit.folders import FolderSource
from means import Means
filling._WRITE_SECONDS = ({write}, {write})
class Slow(Means):
    def encode(self, images):
        print("batch", flush=True)
        return super().encode(images)
source = FolderSource({folder!r})
print("ready", flush=True)
sys.stdin.readline()
report = filling.fill_latents(source, {cache!r}, Slow(seconds={seconds}), image_size=32, batch_size=4, block=8)
print("done", report.done, report.there, report.elsewhere, flush=True)
"""


def child(tmp_path: Path, seconds=0.02, write=0.05) -> subprocess.Popen:
    code = CHILD.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "album"), cache=str(tmp_path / "cache"), seconds=seconds, write=write)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def ready(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"


def start(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_share_the_work(tmp_path: Path) -> None:
    album(tmp_path / "album", range(120))
    children = [child(tmp_path, seconds=0.1) for _ in range(3)]
    ready(*children)
    for process in children:
        start(process)
    ends = [process.communicate(timeout=60)[0].splitlines()[-1].split() for process in children]
    done = [int(end[1]) for end in ends]
    assert all(end[0] == "done" for end in ends)
    assert sum(done) == 120 and min(done) >= 8, done  # nothing twice, and everybody had some
    for _, mine, there, elsewhere in ends:
        assert int(mine) + int(there) + int(elsewhere) == 120  # whoever returns finds everything
    source, vae = FolderSource(tmp_path / "album"), Means()
    assert missing(tmp_path / "cache", latent_recipe(vae, 32), wanted_keys(source).keys) == (120, 0, 0)
    torch.testing.assert_close(entries(tmp_path / "cache", vae, source, image_size=32), seen(source, vae), atol=2e-3, rtol=2e-3)
    assert not list((tmp_path / "cache").rglob("work/*.claim"))


@pytest.mark.parametrize("batches", [1, 4, 11])
def test_killed_and_resumed(tmp_path: Path, batches: int) -> None:
    "kill -9 in the middle: what was written stays, the rest is taken over at once, nothing is damaged."
    album(tmp_path / "album", range(60))
    process = child(tmp_path)
    ready(process)
    start(process)
    for _ in range(batches):
        assert process.stdout and process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    source, vae = FolderSource(tmp_path / "album"), Means()
    begun = time.monotonic()
    report = fill_latents(source, tmp_path / "cache", vae, image_size=32, block=8)
    assert time.monotonic() - begun < 60 and report.there + report.done == 60  # a claim that is only silent would be waited for, ten minutes
    assert report.there >= 4 * (batches - 8)
    torch.testing.assert_close(entries(tmp_path / "cache", vae, source, image_size=32), seen(source, vae), atol=2e-3, rtol=2e-3)
    assert all(store.verify().whole and len(store) == 60 for store in list_stores(tmp_path / "cache"))


def test_a_fill_goes_on_beside_a_killed_one(tmp_path: Path) -> None:
    "One of two is killed; the other takes its blocks over and returns when all is there."
    album(tmp_path / "album", range(80))
    lives, dies = child(tmp_path), child(tmp_path, seconds=0.2, write=60)
    ready(lives, dies)
    start(dies)
    assert dies.stdout and dies.stdout.readline() == "batch\n"
    start(lives)
    assert lives.stdout and lives.stdout.readline() == "batch\n"
    time.sleep(0.3)
    dies.send_signal(signal.SIGKILL)
    dies.wait()
    assert lives.communicate(timeout=60)[0].splitlines()[-1] == "done 80 0 0"


class Moody(Means):
    """Whatever is asked for: short of memory above so many pictures, NaN for dark ones, infinite after so many batches."""

    def __init__(self, most=1000, nan_below=-2.0, exact_heals=False, break_after=None, scale=1.0):
        super().__init__()
        self.most, self.nan_below, self.exact_heals, self.break_after, self.scale = most, nan_below, exact_heals, break_after, scale
        self.exact, self.short = False, 0

    def float(self):
        self.exact = True
        return self

    def encode(self, images):
        if len(images) > self.most:
            self.short += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if self.short % 2 else RuntimeError("can't allocate memory")
        if self.break_after is not None and len(self.batches) >= self.break_after:
            raise RuntimeError("the encoder is broken")
        moments = super().encode(images) * self.scale
        if not (self.exact and self.exact_heals):
            moments[images.flatten(1).mean(1) < self.nan_below] = torch.nan
        return moments


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    source, vae = FolderSource(album(tmp_path / "album")), Moody(most=3)
    report = fill_latents(source, tmp_path / "cache", vae, image_size=32, batch_size=12)
    assert report.done == 20 and report.batch_size == 3 and max(vae.batches) == 3
    assert report.notes == ["out of memory with a batch of 12: going on with 6", "out of memory with a batch of 6: going on with 3"]
    torch.testing.assert_close(entries(tmp_path / "cache", vae, source, image_size=32), seen(source, Means()), atol=2e-3, rtol=2e-3)
    with pytest.raises(FillError, match="out of memory with a batch of one.*tiles"):
        fill_latents(source, tmp_path / "other", Moody(most=0), image_size=32)
    assert not list(tmp_path.rglob("work/*.claim"))


def dark_album(folder: Path) -> FolderSource:
    album(folder)
    for name in ("dark", "darker"):
        image = photograph(len(name), (64, 48)).point(lambda v: v // 20)
        save(folder / "train", f"{name}.png", image, name)
    return FolderSource(folder)


def test_nan_is_computed_again_and_then_left_out(tmp_path: Path) -> None:
    source = dark_album(tmp_path / "album")
    healed = fill_latents(source, tmp_path / "one", Moody(nan_below=-0.9, exact_heals=True), image_size=32)
    assert (healed.done, healed.bad) == (22, []) and "computed again in fp32" in healed.notes[0] and "train/dark.png" in healed.notes[0]
    torch.testing.assert_close(entries(tmp_path / "one", Means(), source, image_size=32), seen(source, Means()), atol=2e-3, rtol=2e-3)
    broken = fill_latents(source, tmp_path / "two", Moody(nan_below=-0.9), image_size=32)
    assert broken.done == 20 and sorted(broken.bad) == [(f"train/{n}.png", "its numbers are not finite, even in fp32") for n in ("dark", "darker")]
    vae = Means()
    again = fill_latents(source, tmp_path / "two", vae, image_size=32)
    assert (again.there, again.done, sorted(again.bad), vae.batches) == (20, 0, sorted(broken.bad), [])  # remembered
    store = Store(tmp_path / "two", latent_recipe(vae, 32))
    assert (store.find(picture_keys(source)) == -2).sum() == 2 and sorted(b[1] for b in store.bad) == ["train/dark.png", "train/darker.png"]
    assert fill_latents(source, tmp_path / "two", vae, image_size=32, forgive=True).done == 2


def test_more_than_fp16_can_hold(tmp_path: Path) -> None:
    source = FolderSource(album(tmp_path / "album", range(6)))
    with pytest.raises(DataError, match="more than fp16 can hold; bf16"):
        fill_latents(source, tmp_path / "cache", Moody(scale=1e7), image_size=32)
    assert fill_latents(source, tmp_path / "cache", Moody(scale=1e7), image_size=32, dtype="bf16").done == 6


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    source = FolderSource(album(tmp_path / "album", range(40)))
    (tmp_path / "album" / "train" / "005.jpg").unlink()
    save(tmp_path / "album" / "train", "011.jpg", photograph(4711), None)
    report = fill_latents(source, tmp_path / "cache", Means(), image_size=32)
    assert report.done == 38 and [i for i, _ in report.bad] == ["train/005.jpg"] and "missing" in report.bad[0][1]
    fresh = FolderSource(tmp_path / "album")  # knows the new picture, and that the old one is gone
    assert fill_latents(fresh, tmp_path / "cache", Means(), image_size=32).done == 1


def test_damaged_pictures(tmp_path: Path) -> None:
    "Tars are not decoded when they are indexed: damage shows when the cache is filled."
    from tars import write_tars

    source = ShardSource([str(write_tars(tmp_path / "tars", shards=2, each=20, broken=(4, 20)))])
    report = fill_latents(source, tmp_path / "cache", Means(), image_size=32)
    assert report.done == len(source) - 2 and sorted(i for i, _ in report.bad) == ["000000004.jpg", "000000020.jpg"]
    assert fill_latents(source, tmp_path / "cache", Means(), image_size=32).done == 0


def test_too_many_bad_ones_stop(tmp_path: Path) -> None:
    source = FolderSource(album(tmp_path / "album", range(40)))
    for i in range(20, 40):
        (tmp_path / "album" / "train" / f"{i:03d}.jpg").unlink()
    with pytest.raises(DataError, match="more than bad_samples allows"):
        fill_latents(source, tmp_path / "cache", Means(), image_size=32, batch_size=4)
    assert missing(tmp_path / "cache", latent_recipe(Means(), 32), wanted_keys(source).keys).there == 20  # not lost
    assert not list((tmp_path / "cache").rglob("work/*.claim"))


def test_what_was_computed_survives_an_error(tmp_path: Path) -> None:
    source = FolderSource(album(tmp_path / "album"))
    with pytest.raises(RuntimeError, match="broken"):
        fill_latents(source, tmp_path / "cache", Moody(break_after=3), image_size=32, batch_size=4)
    report = fill_latents(source, tmp_path / "cache", Means(), image_size=32)
    assert (report.there, report.done) == (12, 8)


def test_progress_and_counting(tmp_path: Path) -> None:
    source, vae, told = FolderSource(album(tmp_path / "album")), Means(), []
    recipe, keys = latent_recipe(vae, 32), wanted_keys(source, flip=True).keys
    assert missing(tmp_path / "cache", recipe, keys) == (0, 40, 0)
    fill_latents(source, tmp_path / "cache", vae, image_size=32, batch_size=8, on_progress=lambda done, wanted: told.append((done, wanted)))
    assert told == [(8, 20), (16, 20), (20, 20)]
    assert missing(tmp_path / "cache", recipe, keys) == (20, 20, 0)


def test_scattered_gaps_make_full_batches(tmp_path: Path) -> None:
    source, vae = FolderSource(album(tmp_path / "album", range(60))), Means()
    fill_latents(source, tmp_path / "cache", vae, image_size=32, indices=[i for i in range(60) if i % 6])
    vae.batches.clear()
    fill_latents(source, tmp_path / "cache", vae, image_size=32, batch_size=5, block=7)
    assert vae.batches == [5, 5]


def states(cache: Path, encoder: TextEncoder, captions: list[str], **options) -> dict[str, torch.Tensor]:
    store = Store(cache, encoder.recipe(**options), create=False)
    return store.read_text(store.find(caption_keys(captions)))


@pytest.mark.parametrize("make, options", [(tiny_clip, {}), (tiny_t5, {}), (tiny_clip, {"projection": 24})], ids=["clip", "t5", "clip with projection"])
def test_text(tmp_path: Path, make, options) -> None:
    encoder = TextEncoder(*make(**options), "twin")
    report = fill_text([*CAPTIONS[1:], *CAPTIONS[1:]], tmp_path, encoder, dtype="fp32", batch_size=2)
    assert report.done == report.wanted == len(CAPTIONS)  # with the empty one
    found = states(tmp_path, encoder, CAPTIONS, dtype="fp32")
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        length = alone["states"].shape[1]
        torch.testing.assert_close(found["states"][i, :length], alone["states"][0], atol=1e-5, rtol=1e-4)
        assert torch.equal(found["mask"][i, :length], alone["mask"][0]) and not found["mask"][i, length:].any() and not found["states"][i, length:].any()
        if encoder.pooled:
            torch.testing.assert_close(found["pooled"][i], alone["pooled"][0], atol=1e-5, rtol=1e-4)
    more = fill_text([*CAPTIONS, "two stars"], tmp_path, encoder, dtype="fp32")
    assert (more.there, more.done) == (len(CAPTIONS), 1)


def test_encoders_side_by_side(tmp_path: Path) -> None:
    clip, t5 = TextEncoder(*tiny_clip(), "clip"), TextEncoder(*tiny_t5(), "t5")
    for encoder in (clip, t5):
        fill_text(CAPTIONS, tmp_path, encoder)
    fill_text(CAPTIONS, tmp_path, t5, length=6)
    stores = {(s.recipe.encoder, s.recipe.shape[0]): s for s in list_stores(tmp_path, "text")}
    assert set(stores) == {("clip", 77), ("t5", 128), ("t5", 6)} and all(len(s) == len(CAPTIONS) for s in stores.values())
    assert states(tmp_path, t5, CAPTIONS, length=6)["mask"].sum(1).max() == 6 and t5.length == 128


def test_text_that_overflows(tmp_path: Path) -> None:
    class Overflows(TextEncoder):
        exact = False

        def float(self):
            self.exact = True
            return self

        def encode(self, captions, length=None):
            out = super().encode(captions, length)
            for i, caption in enumerate(captions):
                out["states"][i] *= float("nan") if "star" in caption and not self.exact else 1.0
            return out

    twin = tiny_t5()
    broken, whole = Overflows(*twin, "t5"), TextEncoder(*twin, "t5")
    report = fill_text(CAPTIONS, tmp_path, broken, dtype="fp32")
    assert report.done == len(CAPTIONS) and "'two white stars'" in report.notes[0]
    fill_text(CAPTIONS, tmp_path / "whole", whole, dtype="fp32")
    one, two = (states(cache, whole, CAPTIONS, dtype="fp32") for cache in (tmp_path, tmp_path / "whole"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_reading_goes_on_while_the_encoder_works(tmp_path: Path, monkeypatch) -> None:
    "Pictures that take as long to read as to encode cost the encoder hardly any time."
    source, read = FolderSource(album(tmp_path / "album", range(48))), filling._read
    monkeypatch.setattr(filling, "_read", lambda *a: (time.sleep(0.03), read(*a))[1])
    vae = Means(seconds=0.1)
    report = fill_latents(source, tmp_path / "cache", vae, image_size=32, batch_size=4, workers=4)
    assert report.encode_seconds / report.seconds > 0.75, report  # one after the other it would be 0.5 with four threads, and less with fewer
    assert np.isclose(sum(vae.batches), 48)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    source, vae = FolderSource(album(tmp_path / "album", range(100), (300, 200))), tiny_vae()
    there, here = Autoencoder(tiny_vae().to("cuda", dtype), "twin", digest="c" * 64), Autoencoder(vae, "twin", digest="c" * 64)
    report = fill_latents(source, tmp_path / "gpu", there, image_size=64, batch_size=16)
    fill_latents(source, tmp_path / "cpu", here, image_size=64)
    assert report.done == 100 and report.encode_seconds > 0
    one, two = (entries(tmp_path / where, here, source, image_size=64) for where in ("gpu", "cpu"))
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_commands_name_what_is_wrong(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from difflit.cli import app

    def run(*words) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["cache", *map(str, words)])
        return result.exit_code, result.output

    source, cache = FolderSource(album(tmp_path / "album")), tmp_path / "cache"
    reports = [fill_latents(source, cache, Means(digest=d * 64), image_size=32) for d in "ab"]
    assert run("verify", cache)[0] == 0
    code, said = run("show", cache)
    assert code == 0 and said.count("20 entries") == 2 and "orphans unknown" in said
    rows = Path(reports[0].stores[0]) / "rows.bin"
    os.truncate(rows, rows.stat().st_size // 2)
    (Path(reports[1].stores[0]) / "recipe.json").write_text("{half")
    code, said = run("verify", cache)
    assert code == 1 and "bytes too short" in said and "recipe.json" in said, said
    assert run("show", cache)[0] == 0
    code, said = run("prune", cache, "-n")
    assert "cannot be opened" in said and "damaged" in said and said.endswith("Nothing was removed.\n")
    assert run("prune", cache, "--yes")[0] == 0
    assert run("prune", cache, "--store", f"latents/{Path(reports[1].stores[0]).name}", "--yes")[0] == 0
    assert run("verify", cache)[0] == 0
    again = fill_latents(source, cache, Means(digest="a" * 64), image_size=32)
    assert again.there + again.done == 20 and 5 <= again.there < 20
    torch.testing.assert_close(entries(cache, Means(), source, image_size=32), seen(source, Means()), atol=2e-3, rtol=2e-3)
