"""Numbers about gradients and arithmetic, against plain loops and formulas; what they cost; sharded networks."""

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from difflit.diagnostics import (
    copy_weights,
    part_groups,
    part_norms,
    peak_flops,
    qk_gradients,
    step_flops,
    update_ratios,
)
from difflit.glide import create_glide


class Attention(nn.Module):
    "Queries, keys and values apart, as diffusers has them."

    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


def filled(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(8), nn.Linear(8, 8), Attention(8)).to(dtype)
    model(torch.randn(2, 5, 8, dtype=dtype)).square().mean().backward()
    return model


def test_qk_gradients_are_a_mean_of_a_plain_loop():
    model, total, count = filled(), 0.0, 0
    for attention in (model[0], model[2]):
        for layer in (attention.to_q, attention.to_k):
            for value in layer.weight.grad.flatten().tolist():
                total, count = total + abs(value), count + 1
    assert qk_gradients(model).item() == pytest.approx(total / count, rel=1e-5)
    deeper = nn.Sequential(*[nn.Sequential(Attention(8), nn.Linear(8, 8), Attention(8)) for _ in range(3)])
    for part in deeper:
        for mine, theirs in zip(part.parameters(), model.parameters()):
            mine.grad = theirs.grad
    assert qk_gradients(deeper).item() == pytest.approx(qk_gradients(model).item(), rel=1e-5)  # a sum of means would be three times as much


def test_qk_gradients_see_the_rows_that_count():
    """Values' rows of a fused weight do not count: what stands in them must change nothing."""
    glide = create_glide("tiny", image_size=16, vocabulary=50, text_context=4)
    block = next(m for m in glide.modules() if hasattr(m, "encoder_kv"))
    for value, chosen in ((1.0, slice(0, 1)), (1.0, slice(1, 2)), (0.0, slice(2, 3))):
        block.qkv.weight.grad = torch.zeros_like(block.qkv.weight)
        block.qkv.weight.grad.view(block.heads, 3, -1)[:, chosen] = 2.0
        assert qk_gradients(glide).item() == pytest.approx(value)


def test_qk_gradients_of_torchs_attention_with_other_widths():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    attention(torch.randn(3, 1, 8), torch.randn(5, 1, 6), torch.randn(5, 1, 4))[0].square().sum().backward()
    grads = torch.cat([attention.q_proj_weight.grad.flatten(), attention.k_proj_weight.grad.flatten()])
    assert qk_gradients(attention).item() == pytest.approx(grads.abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_float64(dtype):
    model = filled(dtype)
    groups = part_groups(model)
    for of, tensor in (("gradients", lambda p: p.grad), ("weights", lambda p: p.detach())):
        for group, norm in part_norms(model, of, groups).items():
            exact = torch.cat([tensor(model.get_parameter(n)).double().flatten() for n in groups[group]]).norm()
            assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_wrapped_network_has_the_same_norms():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = filled()
    assert part_norms(Wrapper(model)) == part_norms(model) and part_groups(Wrapper(model)) == part_groups(model)
    assert qk_gradients(Wrapper(model)) == qk_gradients(model)


def test_update_ratio_of_plain_descent_is_known():
    model = filled()
    before, gradients, weights = copy_weights(model), part_norms(model), part_norms(model, "weights")
    torch.optim.SGD(model.parameters(), lr=0.125).step()
    for group, ratio in update_ratios(model, before).items():
        assert ratio.item() == pytest.approx(0.125 * gradients[group].item() / weights[group].item(), rel=1e-3)


def test_flops_of_a_convolution_are_the_formula():
    layer = nn.Conv2d(3, 8, 3, padding=1)
    forward = 2 * 3 * 8 * 9 * 16 * 16
    assert step_flops(lambda: layer(torch.randn(1, 3, 16, 16))) == forward
    assert step_flops(lambda: layer(torch.randn(1, 3, 16, 16, requires_grad=True)).sum().backward()) == 3 * forward


def test_counting_leaves_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    step_flops(lambda: torch.rand(3))
    assert torch.rand(1) == expected


def test_a_peak_is_measured_once_and_above_what_training_reaches():
    start = time.process_time()
    peak = peak_flops("cpu", torch.float32)
    first = time.process_time() - start
    start = time.process_time()
    assert peak_flops("cpu", torch.float32) == peak and time.process_time() - start < 0.01 + first / 10
    assert 1e9 < peak < 1e14


def test_norms_cost_little():
    """Of a step of the tiny GLIDE at batch 32: a few hundredths at most; the best of several, as the machine may be busy."""
    glide = create_glide("tiny", image_size=16, vocabulary=50, text_context=4)
    groups, words = part_groups(glide), {"tokens": torch.ones(32, 4).long(), "mask": torch.ones(32, 4).bool()}
    images, times = torch.randn(32, 3, 16, 16), torch.rand(32) * 999

    def best(function, count):
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        return min(taken)

    step = best(lambda: glide(images, times, **words).square().mean().backward(), 3)
    assert best(lambda: (part_norms(glide, groups=groups), qk_gradients(glide)), 10) < 0.05 * step


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from test_diagnostics import Attention, filled
from difflit.diagnostics import copy_weights, parameter_percentiles, part_groups, part_norms, qk_gradients, update_ratios
from torch import nn
torch.set_num_threads(1)
whole = filled()
dist.init_process_group("gloo")
model = filled()
model.zero_grad()
fully_shard(model)
torch.manual_seed(0)
nn.Sequential(Attention(8), nn.Linear(8, 8), Attention(8))
model(torch.randn(2, 5, 8)).square().mean().backward()
for of in ("gradients", "weights"):
    for group, norm in part_norms(model, of).items():
        torch.testing.assert_close(norm, part_norms(whole, of)[group], rtol=1e-4, atol=0)
torch.testing.assert_close(qk_gradients(model), qk_gradients(whole), rtol=1e-4, atol=0)
before = copy_weights(model)
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert all(v > 0 for v in update_ratios(model, before).values())
assert parameter_percentiles(model)
dist.destroy_process_group()
"""


def test_sharded_networks_have_the_whole_ones_norms(tmp_path):
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARDED, os.path.dirname(__file__)]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-2000:] + said[1][-2000:]
