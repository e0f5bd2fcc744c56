"""The same steps as k-diffusion, where that is installed (`pip install k-diffusion`): the same denoiser and, for the stochastic ones, the same noise."""

import math

import pytest
import torch

import difflit.stochastic  # noqa: F401  (registers the samplers that draw noise)
from difflit.diffusion import Diffusion
from difflit.mixtures import Mixture
from difflit.randomness import normal
from difflit.samplers import get_sampler
from difflit.spacing import sigma_steps

theirs = pytest.importorskip("k_diffusion.sampling")

CLOUD = Mixture(2 * normal(0, "mixture", range(4), (8,)).double(), 0.25)
START = 20 * normal(0, "start", range(16), (8,)).double()
SIGMAS = torch.cat([torch.logspace(math.log10(20), math.log10(0.02), 21, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def model(x, sigma, **_):
    return CLOUD.denoise(x, float(sigma[0]))


def fresh(step, shape):
    return normal(0, f"fresh {step}", range(shape[0]), tuple(shape[1:])).double()


@pytest.mark.parametrize(("name", "function", "options"), [
    ("euler", "sample_euler", {}),
    ("heun", "sample_heun", {}),
    ("dpmpp_2m", "sample_dpmpp_2m", {}),
    ("euler_a", "sample_euler_ancestral", {}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"exact": False}),
])
def test_every_state_is_theirs(name, function, options):
    mine, others = [], []
    call = {"noise_sampler": lambda *_: fresh(len(others) - 1, START.shape)} if name.endswith(("_a", "_sde")) else {}
    last = getattr(theirs, function)(model, START, SIGMAS, callback=lambda told: others.append(told["x"].clone()), disable=True, **call)
    got = get_sampler(name)(CLOUD.denoise, START, SIGMAS, noise=fresh, callback=lambda step, sigma, x, x0: mine.append(x), **options)
    assert len(mine) == len(others) == 21
    for a, b in zip([*mine, got], [*others, last]):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-7), float((a - b).abs().max())


def test_karras_spacing_is_theirs():
    linear = Diffusion("linear")
    ends = linear.sigma_ve(torch.tensor([999, 0]))
    assert torch.allclose(sigma_steps(linear, 20, "karras").float(), theirs.get_sigmas_karras(20, float(ends[1]), float(ends[0])), rtol=1e-5)
