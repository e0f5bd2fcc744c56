"""Autoencoders of one's own: parity with diffusers, exact resume, the chain from an autoencoder to scores, and what is refused."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, photograph, save
from safetensors.torch import load_file

from difflit.autoencoder import AutoencoderConfig, create_autoencoder, kl_config
from difflit.checkpoints import best_checkpoint
from difflit.config import EvaluateSettings, FillSettings, SettingsError, resolve
from difflit.data import UNKNOWN, DataError, image_tensor
from difflit.generation import load_pipeline
from difflit.job_data import fill_caches
from difflit.models import load_model
from difflit.pipelines import load_autoencoder
from difflit.recipes import export_coder, prepare, score_job, train_job
from difflit.reports import coding_table, model_table, progress_figure, shown_figure, where_table
from difflit.runs import finish, open_run
from difflit.submission import make_cells, plan_chain, read_ablations, read_notebook
from difflit.tasks import create_task
from difflit.tracking import read_metrics

SMALL = {**TINY, "preset": "autoencoder-tiny", "base_channels": 8, "channel_multipliers": "1,2", "limit": 64, "image_size": 32, "steps": 6, "score_images": 24,
         "checkpoint_every_steps": 2, "validate_every_steps": 2, "sample_every_steps": 3}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr("difflit.job_data.HELD_OUT", 12)


def trained(folder, stop_after=None, score=False, **given):
    """A run of a few steps, as its notebook makes it."""
    opened = open_run({**SMALL, "run_dir": str(folder), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}})
    job = train_job(prepare(opened), show=False, stop_after=stop_after)
    judged = score_job(job) if score else None
    finish(opened, "preempted" if stop_after else "done")
    return (job, judged) if score else job


def same(a, b, step=6):
    """Weights and averages of two runs, to the bit."""
    one, two = ({name: load_file(f / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors") for name in ("model", "ema")} for f in (a, b))
    return all(one[n].keys() == two[n].keys() and all(torch.equal(one[n][k], two[n][k]) for k in one[n]) for n in one)


def refused(match, folder, kind=(SettingsError, DataError), **given):
    with pytest.raises(kind, match=match):
        prepare(open_run({**SMALL, "run_dir": str(folder), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}}))


def test_reconstructions_are_diffusers(tmp_path):
    """What a run exports encodes and decodes in diffusers as it did in the run, scaled by what was measured over the data."""
    from diffusers import AutoencoderKL

    job, judged = trained(tmp_path / "run", score=True, keep_best=0)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    model, truth = job.state.ema.model, judged.rows["true"]
    with torch.no_grad():
        posterior = theirs.encode(truth).latent_dist
        ours = model(truth)
        assert torch.allclose(posterior.parameters, ours["moments"], atol=1e-5)
        assert torch.allclose(theirs.decode(posterior.mean).sample, ours["image"], atol=1e-5)
        assert torch.allclose(judged.rows["made"], ours["image"], atol=1e-5)
        noise = torch.randn(posterior.mean.shape)
        assert torch.allclose(model(truth, noise)["image"], theirs.decode(posterior.mean + posterior.std * noise).sample, atol=1e-5)
        drawn = []
        for start in range(0, 64, 16):
            pictures = torch.stack([image_tensor(job.data.train[i].image, 32) for i in range(start, start + 16)])
            found = theirs.encode(pictures).latent_dist
            drawn += [found.mean.double() + found.std.double() * torch.randn(found.mean.shape, dtype=torch.float64) for _ in range(20)]
    deviation = torch.cat(drawn).std()
    assert abs(theirs.config.scaling_factor * deviation - 1) < 0.01, "1 / deviation of latents as they are drawn, over all training pictures"
    assert set(json.loads((tmp_path / "run" / "scores.json").read_text())) == set(judged.scores)
    for score in judged.scores.values():
        assert set(score) == {"value", "low", "high", "n", "protocol"} and score["low"] <= score["value"] <= score["high"]


def test_stopped_and_resumed_is_the_same_to_the_bit(tmp_path):
    """Noise of the posterior, heads, terms and averages, in one go and in three."""
    given = {"loss_terms": "perceptual=0.1,adversarial=0.01", "attention": "middle"}
    trained(tmp_path / "whole", **given)
    trained(tmp_path / "parts", stop_after=3, **given)
    trained(tmp_path / "parts", stop_after=5, resume="auto", **given)
    job = trained(tmp_path / "parts", resume="auto", **given)
    assert job.state.step == 6 and same(tmp_path / "whole", tmp_path / "parts")
    one, two = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss", "loss_rgb", "loss_kl", "loss_segmentation", "loss_label", "val_loss", "val_segmentation_miou"):
        assert torch.equal(torch.from_numpy(one[name]).nan_to_num(-1), torch.from_numpy(two[name]).nan_to_num(-1)), name
    trained(tmp_path / "other", seed=1, **given)
    assert not same(tmp_path / "whole", tmp_path / "other")


def test_micro_batches_add_up(tmp_path):
    trained(tmp_path / "whole", steps=2)
    trained(tmp_path / "parts", steps=2, accumulate=2)
    one, two = (load_file(tmp_path / name / "checkpoints" / "step-00000002" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


@pytest.mark.slow
def test_it_learns_its_heads():
    """Four pictures by heart: colours, every pixel's class, every picture's class."""
    torch.manual_seed(0)
    heads = {"segmentation": {"kind": "labels", "classes": 3}, "label": {"kind": "number", "classes": 4}}
    model = create_autoencoder(AutoencoderConfig(kl_config(8, (1, 2)), heads=heads))
    image = torch.full((4, 3, 16, 16), -0.5)
    labels = torch.zeros(4, 16, 16, dtype=torch.int64)
    for i in range(4):
        image[i, i % 3, 4 * i : 4 * i + 6, 4:12], labels[i, 4 * i : 4 * i + 6, 4:12] = 0.8, 1 + i % 2
    labels[:, :, 0] = UNKNOWN
    batch = {"image": image, "position": torch.arange(4), "id": list("abcd"), "segmentation": labels, "label": torch.arange(4)}
    job = create_task("autoencoder", heads={"segmentation": 0.3, "label": 0.1})
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(150):
        told = job.loss(model, {**batch, "position": torch.arange(4) + 4 * step})
        optimizer.zero_grad()
        told.loss.mean().backward()
        optimizer.step()
    found = job.validation_loss(model.eval(), [batch])
    assert found["val_psnr"] > 20 and found["val_segmentation_miou"] > 0.8 and found["val_label_accuracy"] >= 0.75, found


def test_chain(tmp_path, monkeypatch):
    """Autoencoder, latents, diffusion, scores: the commands of the documentation, in small."""
    monkeypatch.chdir(tmp_path)
    job, judged = trained("runs/my-autoencoder", score=True)
    table = coding_table("runs/my-autoencoder")
    factor = load_autoencoder("runs/my-autoencoder").scaling_factor
    assert f"scaling factor **{factor:.5f}**" in table and "| 3 |" in table and "vae=runs/my-autoencoder" in where_table("runs/my-autoencoder")
    assert "AutoencoderKL of 8 → 16 channels" in model_table(job) and "`segmentation`, 6 classes of each pixel, weight" in model_table(job)
    assert progress_figure("runs/my-autoencoder") is not None and shown_figure(judged) is not None
    common = {"preset": "latent-tiny", "data": "shapes", "limit": 24, "image_size": 32, "vae": "runs/my-autoencoder", "cache": "cache"}
    reports = fill_caches(resolve(common, cls=FillSettings))
    assert [r.done for r in reports][:2] == [24, 12]
    latent = {**TINY, **common, "steps": 2, "fill": False, "score_images": 4, "validation_images": 8, "batch_size": 4}
    opened = open_run({**latent, "run_dir": "runs/diffusion"})
    diffusion = train_job(prepare(opened), show=False)
    assert diffusion.task.scaling_factor == factor and diffusion.state.model.unet.config["in_channels"] == 4
    assert set(score_job(diffusion).scores)
    finish(opened)
    assert load_pipeline("runs/diffusion", "cpu").autoencoder.scaling_factor == factor
    settings = resolve({"models": "runs/diffusion", "prompt_images": 20, "reference_images": 24, "sampler_steps": 1, "data": "shapes"}, cls=EvaluateSettings)
    assert settings.models == "runs/diffusion"
    export_coder("runs/my-autoencoder", "exported", dtype="bf16")
    assert load_autoencoder("exported").factor == 2
    with pytest.raises(SettingsError, match="autoencoder"):
        load_pipeline("runs/my-autoencoder", "cpu")


@pytest.mark.slow
def test_the_best_is_exported_and_the_latest_stays(tmp_path):
    """A rate that breaks what was learnt: the best checkpoint is an early one."""
    job, judged = trained(tmp_path / "run", score=True, keep_best=1, best_by="+val_psnr", steps=8, lr=0.5, warmup_steps=5, lr_schedule="constant",
                          keep_checkpoints=1, early_stop="+val_psnr", patience=1)
    best = best_checkpoint(tmp_path / "run", "val_psnr", True)
    said = json.loads((tmp_path / "run" / "vae" / "difflit.json").read_text())
    assert best.step == said["step"] and load_model(tmp_path / "run")[0].config.channels == 4
    if best.step < job.state.step:
        assert any("best checkpoint by +val_psnr" in note for note in job.notes)
    assert job.state.step == 8 or "early stopping" in job.state.stopped


def test_plain_and_given_autoencoders(tmp_path):
    """Without sampling; then on from an exported folder and from a run, with a head more."""
    trained(tmp_path / "plain", score=True, variational=False, heads="", rgb_loss="l2")
    metrics = read_metrics(tmp_path / "plain")
    assert "loss_kl" not in metrics and "loss_segmentation" not in metrics
    coder = load_autoencoder(tmp_path / "plain")
    moments = coder.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert torch.allclose(coder.latents_of(moments, torch.ones(2, 4, 16, 16)), coder.latents_of(moments), atol=1e-5)
    sizes = {"base_channels": None, "channel_multipliers": None}
    start = {k: v for k, v in {**SMALL, **sizes}.items() if v is not None}
    for where in ("plain/vae", "plain"):
        folder = str(tmp_path / f"from {where.replace('/', ' ')}")
        opened = open_run({**start, "run_dir": folder, "init_from": str(tmp_path / where), "heads": "label=0.1", "steps": 1})
        job = prepare(opened)
        given = load_autoencoder(tmp_path / "plain").vae.state_dict()
        assert all(torch.allclose(value, given[name]) for name, value in job.state.model.vae.state_dict().items() if "quant_conv" not in name)
        assert list(job.state.model.heads) == ["label"]
        for name, value in (("base_channels", 8), ("channel_multipliers", "1,2"), ("latent_channels", 4)):
            chosen = {**{other: None for other in ("base_channels", "channel_multipliers")}, name: value}
            refused(f"has its own {name}, which cannot be chosen: leave {name} away", tmp_path / f"{where.replace('/', ' ')} {name}",
                    init_from=tmp_path / where, **chosen)
        train_job(job, show=False)
        finish(opened)


def test_what_is_refused(tmp_path):
    refused("kl_weight=-1", tmp_path / "1", kl_weight=-1)
    refused("weights 0 or above", tmp_path / "2", heads="label=-1")
    refused("heads belong to an autoencoder", tmp_path / "3", preset="shapes", heads="label=1", base_channels=None)
    refused("no multiple of 4", tmp_path / "4", image_size=30, channel_multipliers="1,1,1")
    refused("has 5: circle", tmp_path / "5", heads="label:3=1")
    refused("there is no autoencoder 'autoencoder-tinny'", tmp_path / "6", model="autoencoder-tinny")
    refused("cannot predict a picture", tmp_path / "7", heads="layout=1")
    refused("is trained itself", tmp_path / "8", vae="tiny")
    refused("depth", tmp_path / "9", heads="depth=1")
    pictures = tmp_path / "pictures"
    for i in range(12):
        save(pictures, f"{i}.png", photograph(i), f"photograph {i}")
    given = {"data": pictures, "limit": None}
    refused("say how many there are", tmp_path / "10", heads="segmentation=1", **given)
    with pytest.raises((SettingsError, DataError), match="segmentation"):
        trained(tmp_path / "11", heads="segmentation:3=1", **given)


def test_a_class_too_many_is_named(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    for i in range(12):
        save(pictures, f"{i}.png", photograph(i, (32, 32)), f"photograph {i}")
        Image.new("L", (32, 32), 5 if i == 7 else i % 3).save(pictures / f"{i}.segmentation.png")
    given = {"data": pictures, "limit": None, "batch_size": 4, "validation_images": 2}
    with pytest.raises(SettingsError, match=r"'segmentation' has the class 5 in .*7.*, and its head knows 3: 0…2 \(255: not known\)"):
        trained(tmp_path / "run", heads="segmentation:3=1", **given)
    trained(tmp_path / "fits", heads="segmentation:6=1", steps=2, **given)


def test_launcher_writes_phases_and_a_sweep_that_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "difflit").write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >>words\n')
    (tmp_path / "bin" / "difflit").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(ROOT / "hpc" / "autoencoder.sh"), "--dry-run"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PATH": path, "PHASES": "chain capacity ablations"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().split("\n").count("--dry-run") == 3
    monkeypatch.setattr("difflit.submission.check_environment", lambda *given, **more: tmp_path)
    find = lambda name: ROOT / "nbs" / f"{name}.ipynb"  # noqa: E731
    chain = plan_chain("runs/autoencoder/chain.yaml", find=find)  # all checks included: what an earlier link makes counts as there
    assert [Path(p.record["folder"]).name for p in chain] == ["autoencoder", "latents", "diffusion", "evaluate"]
    assert chain[1].cells[0].settings.vae == chain[2].cells[0].settings.vae == "runs/autoencoder/runs/autoencoder"
    cells = {}
    for name in ("capacity", "ablations"):
        common, named, grid = read_ablations(f"runs/autoencoder/{name}.yaml")
        cells[name] = make_cells(read_notebook(find("train")), common, grid, named)
    assert len(cells["capacity"]) == 12 and {cell.settings.attention for cell in cells["capacity"]} == {"none", "middle", "deep"}
    told = {cell.name: cell.settings for cell in cells["ablations"]}
    assert not told["no-heads"].heads and not told["no-sampling"].variational and told["preset"].heads
