"""Latent runs from end to end: caches filled and found again, exact resume, other encoders, adapters, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import twins
from conftest import TINY, photograph, save
from safetensors.torch import load_file

from difflit.caching import CacheError, list_stores
from difflit.config import FillSettings, SettingsError, resolve
from difflit.data import DataError
from difflit.encoders import export_latent
from difflit.generation import draw, generate, load_pipeline
from difflit.job_data import fill_caches
from difflit.recipes import prepare, score_job, train_job
from difflit.runs import finish, open_run
from difflit.tracking import read_metrics

SMALL = {**TINY, "preset": "latent-tiny", "limit": 24, "image_size": 32, "data": "shapes", "precision": "auto", "score_images": 0, "steps": 6,
         "checkpoint_every_steps": 3, "validate_every_steps": 3, "sample_every_steps": 6, "sampler_steps": 2}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr("difflit.job_data.HELD_OUT", 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Stable Diffusion, a T5 and two other autoencoders, all tiny."""
    place = tmp_path_factory.mktemp("models")
    twins.save_sd(place / "sd", scheduler={"prediction_type": "v_prediction", "beta_start": 0.001, "beta_end": 0.011})
    twins.save_t5(place / "t5")
    twins.save_vae(place / "vae", twins.tiny_vae(seed=9, scaling_factor=0.13))
    twins.save_vae(place / "wide", twins.tiny_vae(seed=9, latent_channels=16, shift_factor=0.1))
    twins.save_vae(place / "scaled", twins.tiny_vae(seed=9, factor=4, scaling_factor=0.13))
    return place


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures of three shapes with captions."""
    for i in range(20):
        save(tmp_path / "pictures", f"{i:02d}.png", photograph(i, [(48, 48), (64, 36), (36, 64)][i % 3]), f"photograph number {i}")
    return tmp_path / "pictures"


def trained(folder, stop_after=None, **given):
    opened = open_run({**SMALL, "run_dir": str(folder), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}})
    job = train_job(prepare(opened), show=False, stop_after=stop_after)
    finish(opened, "preempted" if stop_after else "done")
    return job


def same_weights(a, b, step=6):
    one, two = (load_file(f / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for f in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_fills_trains_resumes_and_draws(tmp_path):
    job = trained(tmp_path / "whole", cache=tmp_path / "cache")
    metrics = read_metrics(tmp_path / "whole")
    assert (metrics["qk_grads_av"] > 0).all() and (metrics["raw_loss"] > 0).all()
    assert [report.done for report in job.filled][:2] == [24, 12], "what was computed is said"
    assert job.encoders._loaded == {}, "no text encoder is kept while training"
    trained(tmp_path / "parts", stop_after=4, cache=tmp_path / "cache")
    again = trained(tmp_path / "parts", resume="auto", cache=tmp_path / "cache")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert not again.filled, "nothing was computed twice"
    # a checkpoint draws elsewhere what the run draws
    pipeline = load_pipeline(tmp_path / "whole", "cpu")
    drawn = generate(pipeline, ["a red circle", "a blue star"], precision="fp32", steps=2)
    mine = draw(job.state.ema.model, job.diffusion, job.tokenizer, ["a red circle", "a blue star"], 32, autoencoder=job.encoders.autoencoder,
                **{**pipeline.sampling, "steps": 2})
    assert drawn.shape == (2, 3, 32, 32)
    assert (drawn - mine).abs().max() < 0.02, "states in the cache are rounded to fp16, and nothing else differs"


def test_cache_alone_trains_the_same(tmp_path, cache):
    """Latents made on one cluster and trained on another: no pictures, no text encoder's weights, the same weights to the bit."""
    given = {"score_images": 4, "image_size": 32}
    trained(tmp_path / "here", cache=cache, **given)
    there = tmp_path / "elsewhere"
    shutil.copytree(cache, there)
    job = trained(tmp_path / "there", cache=there, data="cache", fill=False, **given)
    assert same_weights(tmp_path / "here", tmp_path / "there")
    assert len(score_job(job).images) == 4
    assert job.data.train[0].image.size == (32, 32), "shown by decoding its latent"


@pytest.mark.parametrize("given", [{"min_snr_gamma": 5.0, "target": "eps"}, {"schedule": "flow", "target": "flow"}, {"zero_terminal_snr": True},
                                   {"offset_noise": 0.1, "input_perturbation": 0.1}, {"latents": "mean"}, {"checkpointing": True}], ids=str)
def test_objectives(tmp_path, cache, given):
    trained(tmp_path / "run", cache=cache, steps=2, **given)
    metrics = read_metrics(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(metrics[name])).all() for name in ("loss", "raw_loss", "qk_grads_av"))
    if "min_snr_gamma" in given:
        assert (metrics["loss"] < metrics["raw_loss"]).all()


def test_schedule_comes_with_the_checkpoint(tmp_path, cache, models):
    start = {"model": "sd15", "vae": None, "text_encoder": None, "init_from": models / "sd", "cache": cache, "steps": 1, "schedule": "auto", "target": "auto"}
    values = {k: v for k, v in start.items() if v is not None}
    job = prepare(open_run({**SMALL, **{k: str(v) for k, v in values.items()}, "vae": str(models / "sd"), "text_encoder": str(models / "sd"),
                            "run_dir": str(tmp_path / "a")}))
    assert (job.diffusion.schedule, job.diffusion.target, job.diffusion.betas) == ("scaled_linear", "v", (0.001, 0.011))
    assert not any("trained with" in note for note in job.notes)
    other = prepare(open_run({**SMALL, **{k: str(v) for k, v in values.items()}, "vae": str(models / "sd"), "text_encoder": str(models / "sd"),
                              "run_dir": str(tmp_path / "b"), "schedule": "linear", "target": "eps"}))
    assert (other.diffusion.schedule, other.diffusion.target, other.diffusion.betas) == ("linear", "eps", None)
    assert sum("the given weights were trained with" in note for note in other.notes) == 3, "schedule, target, betas"


@pytest.mark.parametrize("projection", ["auto", "mlp", "replace"])
def test_a_unet_learns_to_read_t5(tmp_path, cache, models, projection):
    """Weights of a CLIP-reading UNet, another autoencoder, a T5 of another width."""
    job = trained(tmp_path / "run", cache=cache, steps=2, model="sd15", init_from=models / "sd", vae=models / "vae", text_encoder=models / "t5",
                  projection=projection)
    assert job.state.model.config.projection == {"auto": "linear", "mlp": "mlp", "replace": "none"}[projection]
    drawn = generate(load_pipeline(tmp_path / "run", "cpu"), ["two white stars"], steps=1)
    assert drawn.shape == (1, 3, 32, 32)


def test_two_encoders_side_by_side(tmp_path, cache, models):
    job = trained(tmp_path / "run", cache=cache, steps=1, text_encoder=f"tiny,{models / 't5'}")
    assert len(job.state.model.config.encoders) == 2
    assert {s.recipe.encoder for s in list_stores(cache, "text")} >= set(job.encoders.text)


def test_text_encoder_that_trains(tmp_path, cache):
    job = trained(tmp_path / "run", cache=cache, steps=2, train_text=True, lr_scales="text=0.1")
    names = [n for n, p in job.state.model.named_parameters() if n.startswith("encoders.")]
    assert names and not job.data.train.text
    rate = {p: group["lr_scale"] for group in job.state.optimizer.param_groups for p in group["params"]}
    ratios = {rate[p] / rate[job.state.model.unet.conv_in.weight] for n, p in job.state.model.named_parameters() if n in names}
    assert list(ratios) == [pytest.approx(0.1)], "the text encoder learns at its own rate"
    start = load_file(next((tmp_path / "run").glob("checkpoints/*/model.safetensors")))
    generate(load_pipeline(tmp_path / "run", "cpu"), ["a red circle"], steps=1)
    assert set(names) <= set(start)


def test_parts_are_frozen_slowed_and_begun_anew(tmp_path, cache):
    trained(tmp_path / "base", cache=cache, steps=1)
    job = trained(tmp_path / "run", cache=cache, steps=1, seed=1, init_from=tmp_path / "base", train_parts="attention", lr_scales="self=0.5,cross=2",
                  reinit="cross_kv")
    start = load_file(tmp_path / "base" / "checkpoints" / "step-00000001" / "ema.safetensors")
    moved = {n for n, p in job.state.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved and all(".attn1." in n or ".attn2." in n for n in moved)
    fresh = max((p - start[n]).abs().max() for n, p in job.state.model.named_parameters() if "attn2.to_k.weight" in n)
    kept = max((p - start[n]).abs().max() for n, p in job.state.model.named_parameters() if "attn2.to_q.weight" in n)
    assert fresh > 10 * kept, "keys and values began anew, queries went on"
    rate = {n: group["lr"] for group in job.state.optimizer.param_groups for p in group["params"] for n, q in job.state.model.named_parameters() if p is q}
    assert {round(lr / rate[next(n for n in rate if ".attn1." in n)], 6) for n, lr in rate.items() if ".attn2." in n} == {4.0}


def test_an_autoencoder_of_ones_own(tmp_path, models):
    """Sixteen channels, sides divided by four, shifted: a UNet for it from nothing, out as a pipeline and in again."""
    twins.save_vae(tmp_path / "home", twins.tiny_vae(seed=5, latent_channels=16, factor=4, scaling_factor=0.9, shift_factor=0.2))
    given = {"cache": tmp_path / "cache", "vae": tmp_path / "home", "text_encoder": models / "t5", "vae_slicing": True, "vae_tiling": True}
    job = trained(tmp_path / "run", steps=2, **given)
    assert job.state.model.unet.config["in_channels"] == 16 and (job.task.channels, job.task.scaling_factor, job.task.shift_factor) == (16, 0.9, 0.2)
    assert job.encoders.autoencoder.vae.use_tiling and job.encoders.autoencoder.vae.use_slicing
    [store] = job.data.train.latents
    assert store.recipe.shape == (32, 8, 8) and store.recipe.settings["tiling"], "moments, and what decides them"
    mine = generate(load_pipeline(tmp_path / "run", "cpu"), ["two white stars"], steps=2, precision="fp32")
    out = export_latent(tmp_path / "run", tmp_path / "out")
    assert (generate(load_pipeline(out, "cpu"), ["two white stars"], steps=2, precision="fp32") - mine).abs().max() < 1e-4
    refused("other latents than|of 16 channels|takes latents of", init_from=models / "sd", model="sd15", run_dir=tmp_path / "other", **given)


def test_attention_is_added_to_a_unet_without(models):
    """Where the settings ask for it, before adapters, which then leave the new weights free."""
    from types import SimpleNamespace

    from difflit.config import TrainSettings
    from difflit.encoders import latent_network, open_encoders

    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    deaf = twins.save_sd(models / "deaf", unet=twins.tiny_unet(**plain))
    given = {"preset": "latent-tiny", "model": "sd15", "schedule": "auto", "target": "auto", **dict.fromkeys(("init_from", "vae", "text_encoder"), str(deaf))}
    settings = resolve(given, cls=TrainSettings)
    encoders = open_encoders(settings)
    x, times, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), {"clip": {"states": torch.randn(2, 77, 32), "mask": torch.ones(2, 77).bool()}}
    before, _, _ = latent_network(settings, encoders)
    for rank in (0, 2):
        asked = SimpleNamespace(**{**settings.model_dump(), "add_attention": True, "lora_rank": rank})
        model, _, notes = latent_network(asked, encoders)
        assert any("attention to words was added" in note for note in notes)
        with torch.no_grad():
            assert torch.allclose(model(x, times, text), before(x, times, text), atol=5e-6)  # another memory layout rounds otherwise
        live = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, _ in model.named_parameters() if n.endswith("proj_out.weight")} <= live


def test_adapters(tmp_path, cache, models):
    trained(tmp_path / "base", cache=cache, steps=2)
    job = trained(tmp_path / "run", cache=cache, steps=2, init_from=tmp_path / "base", lora_rank=4)
    live = [n for n, p in job.state.model.named_parameters() if p.requires_grad]
    assert live and all("lora" in n for n in live)
    generate(load_pipeline(tmp_path / "run", "cpu"), ["a red circle"], steps=1)
    trained(tmp_path / "parts", cache=cache, steps=4, lora_rank=4, stop_after=3, checkpoint_every_steps=2)
    trained(tmp_path / "parts", cache=cache, steps=4, lora_rank=4, resume="auto", checkpoint_every_steps=2)


def test_pictures_of_several_shapes_cuts_and_mirrors(tmp_path, pictures):
    common = {"cache": tmp_path / "cache", "data": pictures, "limit": None, "steps": 3, "batch_size": 4}
    job = trained(tmp_path / "buckets", **{**common, "buckets": True, "image_size": 48})
    assert len(job.data.train.latents) > 1
    varied = trained(tmp_path / "cuts", **common, crop=0.6, variants=2, flip=True)
    assert varied.data.train.variants == 4
    rows = varied.data.train.rows
    store = varied.data.train.latents[0]
    assert not torch.equal(store.read(rows[0, :1]), store.read(rows[0, 1:2]))


def test_an_edited_picture_is_computed_again_and_only_that(tmp_path, pictures):
    """The resume of a run on changed data is refused by name; a new run computes one picture."""
    given = {"cache": tmp_path / "cache", "data": pictures, "limit": None}
    trained(tmp_path / "run", stop_after=4, **given)
    photograph(99, (48, 48)).save(pictures / "06.png")
    settings = resolve({**SMALL, "preset": "latent-tiny", **{k: str(v) for k, v in given.items() if v is not None}}, cls=FillSettings)
    reports = fill_caches(settings)
    assert sum(r.done for r in reports) == 1
    with pytest.raises(Exception, match=re.escape("06.png has changed")):
        prepare(open_run({**SMALL, **{k: str(v) for k, v in given.items() if v is not None}, "run_dir": str(tmp_path / "run"), "resume": "auto"}))


def test_caches_of_other_tools(tmp_path, pictures):
    """What lies beside the pictures is imported and trained on; nothing is encoded but the empty caption."""
    from typer.testing import CliRunner

    from difflit.cli import app

    given = {"data": pictures, "limit": None, "batch_size": 4, "steps": 2}
    own = trained(tmp_path / "own", cache=tmp_path / "cache", **given)
    latents, text = own.data.train.latents[0].folder, next(iter(own.data.train.text.values())).folder
    ask = CliRunner().invoke
    for words in (["export", str(latents), str(pictures), ".img_sdxl"], ["export", str(text), str(pictures), ".txt_clipl"],
                  ["import", str(pictures), str(tmp_path / "new"), "--suffix", ".img_sdxl", "--vae", "tiny", "--image-size", "32", "--factor", "1",
                   "--any-age"],
                  ["import", str(pictures), str(tmp_path / "new"), "--suffix", ".txt_clipl", "--text-encoder", "tiny", "--any-age"]):
        done = ask(app, ["cache", *words])
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception}"
    job = trained(tmp_path / "theirs", cache=tmp_path / "new", imported=".img_sdxl,.txt_clipl", **given)
    assert not job.filled and not job.task.draw_moments
    mean = own.data.train.latents[0].read(own.data.train.rows[:, 0])[:, :4].float()
    assert torch.allclose(job.data.train.latents[0].read(job.data.train.rows[:, 0]).float(), mean, atol=2e-3)


def refused(match, kind=(SettingsError, DataError, CacheError), **given):
    with pytest.raises(kind, match=match):
        prepare(open_run({**SMALL, **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}}))


def test_what_is_refused(tmp_path, cache, models, monkeypatch):
    monkeypatch.delenv("DIFFLIT_MODELS", raising=False)
    trained(tmp_path / "run", cache=cache, steps=1)
    place = {"cache": cache, "run_dir": tmp_path / "x"}
    refused(r"(?s)has no latents of .*instead of tiny-vae", fill=False, vae=models / "scaled", **{**place, "run_dir": tmp_path / "1"})
    refused("says channels 4", vae=models / "wide", init_from=tmp_path / "run", **{**place, "run_dir": tmp_path / "2"})
    refused("difflit pull t5-xxl", text_encoder="t5-xxl", **{**place, "run_dir": tmp_path / "3"})
    refused("no multiple of", image_size=30, **{**place, "run_dir": tmp_path / "4"})
    refused("jitter", jitter=0.5, **{**place, "run_dir": tmp_path / "5"})
    refused("says scaling_factor", vae=models / "scaled", init_from=tmp_path / "run", **{**place, "run_dir": tmp_path / "6"})
    refused("has no end", limit=None, preset="shapes", model="latent-tiny", vae="tiny", text_encoder="tiny", **{**place, "run_dir": tmp_path / "7"})
    refused("holds no train set", data="cache:other", **{**place, "run_dir": tmp_path / "8"})
    refused("a latent run needs", vae=None, text_encoder=None, preset="shapes", model="latent-tiny", **{**place, "run_dir": tmp_path / "9"})


def test_a_truncated_cache_is_named(tmp_path, cache):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    rows = max(copy.glob("latents/*/rows*.bin"), key=lambda p: p.stat().st_size)
    rows.write_bytes(rows.read_bytes()[:-100])
    refused(re.escape(rows.name), cache=copy, run_dir=tmp_path / "run")


@pytest.mark.parametrize("name", ["train_sd.sh", pytest.param("train_t5.sh", marks=pytest.mark.slow)])
def test_launchers(tmp_path, models, name):
    """The launcher as it is shipped, made small by options; started again it goes on where it was."""
    bin = twins.Path(sys.executable).parent
    small = {**SMALL, "cache": tmp_path / "cache", "accumulate": 1, "vae": "tiny", "init_from": "scratch", "steps": 2}
    small["text_encoder"] = models / "t5" if "t5" in name else "tiny"
    options = [word for key, value in small.items() for word in ("-p", f"{key}={value}")]
    for steps, said in ((2, "step 2 of 2"), (4, "step 4 of 4")):
        done = subprocess.run(["bash", str(twins.Path(__file__).parent.parent / "hpc" / name), *options, "-p", f"steps={steps}"], capture_output=True,
                              text=True, timeout=600, cwd=tmp_path, env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "RUN": str(tmp_path / "run")})
        assert done.returncode == 0 and said in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "report.1.ipynb").exists()


def test_precompute_notebook(tmp_path):
    """The run notebook fills a cache, and its report shows what was done; a training file serves it too."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("preset: latent-tiny\nlimit: 16\nimage_size: 32\nlr: 1e-4\nsteps: 5\n")
    root = twins.Path(__file__).parent.parent
    words = [str(root / "nbs" / "precompute.ipynb"), str(tmp_path / "out.ipynb"), "-f", str(settings), "-p", "cache", str(tmp_path / "cache"),
             "-p", "run_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", *words], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.ipynb").read_text())
    shown = json.dumps([c.get("outputs") for c in report["cells"]], ensure_ascii=False)
    assert "latents of tiny-vae at 32 × 32 | 16 |" in shown and "scaling factor" in shown and "image/png" in shown
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
