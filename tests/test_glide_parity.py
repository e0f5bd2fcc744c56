"""difflit's GLIDE, samplers and loss against openai/glide-text2im itself: same random weights, same inputs, same numbers.

`test_glide_golden.py` holds a few of its numbers and runs everywhere; this file needs the original and compares whatever it computes.
"""

import contextlib
import gc
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflit.diffusion import Diffusion, hybrid_loss, learned_range_logvar, posterior
from difflit.glide import Glide, create_glide
from difflit.denoising import Denoiser, per_sample_noise
from difflit.samplers import ddim
from difflit.sampling import sample
from difflit.spacing import sigma_steps
from difflit.stochastic import ddpm

INSTALL = "install glide_text2im from git+https://github.com/openai/glide-text2im to run the parity tests"
pytest.importorskip("glide_text2im", reason=INSTALL)
from glide_text2im.model_creation import (  # noqa: E402
    create_gaussian_diffusion,
    create_model,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)
from glide_text2im.respace import space_timesteps  # noqa: E402

VARIANTS = ["base", "base-inpaint", "upsample", "upsample-inpaint"]
SHAPE = {"channels": "num_channels", "residual_blocks": "num_res_blocks", "text_layers": "xf_layers", "dropout": "dropout"}
SMALL = {"channels": 64, "residual_blocks": 1, "text_layers": 2, "dropout": 0.0}


def pair(variant: str, **shape) -> tuple[Glide, nn.Module]:
    "difflit's model and the original with the same random weights, none of them zero; both in evaluation mode."
    mine = create_glide(variant, **shape)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if p.dim() > 1 and not p.any():  # what starts at zero would hide the block that it closes
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif p.dim() == 1:
                nn.init.normal_(p, float(name.endswith("weight")), 0.1)
    options = model_and_diffusion_defaults_upsampler() if mine.config.super_resolution else model_and_diffusion_defaults()
    options |= {"inpaint": mine.config.inpaint, "use_fp16": False} | {SHAPE[name]: value for name, value in shape.items() if name in SHAPE}
    for name in ("diffusion_steps", "noise_schedule", "timestep_respacing"):
        options.pop(name)
    theirs = create_model(**options)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    return mine.eval(), theirs.eval()


def inputs_for(model: Glide, batch: int = 2, side: int = 64) -> dict[str, Tensor]:
    "Random images, times, captions (the last one empty) and whatever else the variant takes."
    generator, config = torch.Generator().manual_seed(1), model.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = torch.linspace(19, 0, batch).long()
    given = {
        "x": randn(batch, 3, side, side),
        "timesteps": torch.linspace(997, 3, batch).long(),
        "tokens": torch.randint(0, config.vocabulary, (batch, config.text_context), generator=generator),
        "mask": torch.arange(config.text_context) < lengths[:, None],
    }
    if config.super_resolution:
        given["low_res"] = randn(batch, 3, side // 4, side // 4)
    if config.inpaint:
        given |= {"inpaint_image": randn(batch, 3, side, side), "inpaint_mask": (randn(batch, 1, side, side) > 0).float()}
    return given


def error(found: Tensor, expected: Tensor) -> float:
    "Largest difference, relative to the largest number; printed, to be seen with `pytest -s`."
    relative = ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()
    print(f"  largest difference {relative:.1e}")
    return relative


def calm(models: tuple[Glide, nn.Module]) -> tuple[Glide, nn.Module]:
    "Both with an answer a tenth as large: over dozens of steps a random network magnifies the last digit a hundredfold."
    for model in models:
        model.out[2].weight.data.mul_(0.1)
    return models


def apart(found: Tensor, expected: Tensor) -> float:
    "Length of the difference, relative to the length: for what a few pixels at the edge of clipping would dominate."
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def small() -> tuple[Glide, nn.Module]:
    "A narrow, shallow base model and its twin."
    return calm(pair("base", **SMALL))


# -- the network


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant: str) -> None:
    "All four official models, whole, answer alike to 1e-5 in fp32."
    mine, theirs = pair(variant)
    given = inputs_for(mine)
    with torch.no_grad():
        expected = theirs(**given)
        del theirs
        gc.collect()
        assert error(mine(**given), expected) < 1e-5


@pytest.mark.parametrize("missing", [("inpaint_image",), ("inpaint_mask",), ("inpaint_image", "inpaint_mask")])
def test_missing_inpainting_inputs(missing: tuple[str, ...]) -> None:
    "A picture or mask that is left out means the same to both."
    mine, theirs = pair("base-inpaint", **SMALL)
    given = {name: value for name, value in inputs_for(mine, side=16).items() if name not in missing}
    with torch.no_grad():
        assert error(mine(**given), theirs(**given)) < 1e-5


def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    "Of a random weighing of the answer, with respect to every weight."
    model.zero_grad()
    answer = model(**given)
    (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant, checkpointing, memory, limit", [
    *((variant, False, torch.contiguous_format, 1e-5) for variant in VARIANTS),
    ("base", True, torch.contiguous_format, 1e-5),
    ("base", False, torch.channels_last, 3e-5),  # other kernels, which round differently
])
def test_gradients(variant: str, checkpointing: bool, memory: torch.memory_format, limit: float) -> None:
    "The gradients of all weights agree to 1e-5 of the length of each."
    mine, theirs = pair(variant, **SMALL, checkpointing=checkpointing)
    mine.to(memory_format=memory)
    given = inputs_for(mine, side=32)
    found, expected = gradients(mine, given), gradients(theirs, given)
    assert set(found) == set(expected)
    worst = {name: apart(found[name], g) for name, g in expected.items() if g.any()}
    assert len(worst) > 0.99 * len(expected)
    name = max(worst, key=lambda key: worst[key])
    print(f"  {variant}: farthest gradient {name}, {worst[name]:.1e}")
    assert worst[name] < limit, f"{name}: {worst[name]:.1e}"


# -- schedules


@pytest.mark.parametrize("spacing", ["fast27", "100", "10,10,3,2,2", "ddim50", "1,1,1", "27"])
def test_respacing(spacing: str) -> None:
    "The same timesteps are asked for, and σ is theirs to float64's digits."
    expected = sorted(space_timesteps(1000, spacing), reverse=True)
    for name, theirs in (("squared_cosine", "squaredcos_cap_v2"), ("linear", "linear")):
        diffusion, reference = Diffusion(name, "eps"), create_gaussian_diffusion(1000, theirs, spacing)
        sigmas = sigma_steps(diffusion, spacing=spacing)
        assert [round(diffusion.time_of(float(s))) for s in sigmas[:-1]] == expected and float(sigmas[-1]) == 0
        bar = reference.alphas_cumprod[::-1].copy()
        np.testing.assert_allclose(sigmas[:-1].numpy(), np.sqrt(1 / bar - 1), rtol=1e-9)


# -- sampling


def guided(model: nn.Module, guidance: float):
    "The original's notebooks: the first half of the batch is shown with and without text, ε is guided, the variance is not."

    def answer(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        first = x[: len(x) // 2]
        out = model(torch.cat([first, first]), t, **given)
        eps, rest = out[:, :3], out[:, 3:]
        conditional, unconditional = eps.chunk(2)
        eps = unconditional + guidance * (conditional - unconditional)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    return answer


def captions(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    "Captions, and the empty one."
    tokens = torch.randint(0, 50257, (count, 128), generator=torch.Generator().manual_seed(3))
    given = {"tokens": tokens, "mask": torch.arange(128).expand(count, -1) < 9}
    return given, {"tokens": torch.full((1, 128), 50256), "mask": torch.zeros(1, 128, dtype=torch.bool)}


def doubled(given: dict[str, Tensor], empty: dict[str, Tensor]) -> dict[str, Tensor]:
    "Captions first, empty ones behind: how the original wants them."
    return {name: torch.cat([value, empty[name].expand_as(value)]) for name, value in given.items()}


def test_ancestral_steps_with_learned_range(small: tuple[Glide, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    "p_sample, guided, with clipping, step after step with the same noise: the state agrees in every one."
    mine, theirs = small
    count, side, spacing = 2, 16, "5"
    (given, empty), generator = captions(count), torch.Generator().manual_seed(4)
    start, fresh = torch.randn(count, 3, side, side, generator=generator), torch.randn(5, count, 3, side, side, generator=generator)
    reference, diffusion = create_gaussian_diffusion(1000, "squaredcos_cap_v2", spacing), Diffusion("squared_cosine", "eps")
    expected, x = [], torch.cat([start, start])
    with torch.no_grad():
        for step, index in enumerate(reversed(range(5))):
            monkeypatch.setattr(torch, "randn_like", lambda like, step=step: torch.cat([fresh[step]] * 2))
            t = torch.full((2 * count,), index)
            out = reference.p_sample(guided(theirs, 3.0), x, t, clip_denoised=True, model_kwargs=doubled(given, empty))
            expected.append((x[:count], out["pred_xstart"][:count]))
            x = out["sample"]
    monkeypatch.undo()
    seen = []
    sigmas = sigma_steps(diffusion, spacing=spacing)
    with torch.no_grad():
        denoise = Denoiser(mine, diffusion, given, empty, 3.0, clamp=1.0)
        state = start / scale_of(diffusion, float(sigmas[0]))
        last = ddpm(denoise, state, sigmas, noise=lambda step, shape: fresh[step], variance="learned", callback=lambda *told: seen.append(told))
    assert len(seen) == len(expected) == 5
    for (_, sigma, state, x0), (their_state, their_x0) in zip(seen, expected):
        assert error(state * scale_of(diffusion, sigma), their_state) < 1e-4
        assert error(x0, their_x0) < 1e-4
    assert error(last, x[:count]) < 1e-4


def scale_of(diffusion: Diffusion, sigma: float) -> float:
    "α where σ/α is this: difflit's samplers see x_t/α."
    return 1 / math.sqrt(1 + sigma * sigma)


def test_ddim_fast27_guided(small: tuple[Glide, nn.Module]) -> None:
    "27 steps of DDIM without fresh noise, guided and clipped, begin and end at the same pictures."
    mine, theirs = small
    count, side = 2, 16
    given, empty = captions(count)
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    reference, diffusion = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "fast27"), Diffusion("squared_cosine", "eps")
    with torch.no_grad():
        expected = reference.ddim_sample_loop(
            guided(theirs, 3.0), (2 * count, 3, side, side), torch.cat([noise, noise]), model_kwargs=doubled(given, empty), device=noise.device
        )[:count]
        sigmas = sigma_steps(diffusion, spacing="fast27")
        state = noise / scale_of(diffusion, float(sigmas[0]))
        found = ddim(Denoiser(mine, diffusion, given, empty, 3.0, clamp=1.0), state, sigmas)
    print(f"  pictures apart by {apart(found, expected):.1e}")
    assert apart(found, expected) < 1e-4


@pytest.mark.parametrize("prepared", [False, True])
def test_whole_sample(prepared: bool) -> None:
    "The upsampler as the notebooks run it, by difflit's one call: no guidance, fast27, the initial noise times 0.997."
    mine, theirs = calm(pair("upsample", **SMALL))
    count, side = 2, 32
    given, _ = captions(count)
    given["low_res"] = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(6)) * 2 - 1
    noise = per_sample_noise(range(count))(-1, (count, 3, side, side))
    reference, diffusion = create_gaussian_diffusion(1000, "linear", "fast27"), Diffusion("linear", "eps")
    with torch.no_grad():
        expected = reference.ddim_sample_loop(theirs, noise.shape, noise=noise * 0.997, model_kwargs=given)
    with mine.prepared() if prepared else contextlib.nullcontext():
        found = sample(mine, diffusion, given, seeds=range(count), shape=(3, side, side), sampler="ddim", spacing="fast27", guidance=1.0, clamp=1.0,
                       temperature=0.997)
    print(f"  pictures apart by {apart(found, expected):.1e}")
    assert apart(found, expected) < 1e-4


# -- the training loss


def spread(values: np.ndarray, t: Tensor) -> Tensor:
    "A number of each picture's timestep, to stand against pictures."
    return torch.from_numpy(values)[t].view(-1, 1, 1, 1)


def bin_probability(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    "What a normal distribution gives to the 8-bit bin of each value (Ho et al. 2020, eq. 13)."
    def below(edge: Tensor) -> Tensor:
        return 0.5 * torch.erfc(-(edge - mean) / torch.exp(0.5 * logvar) / math.sqrt(2))

    upper = torch.where(x > 0.999, torch.ones_like(mean), below(x + 1 / 255))
    return upper - torch.where(x < -0.999, torch.zeros_like(mean), below(x - 1 / 255))


def hybrid_reference(betas: np.ndarray, answer: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    "MSE and bits per dimension, in float64 from Ho et al. 2020, eqs. 4, 6, 7 and 13, and Nichol & Dhariwal 2021, eqs. 15 and 16, on 1000 steps."
    keep = 1 - betas
    bar = np.cumprod(keep)
    before = np.append(1.0, bar[:-1])
    posterior_variance = betas * (1 - before) / (1 - bar)
    posterior_variance[0] = posterior_variance[1]  # at the last step there is none; OpenAI's code takes its neighbour's
    of_x0, of_x = np.sqrt(before) * betas / (1 - bar), np.sqrt(keep) * (1 - before) / (1 - bar)
    x = spread(np.sqrt(bar), t) * x0 + spread(np.sqrt(1 - bar), t) * noise
    eps, v = answer.chunk(2, dim=1)
    guess = (x - spread(np.sqrt(1 - bar), t) * eps) / spread(np.sqrt(bar), t)
    true_mean, mean = (spread(of_x0, t) * z + spread(of_x, t) * x for z in (x0, guess.detach()))
    fraction = (v + 1) / 2
    logvar = fraction * spread(np.log(betas), t) + (1 - fraction) * spread(np.log(posterior_variance), t)
    true_logvar = spread(np.log(posterior_variance), t)
    divergence = 0.5 * (logvar - true_logvar + (true_logvar.exp() + (true_mean - mean) ** 2) / logvar.exp() - 1)
    decoded = -bin_probability(x0, mean, logvar).clamp(min=1e-12).log()
    nats = torch.where((t == 0).view(-1, 1, 1, 1), decoded, divergence)
    return ((eps - noise) ** 2).mean((1, 2, 3)), nats.mean((1, 2, 3)) / math.log(2)


@pytest.fixture
def question() -> dict[str, Tensor]:
    "8-bit pictures, noise, times with both ends, and an answer near the noise, in float64."
    generator = torch.Generator().manual_seed(8)
    noise, near = torch.randn(2, 8, 3, 6, 6, generator=generator, dtype=torch.float64)
    values = torch.rand(noise.shape, generator=generator).double() * 2 - 1
    return {
        "x0": torch.randint(0, 256, (8, 3, 6, 6), generator=generator).double() / 127.5 - 1,
        "noise": noise,
        "t": torch.tensor([0, 0, 1, 17, 333, 640, 998, 999]),
        "answer": torch.cat([noise + 0.1 * near, values], 1),
    }


@pytest.mark.parametrize("schedule, theirs", [("squared_cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_hybrid_loss(schedule: str, theirs: str, question: dict[str, Tensor]) -> None:
    "Value and gradient of the training loss, against the papers' equations in float64 on the original's betas."
    betas = create_gaussian_diffusion(1000, theirs, "").betas
    answer, (x0, noise, t) = question["answer"], (question[name] for name in ("x0", "noise", "t"))
    grads = []
    for form in (hybrid_loss, hybrid_reference):
        leaf = answer.clone().requires_grad_()
        if form is hybrid_loss:
            parts = hybrid_loss(Diffusion(schedule, "eps"), leaf, x0, noise, t)
            mse, vlb, loss = parts.mse, parts.vlb, parts.loss
        else:
            mse, vlb = hybrid_reference(betas, leaf, x0, noise, t)
            loss = mse + vlb
        grads.append((mse.detach(), vlb.detach(), loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for found, expected in zip(*grads):
        assert error(found, expected) < 1e-7


@pytest.mark.parametrize("schedule, theirs", [("squared_cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_posterior_and_learned_range(schedule: str, theirs: str, question: dict[str, Tensor]) -> None:
    "The parts of the bound that the original has, which it computes in fp32: mean and variance of q and of p."
    reference, diffusion = create_gaussian_diffusion(1000, theirs, ""), Diffusion(schedule, "eps")
    x0, noise, t, answer = (question[name].float() if name != "t" else question[name] for name in ("x0", "noise", "t", "answer"))
    x = diffusion.add_noise(x0, noise, t)
    assert error(x, reference.q_sample(x0, t, noise)) < 1e-6
    mean, _, logvar = reference.q_posterior_mean_variance(x0, x, t)
    mine, my_logvar = posterior(diffusion, x0, x, t)
    assert error(mine, mean) < 1e-6 and error(my_logvar.expand_as(logvar), logvar) < 1e-6
    out = reference.p_mean_variance(lambda x, t: answer, x, t, clip_denoised=False)
    guess = diffusion.to_x0(answer[:, :3], x, t)
    logvar = learned_range_logvar(diffusion, answer[:, 3:], t)
    for found, expected in ((guess, "pred_xstart"), (posterior(diffusion, guess, x, t)[0], "mean"), (logvar, "log_variance")):
        for row in range(len(t)):  # x0 at t = 999 is 10⁴ times larger than at 0
            limit = 1e-3 if expected == "pred_xstart" and t[row] > 990 else 2e-5
            assert error(found[row], out[expected][row]) < limit
