"""Bugs that trainers have without a word, each with a test by its name: what others do, then what difflit does. More of them stand where their part is tested:
averages in test_averaging, the scaler in test_scaling, schedules in test_optimizers, resuming in test_resume and test_survival."""

import math

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY

from difflit.averaging import EMA
from difflit.checkpoints import newest_checkpoint
from difflit.data import collate
from difflit.diffusion import Diffusion
from difflit.glide import create_glide
from difflit.loading import open_source
from difflit.optimizers import make_optimizer
from difflit.precision import Precision
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run
from difflit.tasks import TextToImage
from difflit.text import trimmed_tokenizer
from difflit.tracking import read_metrics
from difflit.training import Hook, TrainState, recompute_activations, seed_step, train

SMALL = dict(image_size=16, channels=32, channel_mult=(1,), attention_downsamplings=(1,), text_width=32, text_heads=2, text_layers=1, text_context=8)
FP32 = Precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def shapes():
    """A batch of eight pictures, and the tokenizer of their captions."""
    source = open_source("shapes", limit=8)
    tokenizer = trimmed_tokenizer(source.captions(), 8)
    return collate([source[i] for i in range(8)], 16, range(8), tokenizer), tokenizer


def small(tokenizer, **more):
    """A state at step 0 with a GLIDE of some thousand weights."""
    model = create_glide("tiny", vocabulary=tokenizer.vocabulary, **{**SMALL, **more})
    return TrainState(model, EMA(model, 0.9), make_optimizer(model, 1e-3), Accelerator(cpu=True), FP32)


def endless(batch):
    while True:
        yield batch


def run_of(folder, **given):
    opened = open_run({**TINY, "score_images": 0, "run_dir": str(folder), **given})
    job = train_job(prepare(opened), show=False)
    finish(opened)
    return job


def test_a_run_without_validation_loss(tmp_path):
    """Some trainers watch the training loss alone, which drops while a model learns by heart; every difflit run has a validation loss, also by bin of time."""
    run_of(tmp_path / "run", validate_every_steps=2)
    metrics = read_metrics(tmp_path / "run")
    assert [math.isfinite(v) for v in metrics["val_loss"]] == [False, True, False, True]
    assert sum(math.isfinite(metrics[f"val_loss_bin{i}"][-1]) for i in range(10)) >= 5


def test_a_loss_scale_that_is_not_saved(tmp_path):
    """fp16 runs began each resume at the first loss scale, and overflowed again; here the scale and its counts are in the checkpoint."""
    job = run_of(tmp_path / "run", precision="fp16", loss_scale=1024, checkpoint_every_steps=4)
    saved = newest_checkpoint(tmp_path / "run")[0].state["arithmetic"]["scaler"]
    assert saved["scale"] == 1024 and saved["_growth_tracker"] == 4 and saved["updates"] == 4
    job.state.arithmetic.scaler.update(64.0)
    again = prepare(open_run({"run_dir": str(tmp_path / "run"), "resume": "auto", "steps": 6}))
    assert again.state.arithmetic.scaler.state_dict() == saved
    finish(again.run)


def test_dropout_that_is_ignored(shapes):
    """A dropout setting never reached the network, or sampling left it in evaluation mode; here the losses differ, and still do after a hook that samples."""
    batch, tokenizer = shapes
    task = TextToImage(Diffusion("flow", "flow"))
    losses = {}
    for dropout in (0.0, 0.5):
        state = small(tokenizer, dropout=dropout)
        hooks = [Hook(lambda s: (s.model.eval(), None)[1], 1)]  # what drawing a picture would do
        train(state, task, endless(batch), steps=8, batch_size=8, lr=1e-2, hooks=hooks)  # so far that its blocks say something
        assert state.model.training
        seed_step(0, 1)
        losses[dropout] = [task.loss(state.model, batch).loss.mean().item() for _ in range(2)]
    assert losses[0.0][0] == losses[0.0][1] and losses[0.5][0] != losses[0.5][1], losses


def test_activation_checkpointing_that_is_switched_on_too_late_to_count(shapes):
    """Switched on in mid-run it set a flag that nothing reads; here fewer bytes are kept for the backward pass, and the gradients are the same."""
    batch, tokenizer = shapes
    kept, gradients = {}, {}
    for recompute in (False, True):
        state = small(tokenizer, channel_mult=(1, 2), residual_blocks=2)
        assert not recompute or recompute_activations(state.model)
        sizes: dict[int, int] = {}

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = TextToImage(Diffusion("flow", "flow")).loss(state.model, batch).loss.mean()
        loss.backward()
        kept[recompute], gradients[recompute] = sum(sizes.values()), [p.grad for p in state.model.parameters()]
    assert kept[True] < 0.7 * kept[False], kept
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))


def test_an_infinite_gradient_that_is_clipped_to_nan(shapes):
    """Clipping multiplies an infinite gradient by zero, and NaN went into every weight; here the step is skipped and counted, in every format."""
    batch, tokenizer = shapes

    class Rooted(TextToImage):
        "At its second step the gradient is infinite, the loss is not."

        def loss(self, model, batch):
            result = super().loss(model, batch)
            if state.step == 1:
                result.loss = result.loss + (0 * next(model.parameters()).sum()).abs().sqrt()
            return result

    state = small(tokenizer)
    train(state, Rooted(Diffusion("flow", "flow")), endless(batch), steps=3, batch_size=8, stop_after=1)
    before = [p.clone() for p in state.model.parameters()]
    train(state, Rooted(Diffusion("flow", "flow")), endless(batch), steps=3, batch_size=8, stop_after=2)
    assert state.arithmetic.stepped is False and state.arithmetic.metrics()["overflows"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    train(state, Rooted(Diffusion("flow", "flow")), endless(batch), steps=3, batch_size=8)
    assert all(p.isfinite().all() for p in state.model.parameters()) and state.arithmetic.stepped is True


def test_a_loss_that_is_summed_over_micro_batches(tmp_path):
    """Accumulated losses were reported, or trained on, as sums: twice the pieces, twice the loss; here loss, gradient and rate are the whole batch's."""
    one, four = (run_of(tmp_path / name, accumulate=n, dropout=0) for name, n in (("one", 1), ("four", 4)))
    a, b = read_metrics(one.run.path), read_metrics(four.run.path)
    for column in ("loss", "raw_loss", "grad_norm"):
        assert a[column] == pytest.approx(b[column], rel=1e-3), column
    assert list(a["lr"]) == list(b["lr"])


def test_seeds_that_pile_up():
    """torch.manual_seed keeps a traceback for each kind of device that is not in use yet, at every call: time at each step, memory that is never freed."""
    waiting = len(torch.cuda._queued_calls)
    for step in range(100):
        seed_step(0, step)
    assert len(torch.cuda._queued_calls) == waiting
    first = torch.rand(3)
    seed_step(0, 99)
    assert torch.equal(first, torch.rand(3))


def test_frozen_weights_that_decay(tmp_path):
    """Weight decay went on shrinking frozen parts; here they stay to the bit, and so do their averages."""
    job = run_of(tmp_path / "run", train_parts="attention", weight_decay=0.5, lr=1e-2)
    fresh = prepare(open_run({**TINY, "score_images": 0, "run_dir": str(tmp_path / "fresh"), "train_parts": "attention"}))
    begun = dict(fresh.state.model.named_parameters())
    moved = {n for n, p in job.state.model.named_parameters() if not torch.equal(p, begun[n])}
    assert moved and moved <= {n for n, p in begun.items() if p.requires_grad}
    for name, average in job.state.ema.model.named_parameters():
        assert name in moved or torch.equal(average, begun[name]), name
    finish(fresh.run)
