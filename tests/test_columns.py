"""What a sample has besides its picture, on the way through folders, caches and jobs."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photograph, save
from means import Means
from PIL import Image

from difflit.cached import CachedLoader, CachedSource, TableSource, _variant_draws, make_set
from difflit.data import DataError, MissingColumn
from difflit.filling import cut_draws, fill_latents, latent_recipe, variant_count
from difflit.caching import Store
from difflit.folders import FolderSource
from difflit.loading import Loader, open_source
from difflit.sources import ShapesSource


def album(folder: Path, count: int = 12) -> Path:
    """PNGs of several shapes, each with a copy of itself and a map of classes beside it."""
    for i in range(count):
        picture = photograph(i, (64, 48) if i % 2 else (50, 70))
        save(folder / "train", f"{i:03d}.png", picture, f"picture {i}")
        save(folder / "train", f"{i:03d}.again.png", picture, None)
        save(folder / "train", f"{i:03d}.segmentation.png", picture.convert("L").point(lambda v: v // 64), None)
    save(folder / "validation", "x.png", photograph(999), "held out")
    return folder


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_columns_are_cut_as_the_cached_pictures_were(tmp_path: Path, crop: float, flip: bool) -> None:
    source, vae, cuts = FolderSource(album(tmp_path / "album")), Means(), 3 if crop < 1 else 1
    fill_latents(source, tmp_path / "cache", vae, image_size=32, variants=cuts, crop=crop, flip=flip, dtype="fp32")
    store = Store(tmp_path / "cache", latent_recipe(vae, 32, crop=crop, flip=flip, dtype="fp32"), create=False)
    cached = CachedSource(source, [store], {}, variants=variant_count(cuts, flip))
    with CachedLoader(cached, batch_size=6, seed=2, columns="control=again, segmentation") as loader:
        batches = list(islice(loader, 4))
        assert loader.varied.endswith("columns=control=again:picture,segmentation=segmentation:labels")
    for batch in batches:
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(batch["control"], 8), batch["moments"][:, :3].float(), atol=1e-6, rtol=0)
        assert batch["segmentation"].dtype == torch.int64 and batch["segmentation"].shape == (6, 32, 32)
        grey = batch["control"].add(1).mul(127.5).mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)  # within a class of what the map says
        assert (grey / 64 - batch["segmentation"] - 0.5).abs().median() < 0.5
    with CachedLoader(cached, batch_size=6, seed=2, position=12, columns="control=again, segmentation") as loader:
        again = next(loader)
    assert all(torch.equal(again[k], batches[2][k]) for k in ("control", "segmentation", "moments"))
    keys = cached.keys
    for variant in range(variant_count(cuts, flip)):
        which = np.full(len(keys), variant)
        assert np.array_equal(_variant_draws(keys, which, crop, flip), cut_draws(keys, which, crop=crop, flip=flip))


def test_columns_need_the_pictures(tmp_path: Path) -> None:
    source, vae = FolderSource(album(tmp_path / "album", 4)), Means()
    fill_latents(source, tmp_path / "cache", vae, image_size=32, dtype="fp32")
    store = Store(tmp_path / "cache", latent_recipe(vae, 32, dtype="fp32"), create=False)
    table = TableSource(make_set(tmp_path / "cache", source, "album"))
    with pytest.raises(MissingColumn, match="only latents are here: name the data themselves, as data=album"):
        CachedLoader(CachedSource(table, [store], {}), batch_size=2, columns="control=again")
    cached = CachedSource(source, [store], {})
    (tmp_path / "album" / "train" / "002.again.png").write_bytes(b"no picture")
    with CachedLoader(cached, batch_size=4, columns="control=again") as loader, pytest.raises(DataError, match="002.png: .*cannot identify"):
        next(loader)


def test_digests_know_nothing_of_columns(tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 4)
    before = FolderSource(folder)
    for path in [*folder.rglob("*.again.png"), *folder.rglob("*.segmentation.png")]:
        path.unlink()
    after = FolderSource(folder)
    assert before.digest() == after.digest() and before.describe() == after.describe() and before.skipped == after.skipped == []


def test_a_mixture_and_a_source_of_ones_own(tmp_path: Path) -> None:
    with Loader(open_source("0.5*shapes + 0.5*shapes"), batch_size=8, image_size=32, columns="segmentation, layout", flip=True) as loader:
        batch = next(loader)
    assert torch.equal((batch["layout"] > -1).any(1), batch["segmentation"] > 0)

    class Own(ShapesSource):
        "Its metadata hold what is asked for."

        extras = None  # type: ignore[assignment]

        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            sample.metadata |= {"half": np.full((32, 32), index % 2, np.uint8), "bright": 0.25 * index}
            return sample

    from difflit.data import Source

    Own.extras = Source.extras  # type: ignore[assignment, method-assign]
    with Loader(Own(limit=9), batch_size=9, image_size=32, columns="half:labels, bright:number") as loader:
        batch = next(loader)
    numbers = [int(i.rpartition("-")[2]) for i in batch["id"]]
    assert batch["bright"].dtype == torch.float32 and batch["bright"].tolist() == [0.25 * n for n in numbers]
    assert batch["half"][:, 0, 0].tolist() == [n % 2 for n in numbers]


def test_a_map_that_is_a_colour_picture_stops_a_run_that_forgives_nothing(tmp_path: Path) -> None:
    folder = album(tmp_path / "album", 6)
    Image.new("RGB", (64, 48)).save(folder / "train" / "001.segmentation.png")
    with Loader(FolderSource(folder), batch_size=6, image_size=32, columns="segmentation", bad_samples=0) as loader:
        with pytest.raises(DataError, match="001.png: a map of labels holds one number a pixel .*this one is RGB"):
            next(loader)


@pytest.mark.slow
def test_a_job_hands_its_columns_to_the_loader(tmp_path: Path) -> None:
    """The setting `extras` reaches the batches of a run, and what nobody has ends it before the first step."""
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    small = {"image_size": 16, "steps": 2, "batch_size": 4, "channels": 32, "score_images": 0, "validation_images": 2, "sampler_steps": 2}
    run = open_run({**small, "data": "shapes", "extras": "segmentation, label", "run_dir": str(tmp_path / "run")})
    job = train_job(prepare(run), show=False)
    finish(run)
    assert [c.name for c in job.loader.columns] == ["segmentation", "label"] and "columns=segmentation" in job.loader.varied
    run = open_run({**small, "data": "shapes", "extras": "depth:picture", "run_dir": str(tmp_path / "wrong")})
    with pytest.raises(MissingColumn, match="shapes have segmentation:labels"):
        train_job(prepare(run), show=False)
    finish(run)
