"""Averages of the weights: against float64, over files, beside a device, and sharded over processes."""

import copy
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from difflit.averaging import EMA, Averages, PowerEMA, Snapshot, _Transfer, list_snapshots, make_averages, mix, reconstruct, save_snapshot, std_to_gamma
from difflit.config import SettingsError


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    net.append(nn.Linear(3, 3)).append(nn.Linear(3, 3))
    net[5].weight = net[4].weight  # tied
    return net.to(dtype)


def shake(net, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
        net[1].running_mean.add_(1.0)
        net[1].num_batches_tracked.add_(1)


def old_update(average, model, step, decay):
    "The update as it stood in the training loop before there was a module for it."
    with torch.no_grad():
        live = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_([p.detach() for p in average.parameters()], live, 1 - min(decay, (1 + step) / (10 + step)))
        for mine, theirs in zip(average.buffers(), model.buffers()):
            mine.copy_(theirs)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ema_is_what_it_was_to_the_bit():
    net = small_net()
    old, new = copy.deepcopy(net).float().eval(), EMA(net, 0.95)
    for step in range(1, 300):
        shake(net, step)
        old_update(old, net, step, 0.95)
        new.update(net, step)
    assert equal(old.state_dict(), new.model.state_dict())
    assert new.model[5].weight is new.model[4].weight and not new.model.training


def test_ema_moves_late_as_well_as_early():
    net = small_net()
    averages = make_averages(net, "0.99,power:0.1")
    for step in (*range(1, 5), *range(1000, 1010)):
        before = {a.name: {k: v.clone() for k, v in a.weights.items()} for a in averages}
        shake(net, step)
        averages.update(net, step)
        for average in averages:
            assert all(not torch.equal(v, before[average.name][k]) for k, v in average.weights.items()), (average.name, step)


def test_ema_follows_a_parameter_that_was_replaced():
    net = small_net()
    ema = EMA(net, 0.5)
    ema.update(net, 1)
    net[3].weight = nn.Parameter(torch.full_like(net[3].weight, 100.0))
    ema.update(net, 1)
    assert ema.weights["3.weight"].min() > 50


def test_ema_copies_buffers():
    net = small_net()
    ema = EMA(net, 0.999)
    shake(net, 1)
    ema.update(net, 1)
    assert torch.equal(ema.model[1].running_mean, net[1].running_mean) and ema.model[1].num_batches_tracked == 1


def test_sampling_from_the_average_leaves_live_weights_alone():
    net = small_net()
    averages = make_averages(net, "0.9,power:0.1")
    shake(net, 1)
    averages.update(net, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for average in averages:
        average.model.train()(torch.randn(4, 2, 3, 3))  # even in the wrong mode
        with torch.no_grad():
            for p in average.model.parameters():
                p.zero_()
    assert equal(before, net.state_dict())


@pytest.mark.parametrize("spec", ["0.9", "power:0.1"])
def test_half_precision_weights_are_averaged_in_fp32(spec):
    net = small_net(torch.bfloat16)
    (average,) = make_averages(net, spec)
    exact = {k: v.double() for k, v in average.weights.items()}
    for step in range(1, 50):
        shake(net, step)
        average.update(net, step)
        d = average.decay_at(step)
        exact = {k: d * v + (1 - d) * dict(net.named_parameters())[k].double() for k, v in exact.items()}
    for name, value in average.weights.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).abs().max() < 1e-6, name


def test_masters_are_averaged_in_place_of_what_they_stand_for():
    net = small_net(torch.bfloat16)
    masters = {p: nn.Parameter(p.detach().float() + 1e-4) for p in net.parameters()}
    averages = make_averages(net, "0.9,power:0.1")
    averages.update(net, 1, masters)
    names = dict(net.named_parameters())
    power = averages.members[1]
    assert all(torch.equal(value, masters[names[k]]) for k, value in power.weights.items())  # the first update keeps nothing of the old


def test_power_average_is_the_integral():
    rng = np.random.default_rng(0)
    path = rng.standard_normal((500, 7)).cumsum(0)
    holder = nn.Linear(7, 1, bias=False)
    for std in (0.03, 0.1, 0.28):
        power = PowerEMA(holder, std)
        for n, row in enumerate(path, start=1):
            with torch.no_grad():
                holder.weight.copy_(torch.tensor(row)[None])
            power.update(holder, n)
        share = np.diff((np.arange(501) / 500) ** (std_to_gamma(std) + 1))
        np.testing.assert_allclose(power.weights["weight"].detach()[0], share @ path, rtol=2e-5, atol=1e-5)


def test_width_is_the_standard_deviation_of_the_profile(tmp_path):
    times = np.linspace(0, 1000, 200_001)[1:]
    for std in (0.05, 0.1, 0.25):
        weight = Snapshot(1000, std, tmp_path).profile(times)
        weight /= weight.sum()
        mean = (weight * times).sum()
        assert np.sqrt((weight * (times - mean) ** 2).sum()) / 1000 == pytest.approx(std, rel=1e-3)


def test_mixing_is_the_least_squares_of_the_profiles(tmp_path):
    kept = [Snapshot(step, std, tmp_path) for step in range(100, 801, 100) for std in (0.05, 0.1)]
    x, misfit = mix(kept, 0.15, 800)
    times = (np.arange(80_000) + 0.5) / 100
    profiles = np.array([s.profile(times) for s in kept])
    wanted = Snapshot(800, 0.15, tmp_path).profile(times)
    # the same problem on a grid, with one snapshot's coefficient eliminated to keep the sum at one
    others = profiles[:-1] - profiles[-1]
    y = np.linalg.lstsq(others.T, wanted - profiles[-1], rcond=None)[0]
    np.testing.assert_allclose(x, np.append(y, 1 - y.sum()), atol=2e-3)
    on_the_grid = np.linalg.norm(x @ profiles - wanted) / np.linalg.norm(wanted)
    assert misfit == pytest.approx(on_the_grid, rel=0.02)


def test_reconstruction_is_what_tracking_gives(tmp_path):
    net = small_net()
    tracked, compared = make_averages(net, "power:0.05,power:0.1"), make_averages(net, "power:0.075,power:0.15")
    for step in range(1, 321):
        shake(net, step)
        tracked.update(net, step)
        compared.update(net, step)
        if step % 20 == 0:
            save_snapshot(tmp_path, tracked, step)
    for average in compared:
        made = reconstruct(tmp_path, average.std)
        assert made.keys() == net.state_dict().keys()
        small_net().load_state_dict(made)
        for name, truth in average.tensors().items():
            assert (made[name] - truth).float().norm() <= 3e-3 * truth.float().norm(), (average.std, name)
        assert torch.equal(made["1.num_batches_tracked"], torch.tensor(320))
    assert len(list_snapshots(tmp_path)) == 32
    with pytest.raises(SettingsError, match="reconstructing wants two widths"):
        reconstruct(tmp_path, 0.1, step=330)


def test_a_snapshot_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("difflit.averaging.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_snapshot(tmp_path, make_averages(small_net(), "power:0.1"), 1)
    assert not list(tmp_path.iterdir())


def test_averages_resume_to_the_bit():
    def made(net):
        return make_averages(net, "0.95,0.9,power:0.1")

    net = small_net()
    whole, first = made(net), made(net)
    for step in range(1, 41):
        shake(net, step)
        whole.update(net, step)
        first.update(net, step)
        if step == 20:
            saved = {k: {n: t.clone() for n, t in v.items()} for k, v in first.tensors().items()}
            first = made(net)
            first.load(saved, step)
            with pytest.raises(ValueError, match="update 20 has been averaged already"):
                first.update(net, step)
    for a, b in zip(whole, first):
        assert equal(a.tensors(), b.tensors())
    with pytest.raises(RuntimeError, match="no saved average 'ema-0.9'"):
        first.load({"ema": saved["ema"]})


def test_an_average_elsewhere_arrives_later_with_the_same_numbers():
    "The way of a CPU average of GPU weights: copies, a thread, and whoever looks waits."
    net = small_net()
    here, there = EMA(net, 0.9), EMA(net, 0.9)

    class Slow(_Transfer):
        def _finish(self, then):
            time.sleep(0.02)
            super()._finish(then)

    transfer = there._transfer = Slow([*net.parameters(), *net.buffers()])
    weights = list(there._weights.values())
    for step in range(1, 6):
        shake(net, step)
        here.update(net, step)
        live, buffers = list(net.parameters()), list(net.buffers())

        weight, count = 1 - there.decay_at(step), len(live)

        def arrived(copies, weight=weight, count=count):
            torch._foreach_lerp_(weights, copies[:count], weight)
            torch._foreach_copy_(list(there._buffers.values()), copies[count:])

        transfer.begin([*live, *buffers], arrived)
        transfer.before_step()
    assert equal(here.tensors(), there.tensors())

    def broken(copies):
        raise RuntimeError("no room")

    transfer.begin([*net.parameters(), *net.buffers()], broken)
    with pytest.raises(RuntimeError, match="no room"):
        _ = there.model


@pytest.mark.cuda
def test_an_average_on_the_cpu_of_weights_on_a_gpu():
    net = small_net().cuda()
    near, far = make_averages(net, "0.9,power:0.1"), make_averages(net, "0.9,power:0.1", device="cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(1, 30):
        net(torch.randn(8, 2, 3, 3, device="cuda")).square().mean().backward()
        optimizer.step()
        near.update(net, step)
        far.update(net, step)
    for a, b in zip(near, far):
        for name, value in b.tensors().items():
            assert value.device.type == "cpu"
            torch.testing.assert_close(value, a.tensors()[name].cpu(), rtol=1e-6, atol=1e-7)


def test_an_average_may_be_made_on_another_device_in_fp32():
    net = small_net(torch.bfloat16)
    made = EMA(net, device="cpu").model
    assert {p.dtype for p in made.parameters()} == {torch.float32} and made[5].weight is made[4].weight
    assert made[1].num_batches_tracked.dtype == torch.int64
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(made.parameters(), net.parameters()))


SHARDED = textwrap.dedent("""
    import copy, sys, torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from difflit.averaging import make_averages, save_snapshot, list_snapshots
    from difflit.optimizers import make_optimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    plain, full = copy.deepcopy(net), copy.deepcopy(net) if rank == 0 else None
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    averages, expected = make_averages(net, "0.9,power:0.1", full=full), make_averages(plain, "0.9,power:0.1")
    optimizers = make_optimizer(net, 1e-2, 0.1), make_optimizer(plain, 1e-2, 0.1)
    for step in range(1, 21):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))  # the same on both, so gradients are too
        for model, optimizer in zip((net, plain), optimizers):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        averages.update(net, step)
        expected.update(plain, step)
        if step == 10:  # put back into fresh ones: sharded, then whole
            saved = {k: {n: t.clone() for n, t in v.items()} for k, v in averages.tensors().items()}
            saved["ema-power-0.1"] = {n: t.full_tensor() for n, t in saved["ema-power-0.1"].items()}  # one sharded, one whole
            averages = make_averages(net, "0.9,power:0.1", full=full)
            averages.load(saved, step)
    for mine, theirs in zip(averages, expected):
        assert all(t.to_local().numel() < theirs.weights[n].numel() for n, t in mine.weights.items()), "not sharded"
        for name, value in mine.weights.items():
            torch.testing.assert_close(value.full_tensor(), theirs.weights[name].detach(), rtol=1e-5, atol=1e-7)
    whole = averages.main.gather()
    assert (whole is None) == (rank != 0)
    if rank == 0:
        assert whole is averages.main.model
        torch.testing.assert_close(whole(x), expected.main.model(x), rtol=1e-5, atol=1e-6)
    else:
        try:
            averages.main.model
            raise AssertionError("a process without a whole network")
        except RuntimeError as error:
            assert "pass full=" in str(error)
    save_snapshot(sys.argv[1], averages, 20, write=rank == 0)
    dist.barrier()
    assert len(list_snapshots(sys.argv[1])) == 1
    dist.destroy_process_group()
    print("fine", flush=True)
""")


def test_averages_of_sharded_weights(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "snapshots")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fine") == 2


def test_names_must_differ_and_specs_be_right():
    net = small_net()
    assert [a.name for a in make_averages(net, "power:0.1,0.99")] == ["power-0.1", "0.99"]
    for spec in ("", "1.5", "ema:0.9", "0.9,,0.99", "power:0", "power:0.3", "nan"):
        with pytest.raises(SettingsError):
            make_averages(net, spec)
    with pytest.raises(SettingsError, match="different names"):
        make_averages(net, "power:0.1,power:0.1")
    with pytest.raises(SettingsError, match="at least one"):
        Averages([])
