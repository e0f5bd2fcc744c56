"""Caches that lie file by file beside pictures: into a store, out again, and what is left out on the way."""

import os

import numpy as np
import pytest
import torch
from conftest import photograph, save
from safetensors.torch import load_file, save_file

from difflit.caching import CacheError, Recipe, Store, caption_keys, picture_key, with_variant
from difflit.folders import FolderSource
from difflit.sidecars import Item, export_sidecars, import_sidecars, list_items, read_manifest, sidecar_recipe, write_manifest

MOMENTS = Recipe("latents", "sdxl-vae", "0f" * 32, (8, 6, 4), "fp16", settings={"image_size": [32, 48], "moments": True})
MEANS, T5 = sidecar_recipe(MOMENTS, ".img_sdxl"), sidecar_recipe(Recipe("text", "t5", "0f" * 32, (20, 12), "bf16", ragged=True), ".txt_t5cache")
NAMES = ["one", "deep/er/two", "ünï cödé", "dots.in.the.name", "last"]


@pytest.fixture
def pets(tmp_path):
    """Pictures with captions, latents and states beside them."""
    torch.manual_seed(0)
    folder = tmp_path / "pets"
    for n, name in enumerate(NAMES):
        save(folder, f"{name}.jpg", photograph(n), f" {name}:\na  pet\n")
        save_file({"latent": torch.randn(4, 6, 4) * 7.7}, folder / f"{name}.img_sdxl")
        save_file({"emb": torch.randn(3 + n, 12).bfloat16()}, folder / f"{name}.txt_t5cache")
    return folder


def key(path, variant=0):
    return with_variant(np.array([picture_key(path.read_bytes())], np.uint64), variant)


@pytest.mark.parametrize("form", ["folder", "source", "manifest"])
def test_there_and_back(pets, tmp_path, form):
    write_manifest(tmp_path / "all.csv", list_items(pets, ".img_sdxl", ".txt_t5cache"))
    where = {"folder": pets, "source": FolderSource(pets, limit=None), "manifest": tmp_path / "all.csv"}[form]
    latents, states = Store(tmp_path / "cache", MEANS), Store(tmp_path / "cache", T5)
    taken = [import_sidecars(where, latents, ".img_sdxl", batch=2), import_sidecars(where, states, ".txt_t5cache", batch=2)]
    count = len(FolderSource(pets)) if form == "source" else len(NAMES)  # a source holds one picture out for validation
    assert [(r.done, r.there, r.skipped) for r in taken] == [(count, 0, [])] * 2 and not taken[1].empty_caption
    assert "the empty caption is missing" in str(taken[1]) and "empty" not in str(taken[0])
    before = {p.relative_to(pets): load_file(p) for p in pets.rglob("*") if p.suffix in (".img_sdxl", ".txt_t5cache")}
    kept = {i.id for i in list_items(where)}
    for item in list_items(pets, ".img_sdxl", ".txt_t5cache"):
        if item.id in kept:
            os.unlink(item.latent), os.unlink(item.text)
    for store, suffix in ((latents, ".img_sdxl"), (states, ".txt_t5cache")):
        report = export_sidecars(store, where, suffix)
        assert (report.done, report.there, report.skipped) == (count, 0, [])
    for name, found in before.items():
        if f"{str(name.with_suffix(''))}.jpg" not in kept:
            continue
        again = load_file(pets / name)
        assert again.keys() == found.keys()
        for k in found:
            assert torch.equal(again[k], found[k] if k == "emb" else found[k].half().float()), name
    assert import_sidecars(where, latents, ".img_sdxl").there == count


def test_our_own_moments_go_out_as_means(pets, tmp_path):
    store = Store(tmp_path / "cache", MOMENTS)
    moments = torch.randn(1, 8, 6, 4)
    store.append(key(pets / "one.jpg", 2), moments)
    report = export_sidecars(store, pets, ".img_new", variant=2)
    assert report.done == 1 and len(report.skipped) == 4 and report.skipped[0].why == "not in the store"
    assert torch.equal(load_file(pets / "one.img_new")["latent"], moments[0, :4].half().float())


def test_what_is_damaged_or_stale_is_left_out_by_name(pets, tmp_path):
    store = Store(tmp_path / "cache", MEANS)
    (pets / "one.img_sdxl").write_bytes((pets / "one.img_sdxl").read_bytes()[:-5])
    (pets / "deep/er/two.img_sdxl").unlink()
    os.utime(pets / "ünï cödé.jpg", (2e9, 2e9))
    save_file({"latent": torch.randn(4, 6, 5) * 7.7}, pets / "dots.in.the.name.img_sdxl")
    report = import_sidecars(pets, store, ".img_sdxl")
    whys = {s.where: s.why for s in report.skipped}
    assert report.done == 1 and whys["deep/er/two.jpg"] == "nothing lies beside it" and "cannot be read" in whys["one.jpg"]
    assert "is newer than ünï cödé.img_sdxl" in whys["ünï cödé.jpg"] and "has the shape (4, 6, 5)" in whys["dots.in.the.name.jpg"]
    assert import_sidecars(pets, store, ".img_sdxl", check_times=False).done == 1
    assert "1 done, 0 there already, 4 left out" in str(report)


@pytest.mark.parametrize("name, shape", [("latent", (4, 6, 4)), ("mean", (1, 4, 6, 4)), ("whatever", (4, 6, 4))])
def test_other_names_and_a_batch_axis(tmp_path, name, shape):
    save(tmp_path, "a.png", photograph(0), "a")
    value = torch.randn(shape) * 7.7
    save_file({name: value}, tmp_path / "a.img_sdxl")
    store = Store(tmp_path / "cache", MEANS)
    assert import_sidecars(tmp_path, store, ".img_sdxl").done == 1
    assert torch.equal(store.read(store.find(key(tmp_path / "a.png")))[0], value.view(4, 6, 4).half())


def test_scaled_latents(pets, tmp_path):
    store = Store(tmp_path / "cache", MEANS)
    raw = {n: load_file(pets / f"{n}.img_sdxl")["latent"] for n in NAMES}
    for n, value in raw.items():
        save_file({"latent": value * 0.13025}, pets / f"{n}.img_sdxl")
        save_file({"latent": value}, pets / f"{n}.img_mine")
    with pytest.raises(CacheError, match="standard deviation of 1"):
        import_sidecars(pets, store, ".img_sdxl")
    with pytest.raises(CacheError, match=r"\.img_mine: it is not known whether these latents are scaled"):
        import_sidecars(pets, store, ".img_mine")
    with pytest.raises(CacheError, match="for entries of our own making"):
        import_sidecars(pets, Store(tmp_path / "cache", MOMENTS), ".img_sdxl")
    assert len(store) == 0
    assert import_sidecars(pets, store, ".img_sdxl", factor=0.13025).done == 5
    for n, value in raw.items():
        found = store.read(store.find(key(pets / f"{n}.jpg")))[0].float()
        assert torch.allclose(found, value, rtol=2e-3, atol=2e-3)
    assert import_sidecars(pets, Store(tmp_path / "other", MEANS), ".img_mine", factor=1.0).done == 5


def test_equal_captions_and_pictures_count_once(tmp_path):
    for n in range(4):
        save(tmp_path, f"{n}.png", photograph(0), "the same")
        save_file({"emb": torch.ones(2, 12).bfloat16()}, tmp_path / f"{n}.txt_t5cache")
        save_file({"latent": torch.randn(4, 6, 4) * 7}, tmp_path / f"{n}.img_sdxl")
    for recipe, suffix in ((T5, ".txt_t5cache"), (MEANS, ".img_sdxl")):
        store = Store(tmp_path / "cache", recipe)
        report = import_sidecars(tmp_path, store, suffix)
        assert (report.done, report.there, len(store), store.verify().rows) == (1, 3, 1, 1)


def test_a_caption_is_found_as_a_run_asks_for_it(pets, tmp_path):
    store = Store(tmp_path / "cache", T5)
    import_sidecars(pets, store, ".txt_t5cache")
    source = FolderSource(pets)
    assert (store.find(caption_keys([source[i].caption for i in range(len(source))])) >= 0).all()


@pytest.mark.parametrize("text, why", [("", "lists nothing"), ("a,b\n1,2\n", "lacks the columns caption, id, image"), ("id,caption,image\n1,x\n", "entry 1"),
                                       ("id,caption,image\n,x,y\n", "entry 1"), ('id,caption,image\n1,"x,y\n', "cannot be read as a manifest")])
def test_bad_manifests(tmp_path, text, why):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(CacheError, match=why):
        read_manifest(tmp_path / "m.csv")


def test_manifests_move_with_their_folder(pets, tmp_path):
    items = [*list_items(pets, ".img_sdxl"), Item("ghost.jpg", 'says "hello",\nand more', str(pets / "ghost.jpg"))]
    write_manifest(pets / "m.csv", items)
    pets.rename(tmp_path / "moved")
    found = read_manifest(tmp_path / "moved" / "m.csv")
    assert [i.image for i in found[:-1]] == [i.image.replace("pets", "moved", 1) if "/pets/" in i.image else i.image for i in items[:-1]]
    assert found[-1] == Item("ghost.jpg", 'says "hello", and more')
    store = Store(tmp_path / "cache", MEANS)
    report = import_sidecars(tmp_path / "moved" / "m.csv", store, ".img_sdxl")
    assert report.done == 5 and [(s.where, s.why) for s in report.skipped] == [("ghost.jpg", "the picture is not there")]
