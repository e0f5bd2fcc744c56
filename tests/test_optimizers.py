"""Every optimizer and every schedule: interrupted at 25 of 50 updates, through files, to the same bits."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from difflit.checkpoints import pack_optimizer, unpack_optimizer
from difflit.config import SettingsError
from difflit.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    choose_optimizer,
    evaluation_mode,
    make_optimizer,
    make_schedule,
    schedule_figure,
    training_mode,
    warmup_cosine,
)

RATES = {"prodigy": 1.0, "lion": 1e-3, "lion8bit": 1e-3}


def installed(name):
    return importlib.util.find_spec(OPTIMIZERS[name][0].partition(".")[0]) is not None


def needs(name):
    if not installed(name):
        pytest.skip(f"{OPTIMIZERS[name][0]} is not installed")


def small_net():
    "Convolutions in channels_last, a matrix large enough for 8-bit moments, an embedding, a norm."
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1), nn.SiLU(), nn.Conv2d(18, 20, 3, padding=1), nn.Flatten(), nn.Linear(20 * 16, 96), nn.LayerNorm(96))
    return nn.ModuleDict({"body": body.to(memory_format=torch.channels_last), "words": nn.Embedding(7, 96), "gate": nn.Linear(96, 64)})


def loss_of(net, step):
    generator = torch.Generator().manual_seed(step)
    x, word = torch.randn(4, 3, 4, 4, generator=generator), torch.randint(0, 7, (4,), generator=generator)
    y = net["gate"](net["body"](x) + net["words"](word))
    return (y - x.mean((1, 2, 3))[:, None]).square().mean()


def through_files(tensors, rest, folder):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(rest, allow_nan=False))
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "state.json").read_text())


def run(name, schedule="cosine", folder=None, steps=50, interrupted=25, start_lr=None):
    "50 updates; with a folder, everything is thrown away and read back in the middle."
    lr = RATES.get(name, 1e-2)

    def fresh():
        net = small_net()
        made = make_optimizer(net, start_lr or lr, 0.1, 0.99, {} if name == "prodigy" else {"gate.*": 0.5}, name, decays={"words.*": 0.01})
        options = {"patience": 2, "gamma": 0.5, "threshold": 0.01} if schedule == "plateau" else {}
        return net, made, make_schedule(schedule, steps, 5, **options)

    net, optimizer, factors = fresh()
    losses = []
    for step in range(1, steps + 1):
        loss = loss_of(net, step)
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = lr * factors.factor(step) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        factors.observe(losses[-1], step)
        if folder is not None and step == interrupted:
            tensors, rest = through_files(*pack_optimizer(optimizer), folder)
            weights, state = {k: v.clone() for k, v in net.state_dict().items()}, json.dumps(factors.state_dict())
            start_lr = 0.123  # another rate: the state must bring what it needs
            net, optimizer, factors = fresh()
            net.load_state_dict(weights)
            unpack_optimizer(optimizer, tensors, rest)
            factors.load_state_dict(json.loads(state))
    return net, optimizer, factors, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_updates_resume_to_the_bit(name, tmp_path):
    needs(name)
    whole, _, _, losses = run(name)
    again, _, _, resumed = run(name, folder=tmp_path)
    if name != "prodigy":  # which begins at a millionth of a step
        assert np.mean(losses[-10:]) < np.mean(losses[:10]), "it does not learn"
    assert losses == resumed
    for (key, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_resumes_to_the_bit(schedule, tmp_path):
    whole, _, factors, losses = run("adamw", schedule)
    again, _, resumed, others = run("adamw", schedule, folder=tmp_path)
    assert losses == others
    assert [factors.factor(s) for s in range(1, 60)] == [resumed.factor(s) for s in range(1, 60)]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    if schedule == "plateau":
        assert 0 < resumed.factor(50) < 1 and resumed.state_dict() == factors.state_dict()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_does_not_step_on_micro_batches(schedule):
    made, once = make_schedule(schedule, 40, 4), make_schedule(schedule, 40, 4)
    often = [[made.factor(step) for _ in range(8)] for step in range(1, 41)]
    assert [[x] * 8 for x in (once.factor(step) for step in range(1, 41))] == often
    assert [once.factor(step) for step in range(40, 0, -1)] == [x[0] for x in reversed(often)]  # in any order


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factors_are_sane(schedule):
    for steps, warmup in ((1, 0), (2, 1), (10, 10), (10, 20), (1000, 0), (1000, 100)):
        factors = [make_schedule(schedule, steps, warmup).factor(s) for s in range(1, steps + 5)]  # a run that was made longer asks past the end
        assert all(math.isfinite(f) and 0 <= f <= 1 for f in factors), (steps, warmup, factors[:5])
    rise = [make_schedule(schedule, 1000, 100).factor(s) for s in range(1, 101)]
    assert rise == sorted(rise) and rise[-1] == pytest.approx(1.0) and rise[0] < 0.05


def test_cosine_is_what_it_was():
    for steps, warmup, floor in ((1000, 100, 0.0), (37, 5, 0.1), (10, 0, 0.0), (5, 5, 0.0)):
        made = make_schedule("cosine", steps, warmup, floor=floor)
        for step in range(1, steps + 1):
            done = (step - warmup) / max(1, steps - warmup)
            formula = step / max(1, warmup) if step <= warmup else floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            assert made.factor(step) == warmup_cosine(step, steps, warmup, floor) == formula


def test_a_higher_score_is_progress_if_one_says_so():
    made = make_schedule("plateau", 100, patience=1, gamma=0.5, higher_is_better=True)
    lowered = [made.observe(v, n) for n, v in enumerate((1.0, 2.0, 3.0, float("nan"), 3.0, 2.5, 2.0), start=1)]
    assert lowered == [False, False, False, False, True, False, True] and made.factor(50) == 0.25


def test_every_option_reaches_the_optimizer():
    made = make_optimizer(small_net(), options={"betas": [0.8, 0.9], "eps": 1e-6})
    assert {(g["betas"], g["eps"]) for g in made.param_groups} == {((0.8, 0.9), 1e-6)}
    with pytest.raises(SettingsError, match="no option 'momentum'"):
        make_optimizer(small_net(), options={"momentum": 0.9})
    with pytest.raises(SettingsError, match="no option 'lr'"):
        choose_optimizer("adamw", {"lr": 1.0})


def test_old_groups_keep_their_order():
    "The order is part of a checkpoint: scales first, then what decays before what does not."
    net = small_net()
    made = make_optimizer(net, weight_decay=0.1, scales={"gate.weight": 0.1, "gate.bias": 0.1})
    assert [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in made.param_groups] == [(1.0, 0.1, 3), (1.0, 0.0, 6), (0.1, 0.1, 1), (0.1, 0.0, 1)]
    zero = make_optimizer(net, weight_decay=0.0)
    assert [len(g["params"]) for g in zero.param_groups] == [4, 7]  # two groups, though neither decays


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-radam", "schedulefree-sgd"])
def test_judging_leaves_a_schedule_free_run_as_it_was(name):
    needs(name)
    plain = run(name)[0]
    net, made = small_net(), None
    made = make_optimizer(net, 1e-2, 0.1, 0.99, {"gate.*": 0.5}, name, decays={"words.*": 0.01})
    factors = make_schedule("cosine", 50, 5)
    for step in range(1, 51):
        loss_of(net, step).backward()
        for group in made.param_groups:
            group["lr"] = 1e-2 * factors.factor(step) * group["lr_scale"]
        made.step()
        made.zero_grad()
        if step % 7 == 0:
            before = [p.detach().clone() for p in net.parameters()]
            with evaluation_mode(made):
                assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
            training_mode(made)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters()))


def test_judging_is_nothing_for_others():
    net = small_net()
    made = make_optimizer(net)
    before = [p.detach().clone() for p in net.parameters()]
    training_mode(made)
    with evaluation_mode(made):
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    needs("muon")
    net = small_net()
    made = make_optimizer(net, 1e-2, 0.1, optimizer="muon")
    names = {p: n for n, p in net.named_parameters()}
    moved = {names[p] for g in made.param_groups if g["use_muon"] for p in g["params"]}
    assert moved == {"body.2.weight", "body.4.weight", "gate.weight"}  # not the convolution from three colours, the table, or what has one dimension
    loss_of(net, 0).backward()
    before = net["body"][2].weight.detach().clone()
    made.step()
    step = (before * (1 - 1e-3) - net["body"][2].weight.detach()).flatten(1).double() / (1e-2 * 0.2 * math.sqrt(18 * 9))
    values = torch.linalg.svdvals(step)
    assert 0.4 < values.min() and values.max() < 1.4  # all singular values near one
    rest = next(g for g in made.param_groups if not g["use_muon"])
    assert (rest["betas"], rest["eps"], rest["lr"]) == ((0.9, 0.99), 1e-8, 1e-2)


def test_a_figure_of_any_schedule():
    figure = schedule_figure([*SCHEDULES], steps=3000, warmup_steps=100, lr=1e-3)
    assert len(figure.axes[0].lines) == len(SCHEDULES)
    assert all(line.get_ydata().max() == pytest.approx(1e-3, rel=1e-3) for line in figure.axes[0].lines)
