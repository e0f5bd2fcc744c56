"""Control branches from end to end: the base untouched at step 0, trained, resumed, exported to diffusers, refused where they do not belong."""

import math
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import twins
import yaml
from conftest import TINY, photograph, save
from PIL import Image
from safetensors.torch import load_file

from difflit.config import SettingsError, resolve
from difflit.controlnet import (
    FUSIONS, ControlConfig, ControlledGlide, ControlledLatent, as_controlnet, base_digest, control_glide, control_latent, edges, latent_widths, load_control,
    control_of, save_control,
)
from difflit.data import DataError
from difflit.encoders import export_latent
from difflit.generation import generate, load_pipeline
from difflit.glide import create_glide
from difflit.latent import create_latent
from difflit.models import load_model
from difflit.recipes import prepare, score_job, train_job
from difflit.runs import finish, open_run
from difflit.samplers import SAMPLERS
from difflit.tracking import read_metrics

GLIDE = {**TINY, "preset": "shapes", "data": "shapes", "limit": 16, "image_size": 16, "checkpoint_every_steps": 2, "score_images": 4, "trackers": "none"}
LATENT = {**GLIDE, "preset": "latent-tiny", "image_size": 32, "schedule": "auto", "target": "auto"}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr("difflit.job_data.HELD_OUT", 8)
    monkeypatch.setattr("difflit.job_data.PREVIEWS", 2)
    monkeypatch.setattr("difflit.recipes.PREVIEWS", 2)


def run(folder, stop_after=None, score=False, **given):
    opened = open_run({"run_dir": str(folder), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}})
    job = train_job(prepare(opened), show=False, stop_after=stop_after)
    if score:
        score_job(job)
    finish(opened, "preempted" if stop_after else "done")
    return job


def weights(folder, step=4, kind="model"):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return run(tmp_path_factory.mktemp("base") / "run", **{**GLIDE, "steps": 2}).run.path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def latent(tmp_path_factory, cache):
    "Settings of latent runs that begin from one."
    first = run(tmp_path_factory.mktemp("latent") / "run", **{**LATENT, "cache": cache, "steps": 1, "schedule": "scaled_linear", "target": "v"}).run.path
    return {**LATENT, "cache": cache, "init_from": first}


def moved(model):
    """Random numbers where a fresh branch has zeros."""
    with torch.no_grad(), twins.seeded(3):
        for p in model.control.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


# --- step 0, for every fusion and both networks, on odd shapes and in both memory formats

SMALL = {"text_layers": 1, "text_width": 32, "text_heads": 2, "vocabulary": 64, "text_context": 8, "image_size": 16}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", [{}, {"position_map": False, "checkpointing": True, "inpaint": True, "learned_variance": True}], ids=str)
def test_glide_at_step_0_is_its_base(fusion, kind):
    network = create_glide(**SMALL, **kind)
    with torch.no_grad(), twins.seeded(0):
        for p in network.parameters():
            p.add_(0.03 * torch.randn_like(p))
    made = control_glide(network, ControlConfig("parts", "picture", 3, fusion=fusion))
    side = 16 if network.config.position_map else 24
    x, times, tokens = torch.randn(3, 3, side, side), torch.tensor([1.0, 500.0, 999.0]), torch.randint(0, 64, (3, 8))
    asked = dict(tokens=tokens, mask=torch.ones(3, 8, dtype=torch.bool))
    control = torch.randn(3, 3, side, side).requires_grad_()
    answer = made(x, times, **asked, control=control)
    assert torch.equal(answer, network(x, times, **asked))
    answer.square().mean().backward()
    assert control.grad.abs().max() == 0, "nothing of the control reaches the answer"
    first = [p.grad.abs().max() for p in made.control.fusions.parameters() if p.grad is not None]
    assert max(first) > 0, "but it can learn"
    names = {n for n, _ in network.named_parameters()}
    assert names == {n for n, _ in made.named_parameters() if not n.startswith("control.")}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_latent_at_step_0_is_its_base(fusion, masked):
    small = {k: v for k, v in twins.tiny_unet().config.items() if not k.startswith("_")}
    network = create_latent(small, {"text": {"width": 32, "length": 5, "masked": masked}})
    x, times = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 700.0])
    text = {"text": {"states": torch.randn(2, 5, 32), "mask": torch.tensor([[True] * 5, [True] * 2 + [False] * 3])}}
    before = network(x, times, text)
    made = control_latent(network, ControlConfig("parts", "picture", 3, fusion=fusion, widths=latent_widths(8)))
    assert torch.equal(made(x, times, text, control=torch.randn(2, 3, 64, 64)), before)
    moved(made)
    assert not torch.equal(made(x, times, text, control=torch.randn(2, 3, 64, 64)), before)
    assert torch.equal(made(x, times, text), before)


@pytest.mark.parametrize("fusion", ["add", "learned-scale", "scaled-add"])
def test_parity_with_diffusers(fusion):
    """Sixty-four bits, so that nothing hides in rounding: diffusers' own call of its branch and UNet."""
    small = {k: v for k, v in twins.tiny_unet().config.items() if not k.startswith("_")}
    made = moved(control_latent(create_latent(small, {"text": {"width": 32, "length": 5}}),
                                ControlConfig("depth", "picture", 3, fusion=fusion, factor=0.3, widths=latent_widths(8)))).double().eval()
    x, times, control = torch.randn(2, 4, 8, 8).double(), torch.tensor([1.0, 700.0]).double(), torch.rand(2, 3, 64, 64).double() * 2 - 1
    states = torch.randn(2, 5, 32).double()
    net = as_controlnet(made).eval()
    down, middle = net(x, times, states, (control + 1) / 2, conditioning_scale=0.6, return_dict=False)
    theirs = made.unet(x, times, states, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    text = {"text": {"states": states, "mask": torch.ones(2, 5, dtype=torch.bool)}}
    torch.testing.assert_close(made(x, times, text, control=control, control_scale=0.6), theirs, rtol=1e-10, atol=1e-10)


# --- signals

def test_edges_find_outlines_of_scenes():
    """Against exact masks: nearly every edge pixel touches an outline, and nearly every outline pixel an edge."""
    from difflit.controlnet import requested_layout
    from difflit.data import image_tensor
    from difflit.sources import ShapesSource, draw_scene

    source, touched, covered = ShapesSource(image_size=64), [], []
    grow = lambda mask: torch.nn.functional.max_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0] > 0
    for i in range(40):
        found = edges(image_tensor(source[i].image, 64)[None])[0, 0] > 0
        inside = requested_layout(draw_scene(0, i), 64)
        outline = grow(inside) & grow(~inside)
        touched.append((found & outline).sum() / found.sum())
        covered.append((outline & inside & grow(found)).sum() / (outline & inside).sum())
    assert np.mean(touched) > 0.98 and np.mean(covered) > 0.9, (np.mean(touched), np.mean(covered))
    assert edges(torch.zeros(1, 3, 8, 8)).max() == -1


# --- GLIDE: runs

@pytest.mark.parametrize("control", [pytest.param("edges", marks=pytest.mark.slow), "segmentation"])
def test_a_run_trains_the_branch_alone_and_resumes_exactly(tmp_path, base, control):
    given = {**GLIDE, "control": control, "init_from": base, "uncond_p": 0.5, "validate_every_steps": 2}
    job = run(tmp_path / "whole", score=True, **given)
    start = weights(base, 2, "ema")
    after = weights(tmp_path / "whole")
    assert all(torch.equal(after[n], start[n]) for n in start), "the base is as it was"
    branch = {n for n in after if n.startswith("control.")}
    assert branch and set(after) == branch | set(start)
    assert any(after[n].abs().max() > 0 for n in branch if n.startswith("control.fusions.")), "and the branch learns"
    trained = {id(p) for group in job.state.optimizer.param_groups for p in group["params"]}
    assert {n for n, p in job.state.model.named_parameters() if id(p) in trained} == branch
    assert {"control.iou", "control.iou_without"} <= set(job.scores) and job.scores["control.iou"]["n"] == 4
    run(tmp_path / "parts", stop_after=3, **given)
    run(tmp_path / "parts", resume="auto", **given)
    for kind in ("model", "ema"):
        one, two = weights(tmp_path / "whole", kind=kind), weights(tmp_path / "parts", kind=kind)
        assert all(torch.equal(one[n], two[n]) for n in one)
    rows = [[v for v in read_metrics(tmp_path / name)["val_loss"].tolist() if math.isfinite(v)] for name in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 2, "validation sees the controls of its pictures"


def test_a_checkpoint_draws_and_goes_on(tmp_path, base):
    job = run(tmp_path / "run", **{**GLIDE, "control": "segmentation:coloured", "init_from": base, "control_fusion": "film", "control_scale": 0.5, "steps": 2})
    moved(job.state.ema.model)
    from difflit.recipes import save_job

    job.state.step = 3
    save_job(job)
    job.writer.wait()
    pipeline = load_pipeline(tmp_path / "run", "cpu")
    assert isinstance(pipeline.model, ControlledGlide) and (pipeline.control.form, pipeline.control_scale) == ("coloured", 0.5)
    layout = Image.fromarray(np.repeat(np.array([[0] * 8 + [3] * 8], np.uint8), 16, axis=0))
    words = ["a large red circle on the right, grey background"]
    drawn = generate(pipeline, words, control=layout, precision="fp32", steps=2)
    assert torch.equal(drawn, generate(pipeline, words, control=layout, control_scale=0.5, precision="fp32", steps=2))
    free = generate(pipeline, words, precision="fp32", steps=2)
    assert not torch.equal(drawn, free)
    again = run(tmp_path / "more", **{**GLIDE, "control": "segmentation:coloured", "control_fusion": "film", "init_from": tmp_path / "run", "steps": 1})
    assert any("control" in n for n, p in again.state.model.named_parameters() if p.requires_grad)
    for message, wrong in {"have a branch for segmentation: say control=segmentation": {"control": "", "train_base": True},
                           "has fusion='film', asked for is 'add'": {"control": "segmentation:coloured"},
                           "form='coloured', asked for is 'one-hot'": {"control": "segmentation", "control_fusion": "film"}}.items():
        with pytest.raises(SettingsError, match=message):
            prepare(open_run({**GLIDE, "init_from": str(tmp_path / "run"), "run_dir": str(tmp_path / message[:12]), **wrong}))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_follows(base, sampler):
    model, card = load_model(base)
    from difflit.diffusion import Diffusion
    from difflit.generation import draw
    from difflit.models import model_folder
    from difflit.text import Tokenizer

    model = model.to(memory_format=torch.channels_last).eval()  # as the branch is: another order of the numbers is another order of the sums
    branch, words = moved(control_glide(model, ControlConfig())).eval(), ["a small red star in the centre, grey background"]
    asked = dict(tokenizer=Tokenizer.load(model_folder(base) / "tokenizer.json"), prompts=words, image_size=16, sampler=sampler, steps=3, guidance=2.0)
    told = {"control": edges(torch.rand(1, 3, 16, 16)), "control_scale": torch.ones(1)}
    diffusion = Diffusion(**card["diffusion"])
    free, led = draw(branch, diffusion, **asked), draw(branch, diffusion, **asked, given=told)
    assert torch.equal(free, draw(model, diffusion, **asked)) and not torch.equal(free, led) and led.isfinite().all()


def test_all_may_train(tmp_path, base):
    job = run(tmp_path / "run", **{**GLIDE, "control": "edges", "init_from": base, "train_base": True, "steps": 1})
    assert all(p.requires_grad for p in job.state.model.parameters())
    scratch = run(tmp_path / "scratch", **{**GLIDE, "control": "edges", "train_base": True, "steps": 1})
    assert isinstance(scratch.state.model, ControlledGlide)


def test_a_column_of_ones_own(tmp_path, base):
    """Depth pictures beside the pictures of a folder; their absence, and another shape of them, is said before the first step."""
    place = tmp_path / "pictures"
    for i in range(12):
        save(place, f"{i:02d}.png", photograph(i, (20, 16)), f"photograph {i}")
        photograph(i + 50, (20, 16)).convert("L").save(place / f"{i:02d}.depth.png")
    given = {**GLIDE, "data": place, "limit": None, "init_from": base, "steps": 1, "score_images": 0}
    given = {k: v for k, v in given.items() if v is not None}
    job = run(tmp_path / "run", **given, control="depth=depth.png", flip=True, crop=0.7)
    assert job.state.model.config.control.channels == 3
    with pytest.raises(DataError, match="normals"):
        prepare(open_run({**{k: str(v) for k, v in given.items()}, "control": "normals=normals.png", "run_dir": str(tmp_path / "missing")}))
    with pytest.raises(SettingsError, match="say by control_classes how many"):
        prepare(open_run({**{k: str(v) for k, v in given.items()}, "control": "depth=depth.png:one-hot", "run_dir": str(tmp_path / "classes")}))


# --- latent: runs

@pytest.mark.parametrize("control", [pytest.param("edges", marks=pytest.mark.slow), "segmentation"])
def test_a_latent_run_from_its_caches(tmp_path, latent, control):
    given = {**latent, "control": control, "validate_every_steps": 2}
    job = run(tmp_path / "whole", score=True, **given)
    assert isinstance(job.state.model, ControlledLatent)
    trained = {n for n, p in job.state.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in job.state.model.named_parameters() if n.startswith("control.")}
    assert {"control.iou", "control.iou_without"} <= set(job.scores)
    run(tmp_path / "parts", stop_after=3, **given)
    run(tmp_path / "parts", resume="auto", **given)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_export_is_read_by_diffusers(tmp_path, latent):
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

    job = run(tmp_path / "run", **{**latent, "control": "segmentation:coloured", "steps": 1, "control_fusion": "learned-scale"})
    moved(job.state.ema.model)
    from difflit.recipes import save_job

    job.state.step = 2
    save_job(job)
    job.writer.wait()
    out = export_latent(tmp_path / "run", tmp_path / "out")
    layout = np.zeros((32, 32, 3), np.uint8)
    layout[8:24, 8:24] = (255, 0, 0)
    words, picture = ["a large red square in the centre, grey background"], Image.fromarray(layout)
    mine = [generate(load_pipeline(path, "cpu"), words, control=picture, precision="fp32", steps=3, guidance=3.0, sampler="ddim")
            for path in (tmp_path / "run", out)]
    assert (mine[0] - mine[1]).abs().max() < 1e-3, "the exported pipeline brings its branch along"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = ControlNetModel.from_pretrained(out / "controlnet")
        theirs = StableDiffusionControlNetPipeline.from_pretrained(out, controlnet=net, safety_checker=None)
        theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
        theirs.set_progress_bar_config(disable=True)
        pipeline = load_pipeline(tmp_path / "run", "cpu")
        from difflit.denoising import per_sample_noise

        noise = per_sample_noise([0])(-1, (1, 4, 8, 8))
        drawn = theirs(words, image=picture, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    close = (drawn * 2 - 1 - mine[0]).abs()
    assert float(close.mean()) < 0.02, (float(close.mean()), float(close.max()))
    assert pipeline.control.form == "coloured"
    run(tmp_path / "film", **{**latent, "control": "edges", "steps": 1, "control_fusion": "film"})
    with pytest.raises(SettingsError, match="fusion='film' does more"):
        export_latent(tmp_path / "film", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_branch_of_diffusers_is_trained_on(tmp_path, latent):
    """One that was saved by diffusers itself, with weights that are not zero."""
    base = lambda: load_model(latent["init_from"])[0]
    made = moved(control_latent(base(), ControlConfig("segmentation", "coloured", 3, 6, widths=latent_widths(4))))
    as_controlnet(made).save_pretrained(tmp_path / "net")
    given = {**latent, "control": "segmentation:coloured", "steps": 1, "lr": 1e-9, "control_from": tmp_path / "net"}
    job = run(tmp_path / "run", **given)
    ours, theirs = job.state.model.control.state_dict(), made.control.state_dict()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)
    save_control(made, tmp_path / "own")
    assert isinstance(run(tmp_path / "again", **{**given, "control_from": tmp_path / "own"}).state.model, ControlledLatent)
    with pytest.raises(SettingsError, match="is a branch for ControlConfig"):
        prepare(open_run({**{k: str(v) for k, v in given.items()}, "control": "edges", "control_from": str(tmp_path / "own"), "run_dir": str(tmp_path / "o")}))
    other = base()
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1e-3)
    with pytest.raises(SettingsError, match="was trained on a base with the digest"):
        load_control(other, tmp_path / "own")
    assert isinstance(load_control(other, tmp_path / "own", any_base=True), ControlledLatent)
    assert base_digest(load_control(base(), tmp_path / "own")) == base_digest(base())


# --- what is refused

@pytest.mark.parametrize("message, given", [
    ("name the network by init_from", {"control": "edges"}),
    ("did you mean 'gated'", {"control": "edges", "control_fusion": "gate", "train_base": True}),
    ("did you mean 'one-hot'", {"control": "segmentation:onehot", "train_base": True}),
    ("for networks that draw from words", {"control": "edges", "train_base": True, "model": "tiny-inpaint", "image_size": 64}),
    ("follows held-out pictures", {"control": "edges", "train_base": True, "prompts": "PROMPTS"}),
])
def test_what_cannot_be_is_said(tmp_path, message, given):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = {k: str(tmp_path / "prompts.txt") if v == "PROMPTS" else v for k, v in given.items()}
    with pytest.raises(SettingsError, match=message):
        prepare(open_run({**GLIDE, **given, "run_dir": str(tmp_path / "run")}))


@pytest.mark.parametrize("control", ["edges", "segmentation:coloured"])
def test_controls_are_cut_as_their_latents(tmp_path, latent, control):
    """Mirror images and random cuts of cached pictures come with a control that was cut alike."""
    given = {**latent, "control": control, "data": "digits", "limit": 8, "flip": True, "crop": 0.7, "variants": 2, "steps": 1}
    job = prepare(open_run({"run_dir": str(tmp_path / "run"), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}}))
    with job.loader:
        batches = [next(job.loader) for _ in range(3)]
    finish(job.run)
    moments, told = (torch.cat(rows) for rows in zip(*((b["moments"], control_of(b, job.state.model.config.control)) for b in batches)))
    ids = [name for b in batches for name in b["id"]]
    pairs = [(i, j) for i in range(len(ids)) for j in range(i) if ids[i] == ids[j]]
    alike = [torch.equal(moments[i], moments[j]) for i, j in pairs]
    assert 0 < sum(alike) < len(pairs) and alike == [torch.equal(told[i], told[j]) for i, j in pairs], "another cut has another control, the same cut the same"


def test_presets_resolve():
    for name in ("controlnet-tiny", "latent-controlnet-tiny", "sd15-controlnet"):
        assert resolve({"preset": name, "init_from": "somewhere"}).control


@pytest.mark.slow
def test_a_branch_learns_to_place(tmp_path):
    """GLIDE on drawn scenes, then a branch that is told layouts: things lie where they were asked for."""
    base = run(tmp_path / "base", preset="shapes", steps=900, score_images=0, trackers="none").run.path
    job = run(tmp_path / "run", score=True, preset="controlnet-tiny", init_from=base, trackers="none")
    told, free = job.scores["control.iou"], job.scores["control.iou_without"]
    assert told["low"] > free["high"] + 0.05, (told, free)


def test_launcher_submits_a_branch_and_each_fusion(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "difflit").write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >>words\n')
    (tmp_path / "bin" / "difflit").chmod(0o755)
    place = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PHASES": "train fusions", "BASE": "", "CONTROL": "depth=depth.png"}
    command = ["bash", str(Path(__file__).parent.parent / "hpc" / "controlnet.sh"), "--dry-run"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, env=place).returncode == 0
    words = [line.split("\n") for line in (tmp_path / "words").read_text().split("\nEND\n")]
    assert all(line[:4] == ["submit", "train", "-f", "runs/controlnet/controlnet.yaml"] and line[-1] == "--dry-run" for line in words[:2])
    told = yaml.safe_load((tmp_path / "runs/controlnet/controlnet.yaml").read_text())
    assert resolve(told).control == "depth=depth.png" and resolve(told).init_from == resolve({"preset": "sd15-controlnet"}).init_from
    swept = next(word for word in words[1] if word.startswith("control_fusion="))
    assert set(swept.partition("=")[2].split(",")) == set(FUSIONS)
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, env=place | {"PHASES": "all"}).returncode == 2
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, env=place | {"PHASES": "train", "BASE": "runs/base"}).returncode == 0
    assert yaml.safe_load((tmp_path / "runs/controlnet/controlnet.yaml").read_text())["init_from"] == "runs/base"
