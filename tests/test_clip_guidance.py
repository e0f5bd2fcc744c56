"""A CLIP steers a weakly guided model: trained here, a few minutes, part of `make slow`."""

import pytest
import torch

from difflit.config import resolve
from difflit.oracles import judge_scene, read_scenes
from difflit.generation import clip_steering, draw
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run
from difflit.loading import open_source
from difflit.sources import parse_caption

COUNT = 256


def trained(folder, **settings):
    """Train a run without previews and scores; the run and its job."""
    run = open_run({"run_dir": str(folder), "score_images": 0, "sample_every_steps": 10_000, "validate_every_steps": 10_000, **settings})
    job = train_job(prepare(run), show=False)
    finish(run)
    return run.path, job


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """The default model after 400 of its 1800 updates."""
    return trained(tmp_path_factory.mktemp("weak") / "run", steps=400)


def agreement(job, captions, steer=None):
    """Share of what each caption asks for that is in its picture, [N]; with half of the text's own influence."""
    images = draw(job.state.ema.model, job.diffusion, job.tokenizer, captions, 32, guidance=0.5, precision=job.state.precision, steer=steer)
    seen = [scene for part in images.split(128) for scene in read_scenes(part)]
    votes = [judge_scene(parse_caption(caption), scene) for caption, scene in zip(captions, seen, strict=True)]
    each = [[v for name, many in vote.items() if name != "all" for v in many] for vote in votes]
    return torch.tensor([sum(many) / len(many) for many in each], dtype=torch.float64)


def interval(differences, draws=2000):
    """Mean and 95 % interval of the mean by bootstrap over captions."""
    picks = torch.randint(len(differences), (draws, len(differences)), generator=torch.Generator().manual_seed(0))
    means = differences[picks].mean(1).sort().values
    return float(differences.mean()), float(means[int(0.025 * draws)]), float(means[int(0.975 * draws)])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["noised-clip", "clean-clip"])
def test_clip_raises_alignment(weak, tmp_path, preset):
    """By at least 0.10 over 256 held-out captions, the interval of the paired difference excluding 0."""
    _, job = weak
    clip, _ = trained(tmp_path / "clip", preset=preset)
    source = open_source("shapes", split="validation", seed=0, image_size=32)
    captions = [source[i].caption for i in range(COUNT)]
    alone = agreement(job, captions)
    steered = agreement(job, captions, clip_steering(clip, job.diffusion))
    mean, low, high = interval(steered - alone)
    print(f"{preset}: {alone.mean():.3f} alone, {steered.mean():.3f} steered, difference {mean:+.3f} ({low:+.3f} … {high:+.3f}), n={COUNT}")
    assert mean >= 0.10 and low > 0


def test_presets_of_clips_resolve():
    """The presets name a CLIP and its task."""
    assert resolve({"preset": "noised-clip"}).model == "clip-tiny" and resolve({"preset": "clean-clip"}).task == "clip"
