"""Silent bugs seen in other trainers, each with a test by its name."""

import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY

from difflit.config import SettingsError
from difflit.data import Sample, Source
from difflit.diffusion import Diffusion
from difflit.generation import draw, generate
from difflit.recipes import prepare, preview_prompts, train_job
from difflit.runs import fail, finish, open_run, read_status
from difflit.sampling import sample
from difflit.loading import Loader, open_source


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = open_run({**TINY, "steps": 6, "lr": 1e-2, "run_dir": str(tmp_path_factory.mktemp("trained") / "run")})
    job = prepare(run)
    job.first = SimpleNamespace(ema={k: v.clone() for k, v in job.state.ema.model.state_dict().items()})
    train_job(job, show=False)
    yield job
    finish(run)


def test_the_average_has_moved(trained):
    now = trained.state.ema.model.state_dict()
    moved = [k for k in now if not torch.equal(now[k], trained.first.ema[k])]
    assert len(moved) > 0.9 * len(now)


def test_live_weights_are_unchanged_by_sampling(trained):
    before = {k: v.clone() for k, v in trained.state.model.state_dict().items()}
    random = torch.get_rng_state()
    draw(trained.state.ema.model, trained.diffusion, trained.tokenizer, ["a red circle"], 32, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in trained.state.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert trained.state.model.training


def test_dropping_all_captions_trains_the_unconditional_model(tmp_path):
    """With uncond_p 1 no caption reaches the model: whatever the captions say, the same weights come out, and guidance from the empty caption is void."""
    weights = []
    for name, first in (("a", 0), ("b", 5)):
        run = open_run({**TINY, "steps": 3, "uncond_p": 1.0, "run_dir": str(tmp_path / name)})
        job = prepare(run)
        other = [job.data.train[i].caption for i in range(first, first + 50)]
        job.data.train = Renamed(job.data.train, other)
        train_job(job, show=False)
        finish(run)
        weights.append(job.state.model.state_dict())
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    unguided, guided = (draw(job.state.ema.model, job.diffusion, job.tokenizer, [""], 32, guidance=g, steps=3) for g in (0.0, 4.0))
    torch.testing.assert_close(unguided, guided, rtol=1e-4, atol=1e-4)


class Renamed(Source):
    """A source whose captions were exchanged."""

    def __init__(self, source, captions):
        self.source, self.texts, self.name = source, captions, source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        return Sample(sample.image, self.texts[index % len(self.texts)], sample.id)

    def digest(self):
        return self.source.digest()


def test_guidance_with_the_empty_caption_is_the_unconditional_result(trained):
    """Told nothing on both branches, any guidance gives the unconditional picture."""
    options = {"steps": 4, "seeds": [3]}
    plain = draw(trained.state.ema.model, trained.diffusion, trained.tokenizer, [""], 32, guidance=1.0, **options)
    guided = draw(trained.state.ema.model, trained.diffusion, trained.tokenizer, [""], 32, guidance=5.0, **options)
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-4)
    none = draw(trained.state.ema.model, trained.diffusion, trained.tokenizer, ["a red circle"], 32, guidance=0.0, **options)
    torch.testing.assert_close(plain, none, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", ["shapes", "digits", "emoji"])
def test_captions_are_dropped_in_every_source(name, share):
    source = open_source(name, seed=0, image_size=16)
    loader = Loader(source, batch_size=500, image_size=16, uncond_p=share)
    gone = sum(caption == "" for _ in range(2) for caption in next(loader)["caption"])
    assert abs(gone / 1000 - share) <= 4 * (share * (1 - share) / 1000) ** 0.5


def test_the_last_timestep_is_trained():
    times = Diffusion("squared_cosine", "eps").draw_times(0, "time", torch.arange(50_000))
    assert int(times.min()) == 0 and int(times.max()) == 999
    flow = Diffusion("flow", "flow").draw_times(0, "time", torch.arange(50_000))
    assert float(flow.max()) <= 1.0 and float(flow.max()) > 0.999


def test_sampling_leaves_the_mode_of_the_model(trained):
    model = trained.state.model.train()
    condition = trained.tokenizer(["a red circle"])
    sample(model, trained.diffusion, condition, unconditional=trained.tokenizer([""]), steps=2, seeds=[0], shape=(3, 32, 32))
    assert model.training


def test_weights_decay_on_matrices_only(trained):
    for group in trained.state.optimizer.param_groups:
        assert group["weight_decay"] == 0 or all(p.ndim >= 2 for p in group["params"])
    assert {group["weight_decay"] > 0 for group in trained.state.optimizer.param_groups} == {True, False}


def test_the_text_tower_learns_at_its_own_rate(trained):
    slow = {p for group in trained.state.optimizer.param_groups if group["lr_scale"] < 1 for p in group["params"]}
    named = dict(trained.state.model.named_parameters())
    assert named["token_embedding.weight"] in slow and named["transformer.resblocks.0.attn.c_qkv.weight"] in slow
    assert named["input_blocks.0.0.weight"] not in slow and named["transformer_proj.weight"] not in slow


# What goes wrong, and how it is told


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    run = open_run({**TINY, "run_dir": str(tmp_path / "run"), "checkpoint_every_steps": 2})
    job = prepare(run)
    train_job(job, show=False, stop_after=2)
    with patch("difflit.checkpoints._write_hashed", full_disk):
        with pytest.raises(OSError, match="No space left"):
            train_job(job, show=False)
    fail(run, "No space left on device")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    again = prepare(open_run({"run_dir": str(tmp_path / "run"), "resume": "auto"}))
    assert again.state.step == 2
    finish(again.run)


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_room_is_asked_for_before_the_first_step(tmp_path):
    run = open_run({**TINY, "run_dir": str(tmp_path / "run")})
    usage = SimpleNamespace(total=10**9, used=10**9, free=10**6)
    with patch.object(shutil, "disk_usage", return_value=usage), pytest.raises(OSError, match="keeping 2 checkpoints .* needs"):
        prepare(run)
    fail(run, "no room")
    assert read_status(tmp_path / "run")["state"] == "failed"


def test_two_runs_cannot_share_a_directory(tmp_path):
    from difflit.runs import RunError

    run = open_run({**TINY, "run_dir": str(tmp_path / "run")})
    with pytest.raises(RunError, match="already holds a run"):
        open_run({**TINY, "run_dir": str(tmp_path / "run")})
    finish(run)


def test_resuming_with_another_model_names_the_misfit(tmp_path):
    from difflit.checkpoints import CheckpointError

    run = open_run({**TINY, "run_dir": str(tmp_path / "run"), "checkpoint_every_steps": 2})
    train_job(prepare(run), show=False, stop_after=2)
    finish(run, "preempted")
    again = open_run({"run_dir": str(tmp_path / "run"), "resume": "auto", "channels": 64})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        prepare(again)
    finish(again)


def test_starting_from_another_runs_weights(trained, tmp_path):
    run = open_run({**TINY, "run_dir": str(tmp_path / "run"), "init_from": str(trained.run.path)})
    job = prepare(run)
    source = trained.state.ema.model.state_dict()
    assert all(torch.equal(v, source[k]) for k, v in job.state.model.state_dict().items())
    assert job.tokenizer.vocabulary == trained.tokenizer.vocabulary
    finish(run)


def test_a_picture_does_not_depend_on_its_batch(trained):
    prompts = preview_prompts(trained)[:4]
    together = generate(trained.run.path, prompts, steps=3, precision="fp32")
    alone = generate(trained.run.path, prompts[2:3], seed=2, steps=3, precision="fp32")
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    run = open_run({**TINY, "run_dir": str(tmp_path / "run"), "batch_size": 9, "accumulate": 2})
    with pytest.raises(SettingsError, match="batch_size=9 does not divide"):
        prepare(run)
    finish(run)
