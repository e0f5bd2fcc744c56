"""Formats against references outside difflit: float64 in numpy, torch's own autograd, and what autocast gives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difflit.config import SettingsError
from difflit.glide import create_glide
from difflit.precision import FORMATS, MasterWeights, Precision, choose_precision, convert_, load_masters, lower_, master_tensors, native_bf16, stochastic_round
from difflit.scaling import Arithmetic

CPU = torch.device("cpu")


def spoken(network: nn.Module, seed: int = 0) -> nn.Module:
    "A network whose zero-initialised weights are filled, so that every layer counts."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.05, generator=draw)
    return network.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def test_auto_takes_what_is_native(monkeypatch):
    import difflit.precision as module

    for native, kind, expected in [(True, "cpu", "bf16"), (False, "cpu", "fp32"), (True, "cuda", "bf16"), (False, "cuda", "fp16")]:
        monkeypatch.setattr(module, "native_bf16", lambda k, answer=native: answer)
        assert choose_precision("auto", torch.device(kind)).name == expected


def test_a_v100_has_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, native in [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        native_bf16.cache_clear()
        assert native_bf16("cuda") is native
    native_bf16.cache_clear()


@pytest.mark.parametrize("name", [*FORMATS, "auto"])
def test_every_format_hands_out_its_region(name):
    precision = choose_precision(name, CPU)
    with precision.autocast():
        out = F.linear(torch.ones(1, 4), torch.ones(4, 4))
    assert out.dtype == precision.dtype == (precision.lowered or torch.float32)


def test_an_unknown_format_names_the_nearest():
    for wrong, near in [("bf16-mastr", "bf16-master"), ("pure_bf16", "pure-bf16"), ("float16", "fp16")]:
        with pytest.raises(SettingsError, match=near):
            choose_precision(wrong, CPU)


@pytest.mark.parametrize("value", [1.0001, -1.0001, 0.3, 3e-39, 1e30, -7e-6])
def test_stochastic_rounding_is_unbiased(value):
    x = torch.full((200_000,), value)
    rounded = stochastic_round(x, generator=torch.Generator().manual_seed(1)).double()
    low, high = rounded.min(), rounded.max()
    exact = float(x[0].double())
    assert low <= exact <= high
    p = (exact - low) / (high - low)
    assert high - low <= 2 * abs(float(torch.tensor(value).bfloat16()) - exact) + abs(exact) * 2**-7 + 1e-40  # two neighbours
    assert abs(rounded.mean() - exact) <= 4.5 * (high - low) * math.sqrt(float(p * (1 - p)) / len(x))


def test_stochastic_rounding_repeats_with_the_generator():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    a, b, c = (stochastic_round(x, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    turned = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert stochastic_round(turned).stride() == turned.stride()
    assert torch.equal(stochastic_round(turned.bfloat16().float()), turned.bfloat16())


def test_what_is_halfway_for_infinity_goes_there_only_by_chance():
    x = torch.full((10_000,), torch.finfo(torch.float32).max)
    assert set(stochastic_round(x).isinf().tolist()) <= {True, False}
    assert stochastic_round(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]
    assert stochastic_round(torch.full((10_000,), math.nan)).isnan().all()


@pytest.mark.parametrize("name, dtype, tolerance", [("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 0.004)])
def test_a_converted_glide_agrees_with_autocast(name, dtype, tolerance):
    """Measured on 2 seeds: 0.016 for bf16 and 0.002 for fp16, with or without lowered weights; the eighth part between the formats is their three bits."""
    network, lowered = spoken(create_glide("tiny")), spoken(create_glide("tiny"))
    rows = convert_(lowered, dtype)
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(4, 3, 32, 32, generator=g), torch.tensor([1, 200, 500, 990])
    tokens, mask = torch.randint(1, 1000, (4, 24), generator=g), torch.ones(4, 24, dtype=torch.bool)
    with torch.no_grad():
        exact = network(x, t, tokens, mask)
        with Precision(name, CPU).autocast():
            cast, half = network(x, t, tokens, mask), lowered(x, t, tokens, mask)
    assert half.dtype == torch.float32
    assert 0 < relative(half, exact) < tolerance and relative(half, exact) < 1.5 * relative(cast, exact)
    assert {row.dtype for row in rows if not row.why} == {dtype} and {row.dtype for row in rows if row.why} == {torch.float32}
    for name_, layer in lowered.named_modules():
        if "Norm" in type(layer).__name__ or isinstance(layer, nn.Embedding) or name_.startswith("time_embed.") or name_ == "out.2":
            assert all(p.dtype == torch.float32 for p in layer.parameters()), name_
    assert lowered.position_map.dtype == lowered.padding_embedding.dtype == torch.float32
    assert sum(row.weights for row in rows) == sum(p.numel() for p in lowered.parameters())
    assert sum(row.weights for row in rows if not row.why) / sum(row.weights for row in rows) > 0.9


def test_conversion_goes_back_and_leaves_optimizers_their_parameters():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3)).to(memory_format=torch.channels_last)
    before = list(network.parameters())
    convert_(network, torch.bfloat16)
    assert all(a is b for a, b in zip(before, network.parameters())) and network[0].weight.dtype == torch.bfloat16
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    convert_(network, torch.float32)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_tied_weight_stays_with_the_layer_that_needs_it():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.say, self.last = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(10, 2)
            self.say.weight = self.words.weight

    network = Tied()
    rows = {row.layer: row for row in convert_(network, torch.bfloat16)}
    assert network.words.weight.dtype == torch.float32 and rows["say"].why == "tied to a layer that stays"


def adam64(weights, gradients, lr=0.01, betas=(0.9, 0.99), eps=1e-8):
    "Adam in numpy's float64. Source: Kingma and Ba 2015, algorithm 1."
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        weights = weights - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return weights


def test_master_weights_are_the_fp32_reference():
    """Five updates of three micro-batches in bf16: the copies follow Adam in float64 on the exact sum of bf16 gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    start = model[0].weight.detach().double().numpy().copy()
    arithmetic = Arithmetic(Precision("bf16-master", CPU), model)
    optimizer = torch.optim.Adam(arithmetic.parameters, lr=0.01, betas=(0.9, 0.99), fused=True)
    sums = []
    for step in range(5):
        total = np.zeros((32, 16))
        for part in torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(step)):
            with arithmetic.autocast():
                loss = model(part).float().square().mean() / 3
            (mine,) = torch.autograd.grad(loss, [model[0].weight], retain_graph=True)
            assert mine.dtype == torch.bfloat16
            total += mine.double().numpy()
            arithmetic.backward(loss)
            assert model[0].weight.grad is None
        arithmetic.unscale(optimizer)
        arithmetic.step(optimizer)
        optimizer.zero_grad()
        sums.append(total)
    master = arithmetic.by_parameter[model[0].weight].detach()
    assert np.abs(master.double().numpy() - adam64(start, sums)).max() < 1e-6
    assert torch.equal(model[0].weight, master.bfloat16())


def test_gradients_added_in_half_precision_would_be_worse():
    """Why `accumulate` exists: 1,024 micro-batches with a gradient of 1. In bf16 the sum stops growing at 256, where 1 is half a step."""
    summed = {}
    for masters in (False, True):
        layer = nn.Linear(1, 1, bias=False).bfloat16()
        copies = MasterWeights(layer)
        for _ in range(1024):
            layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            if masters:
                copies.accumulate()
        summed[masters] = float(copies.by_parameter[layer.weight].grad if masters else layer.weight.grad)
    assert summed == {False: 256.0, True: 1024.0}


def test_frozen_weights_and_fp32_ones_have_no_copies():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    _, masters = lower_(model, Precision("bf16-master", CPU))
    assert model[0].weight.dtype == torch.bfloat16 and set(master_tensors(masters)) == {"2.weight", "2.bias"}
    assert masters.parameters[0] is model[0].weight and masters.by_parameter[model[1].weight] is model[1].weight
    load_masters(masters, {"2.weight": torch.full((4, 4), 0.3)})
    assert float(masters.by_parameter[model[2].weight][0, 0].detach()) == float(torch.tensor(0.3))
    assert torch.equal(model[2].weight, torch.full((4, 4), 0.3).bfloat16())


def test_a_checkpoint_of_one_format_continues_in_another():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    other = Arithmetic(Precision("bf16-master", CPU), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    other.load(plain.state_dict(), {})
    assert torch.equal(other.tensors()["0.weight"], plain[0].weight)
    assert torch.equal(other.model[0].weight, plain[0].weight.bfloat16())


def small_updates(precision: str, by_chance: bool = True, steps: int = 400) -> list[float]:
    "Mean weight in a regression that must move weights from 1 to 1.05 by at most 0.0002 an update, a fortieth of bf16's step there."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 1, bias=False).requires_grad_(False))  # the last one stays in fp32
    with torch.no_grad():
        model[0].weight.fill_(1)
    arithmetic = Arithmetic(Precision(precision, CPU), model)
    if not by_chance:
        synchronise = arithmetic.masters.synchronise
        arithmetic.masters.synchronise = lambda *_: synchronise()
    optimizer = torch.optim.AdamW(arithmetic.parameters, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0)
    means = []
    for step in range(steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        with arithmetic.autocast():
            out = model[0](x)
        loss = (out.float().sum(1) - 1.05 * 8 * x.sum(1)).square().mean()
        arithmetic.backward(loss)
        arithmetic.unscale(optimizer)
        arithmetic.step(optimizer)
        optimizer.zero_grad()
        means.append(float(model[0].weight.detach().double().mean()))
    return means


def test_pure_bf16_moves_by_chance_and_stalls_without():
    """Mean weight after 400 updates on the way to 1.05; measured: fp32 1.0379, by chance 1.0373, to the nearest 1 exactly."""
    exact, chance, stalled = small_updates("fp32"), small_updates("pure-bf16"), small_updates("pure-bf16", by_chance=False)
    assert exact[-1] > 1.03
    assert abs(chance[-1] - exact[-1]) < 0.002
    assert stalled[-1] == 1.0


def test_transient_copies_take_memory_only_in_the_update():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    arithmetic = Arithmetic(Precision("pure-bf16", CPU), model)
    master = arithmetic.by_parameter[model[0].weight]
    assert master.untyped_storage().nbytes() == 0 and master.is_contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(arithmetic.parameters, lr=0.01, fused=True)
    with arithmetic.autocast():
        loss = model(torch.randn(2, 8, 8, 8)).float().square().mean()
    arithmetic.backward(loss)
    arithmetic.unscale(optimizer)
    assert master.untyped_storage().nbytes() == master.numel() * 4 and model[0].weight.grad is None
    arithmetic.step(optimizer)
    assert master.untyped_storage().nbytes() == 0
    assert optimizer.state[master]["exp_avg"].dtype == torch.float32 and optimizer.state[master]["exp_avg"].stride() == master.stride()
    assert arithmetic.exact is None and arithmetic.tensors() == {}
