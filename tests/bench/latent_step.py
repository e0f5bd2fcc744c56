"""One training step of a latent diffusion UNet, as difflit trains it from a cache, against the step of diffusers' example script.

*Plain* is what diffusers' train_text_to_image.py does in a step, in own words and without accelerate: encode the images, encode the captions, draw noise
and times, `DDPMScheduler.add_noise`, the UNet under autocast, `F.mse_loss`, backward, clip, `torch.optim.AdamW` with its defaults, the learning-rate
schedule, `EMAModel`, and the loss read back for the progress bar. Both have the same UNet with the same weights, the same precision, the same batch, in one
process, and take turns, so that a busy machine slows both.

(a) both from cached moments and states: what the step itself costs;
(b) plain with VAE and text encoder against difflit from the cache: what caching adds.

With `--measures` difflit's measures are then taken away one at a time: a table of what each brings. `--compile` adds torch.compile to it, on a GPU also with
CUDA graphs (its mode reduce-overhead); `--optimizers` adds others than AdamW, those of bitsandbytes where it is installed; `--json` keeps the figures.

    OMP_NUM_THREADS=1 python tests/bench/latent_step.py [--pairs 7] [--batch-size 16] [--measures] [--json FILE]
    python tests/bench/latent_step.py --gpu [--batch-size 64] [--seconds 12] [--json FILE]    # SD1.5's UNet, 64² latents, bf16, on one GPU

With `--gpu` nothing takes turns: each variant warms up and runs for at least `--seconds`, waited for only at its end; images per second and the share of the
device's dense bf16 peak are of that window. The mark there is MLPerf 4.0's 128 images/s per H200 (31 % of peak) for a UNet of this kind.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from difflit.adapters import quicken
from difflit.diffusion import Diffusion
from difflit.glide import keep_freed_memory
from difflit.latent import create_latent, unet_config
from difflit.precision import choose_device, choose_precision
from difflit.tasks import LatentDiffusion
from difflit.averaging import EMA
from difflit.optimizers import make_optimizer
from difflit.training import TrainState, forward_backward, seed_step, to_device, update_weights

SMALL = {  # SD1.5's shape, a fifth as wide: 12.6 million parameters
    "sample_size": 16, "block_out_channels": [64, 128, 256], "layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 128,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s
SCALING, TOKENS = 0.18215, 77


def make_network(gpu: bool):
    "The denoiser that all variants are copies of; its UNet alone is what the plain step trains."
    config = unet_config("sd15") if gpu else {**unet_config("sd15"), **SMALL}
    width = config["cross_attention_dim"]
    return create_latent(config, {"clip-l": {"width": width, "length": TOKENS, "masked": False}}, seed=0)


def make_encoders(width: int, gpu: bool):
    "A VAE and a CLIP as SD1.5's, or with their widths cut like the small UNet's; random weights cost as much as trained ones."
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    channels = (128, 256, 512, 512) if gpu else (32, 64, 128, 128)
    vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=width // 64))
    return vae.eval().requires_grad_(False), text.eval().requires_grad_(False)


def make_batch(size: int, side: int, width: int, seed: int = 0) -> dict[str, Any]:
    "A cached batch, and the images and tokens it might have come from: what they show does not change what a step costs."
    g = torch.Generator().manual_seed(seed)
    return {
        "moments": torch.randn(size, 8, side, side, generator=g).half(), "position": torch.arange(size),
        "states.clip-l": torch.randn(size, TOKENS, width, generator=g).half(), "mask.clip-l": torch.ones(size, TOKENS).bool(),
        "id": [str(i) for i in range(size)],
        "pixels": torch.rand(size, 3, 8 * side, 8 * side, generator=g) * 2 - 1, "input_ids": torch.randint(0, 40000, (size, TOKENS), generator=g),
    }


def plain(network, batch: Mapping[str, Any], device, precision, encoders=None) -> Callable[[], None]:
    "The example script's step; with `encoders` from images and captions, without from the cache."
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet = copy.deepcopy(network.unet).to(device, memory_format=torch.contiguous_format).train()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10000)
    average, low = EMAModel(unet.parameters()), precision.dtype
    vae, text = (m.to(device, low) for m in encoders) if encoders else (None, None)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def inputs():
        if vae is None:
            mean, spread = batch["moments"].float().chunk(2, dim=1)
            return (mean + torch.exp(0.5 * spread.clamp(-30, 20)) * torch.randn_like(mean)) * SCALING, batch["states.clip-l"].to(low)
        with torch.no_grad():
            latents = vae.encode(batch["pixels"].to(low)).latent_dist.sample() * SCALING
            return latents, text(batch["input_ids"], return_dict=False)[0]

    def step() -> None:
        latents, states = inputs()
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=device).long()
        noised = scheduler.add_noise(latents.float(), noise.float(), times)
        with precision.autocast():
            answer = unet(noised.to(low), times, states, return_dict=False)[0]
        loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
        mean_loss = loss.repeat(len(latents)).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        assert math.isfinite(mean_loss) and math.isfinite(loss.detach().item())  # the progress bar reads it too

    return step


def ours(network, batch: Mapping[str, Any], device, precision, without: str = "", compiled: str = "", kind: str = "adamw") -> Callable[[], None]:
    "difflit's own step, everything of it but the loader and the tracker, or without one of its measures."
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    layout = torch.contiguous_format if without == "channels_last" else torch.channels_last
    model = copy.deepcopy(network).to(device, memory_format=layout).train()
    if without != "quick norms and attention":
        quicken(model)
    if without in ("attend, not SDPA", "attend, not written out"):  # diffusers' own, over torch's fused kernel or written out
        model.unet.set_attn_processor(AttnProcessor2_0() if without == "attend, not SDPA" else AttnProcessor())
    optimizer: torch.optim.Optimizer = make_optimizer(model, 1e-4, optimizer=kind)
    if without == "fused optimizer":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=False)
    state = TrainState(model, EMA(model), optimizer, Accelerator(cpu=device.type == "cpu"), precision)
    if compiled:
        state.wrapped = torch.compile(model, mode=compiled)
    task = LatentDiffusion(Diffusion("scaled_linear", "eps"), scaling_factor=SCALING)
    batch = to_device({k: v for k, v in batch.items() if k not in ("pixels", "input_ids")}, device)
    if without == "foreach average":
        state.ema.update = slow_average(state.ema)  # type: ignore[method-assign]

    def step() -> None:
        seed_step(0, state.step + 1)
        losses = forward_backward(state, task, batch, 1)
        update_weights(state, 1e-4, 1.0)
        if without == "no synchronisation":
            assert math.isfinite(losses[0].loss.mean().item()) and math.isfinite(losses[0].raw.mean().item())

    return step


def slow_average(ema: EMA):
    "An average kept tensor by tensor."

    @torch.no_grad()
    def update(model, step: int) -> None:
        for average, live in zip(ema.model.parameters(), model.parameters()):
            average.sub_((1 - ema.decay_at(step)) * (average - live))

    return update


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step, device) -> float:
    "Wall time of one call, the device included."
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def flops_of(network, size: int, side: int, device) -> int:
    "Floating-point operations of a training step's forward and backward pass."
    model = copy.deepcopy(network).to(device).train()
    x, text = torch.randn(1, 4, side, side, device=device), {"clip-l": {k: v.to(device) for k, v in model.example_text(1)["clip-l"].items()}}
    with FlopCounterMode(display=False) as counter:
        model(x, torch.full((1,), 500.0, device=device), text).square().mean().backward()
    return counter.get_total_flops() * size


def matrix_rate(device, side: int = 2048, tries: int = 6) -> float:
    "FLOP/s of bf16 matrix products on this device: the best of several."
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(tries))


def turns(steps: Mapping[str, Callable[[], None]], device, pairs: int, warm: int = 2) -> dict[str, list[float]]:
    "Times of all steps, taken in turn, each turn beginning with another."
    for step in steps.values():
        for _ in range(warm):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = itertools.cycle(steps)
    for _ in range(pairs):
        for _ in steps:
            name = next(names)
            times[name].append(seconds(steps[name], device))
        next(names)
    return times


def spread(slow: list[float], fast: list[float]) -> dict[str, float]:
    "Ratios of neighbours in time: median, lowest, highest."
    ratios = sorted(a / b for a, b in zip(slow, fast))
    return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def said(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}…{ratio['highest']:.2f})"


MEASURES = ("channels_last", "quick norms and attention", "attend, not SDPA", "attend, not written out", "fused optimizer", "foreach average",
            "no synchronisation")


def by_turns(arguments, network, batch, device, precision, side: int) -> dict[str, Any]:
    "Both comparisons and, if asked for, the measures: median ratios with their spread."
    width = network.config.width
    steps = {"difflit": ours(network, batch, device, precision), "plain": plain(network, batch, device, precision),
             "plain with encoders": plain(network, batch, device, precision, make_encoders(width, False))}
    times = turns(steps, device, arguments.pairs)
    result: dict[str, Any] = {"a": spread(times["plain"], times["difflit"]), "b": spread(times["plain with encoders"], times["difflit"]),
                              "milliseconds": {name: 1000 * statistics.median(t) for name, t in times.items()}}
    flops, best = flops_of(network, arguments.batch_size, side, device), statistics.median(times["difflit"])
    rate = matrix_rate(device)
    result |= {"gflop_per_step": flops / 1e9, "gflops_per_second": flops / best / 1e9, "matrix_gflops_per_second": rate / 1e9, "share": flops / best / rate,
               "images_per_second": arguments.batch_size / best}
    print(f"difflit {result['milliseconds']['difflit']:.0f} ms, plain from the cache {result['milliseconds']['plain']:.0f} ms, "
          f"plain with VAE and text {result['milliseconds']['plain with encoders']:.0f} ms a step (medians of {arguments.pairs})")
    print(f"(a) both from the cache, plain/difflit: {said(result['a'])}")
    print(f"(b) plain with VAE and text encoder/difflit from the cache: {said(result['b'])}")
    print(f"{result['images_per_second']:.1f} images/s, {flops / 1e9:.1f} GFLOP a step = {flops / best / 1e9:.0f} GFLOP/s, "
          f"{result['share']:.0%} of the measured rate of bf16 matrix products ({rate / 1e9:.0f} GFLOP/s)")
    del steps
    if arguments.measures:
        result["measures"] = {}
        steps = {"all": ours(network, batch, device, precision), **{name: ours(network, batch, device, precision, without=name) for name in MEASURES}}
        on_top = {"torch.compile": {"compiled": "default"}} if arguments.compile else {}
        on_top |= {f"optimizer {kind}": {"kind": kind} for kind in arguments.optimizers}
        steps |= {name: ours(network, batch, device, precision, **how) for name, how in on_top.items()}
        times = turns(steps, device, arguments.pairs)
        print("\n| measure | a step without it takes |\n|---|---:|")
        for name in MEASURES:
            result["measures"][name] = spread(times[name], times["all"])
            print(f"| {name} | × {said(result['measures'][name])} |")
        for name in on_top:
            result["measures"][name] = spread(times["all"], times[name])
            print(f"| {name}: gain on top | × {said(result['measures'][name])} |")
    return result


def window(step, device, least: float, warm: int = 20) -> tuple[int, float]:
    "Steps and seconds of an unbroken stretch of at least so many seconds, waited for at its end only."
    for _ in range(warm):
        step()
    one = min(seconds(step, device) for _ in range(3))
    count = math.ceil(least / one) + 1
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return count, time.perf_counter() - start


def by_windows(arguments, network, batch, device, precision, side: int) -> dict[str, Any]:
    "Images per second and share of peak, variant by variant, each alone on the device."
    name = torch.cuda.get_device_name(device)
    peak = next((v for k, v in PEAKS.items() if k in name), None) or matrix_rate(device, 8192)
    flops = flops_of(network, arguments.batch_size, side, device)
    width = network.config.width
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    variants: dict[str, Callable[[], Callable[[], None]]] = {
        "difflit": lambda: ours(network, batch, device, precision),
        "plain": lambda: plain(network, batch, device, precision),
        "plain with encoders": lambda: plain(network, batch, device, precision, make_encoders(width, True)),
    }
    if arguments.compile:
        modes = {"compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}
        variants |= {f"difflit, {label}": lambda mode=mode: ours(network, batch, device, precision, compiled=mode) for label, mode in modes.items()}
    variants |= {f"difflit, {kind}": lambda kind=kind: ours(network, batch, device, precision, kind=kind) for kind in arguments.optimizers}
    if arguments.measures:
        variants |= {f"without {m}": lambda m=m: ours(network, batch, device, precision, without=m) for m in MEASURES}
    result: dict[str, Any] = {"device": name, "peak_flops": peak, "flop_per_image": flops / arguments.batch_size, "variants": {}}
    print(f"{name}, {peak / 1e12:.0f} TFLOP/s peak, {flops / arguments.batch_size / 1e12:.2f} TFLOP an image\n")
    print("| variant | images/s | of peak | seconds | GB |\n|---|---:|---:|---:|---:|")
    for label, make in variants.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            count, took = window(make(), device, arguments.seconds)
        except torch.OutOfMemoryError:
            print(f"| {label} | out of memory | | | |")
            continue
        rate = count * arguments.batch_size / took
        row = {"images_per_second": rate, "share_of_peak": rate * flops / arguments.batch_size / peak, "seconds": took,
               "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        result["variants"][label] = row
        print(f"| {label} | {rate:.1f} | {row['share_of_peak']:.1%} | {took:.1f} | {row['memory_gb']:.0f} |", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7, help="turns of each variant (without --gpu)")
    parser.add_argument("--batch-size", type=int, help="images a step; 16, with --gpu 64")
    parser.add_argument("--precision", default="bf16", help="fp32 or bf16, for both sides")
    parser.add_argument("--gpu", action="store_true", help="SD1.5's size, steady state")
    parser.add_argument("--seconds", type=float, default=12.0, help="least length of a window, with --gpu")
    parser.add_argument("--measures", action="store_true", help="take difflit's measures away one at a time")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, on a GPU also with CUDA graphs")
    parser.add_argument("--optimizers", default="", help="with --gpu or --measures: others too, comma between, such as adamw8bit,paged-adamw8bit")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|torch")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    arguments.optimizers = [name for name in arguments.optimizers.split(",") if name]
    arguments.batch_size = arguments.batch_size or (64 if arguments.gpu else 16)
    device = choose_device()
    if arguments.gpu and device.type != "cuda":
        raise SystemExit("--gpu needs a CUDA device")
    device = device if arguments.gpu else torch.device("cpu")
    precision = choose_precision(arguments.precision, device)
    if device.type == "cpu":
        keep_freed_memory()  # for both: it belongs to the process
    network = make_network(arguments.gpu)
    side = network.config.unet["sample_size"]
    batch = make_batch(arguments.batch_size, side, network.config.width)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"UNet of {millions:.1f} M parameters, latents {side}², batch {arguments.batch_size}, {precision.name}, {device}, {torch.get_num_threads()} threads")
    result = (by_windows if arguments.gpu else by_turns)(arguments, network, batch, device, precision, side)
    if arguments.json:
        with open(arguments.json, "w") as file:
            setting = {"parameters": millions, "batch_size": arguments.batch_size, "precision": precision.name, "threads": torch.get_num_threads()}
            json.dump({**setting, **result}, file, indent=1)


if __name__ == "__main__":
    main()
