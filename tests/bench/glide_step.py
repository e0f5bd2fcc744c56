"""GLIDE's forward pass, training step and guided sample: difflit against openai/glide-text2im, in turn in one process.

Both get the same weights, inputs and number of threads; one runs, then the other, so that a busy machine slows both. Printed are medians, the median of the
ratios original/difflit with its spread over pairs, GFLOP/s, and the share of this machine's measured rate of bf16 matrix products. Without glide_text2im (it
installs from git+https://github.com/openai/glide-text2im) difflit is measured alone.

    python tests/bench/glide_step.py [--variant base] [--parts forward,train,sample] [--pairs 5] [--batch-size 2]
    python tests/bench/glide_step.py --parts train --whole                 # 385 million weights twice: 17 GB
    python tests/bench/glide_step.py --batch-size 64 --parts train,memory --whole       # a large GPU
    python tests/bench/glide_step.py --channels 64 --blocks 1 --text-layers 2   # a smaller one, in a minute

What is compared:

- *forward*: evaluation mode, captions included, in fp32 and under bf16 autocast;
- *train*: one update. difflit's own step (`forward_backward`, `update_weights`) against what fine-tuning scripts do around the original: bf16
  autocast, the mean squared error of ε, AdamW, clipping, an average over all weights. On a GPU also against the original's fp16 path, which needs
  half-precision kernels that CPUs lack. Weights, gradients, two moments and an average of `base` take 7.7 GB in fp32, so two do not fit into 16 GB:
  unless `--whole` is given, this part takes one residual block per level instead of three and four layers of text instead of sixteen. Widths, which
  decide how kernels perform, stay;
- *sample*: one picture per prompt, 27 steps of DDIM ("fast27"), guidance 3 with both branches in one batch (the upsamplers without guidance). The
  original as in its notebooks, with its text cache; difflit by `difflit.sampling.sample`, which uses `model.prepared(dtype)`. The original's notebooks
  compute in fp32 where there is no GPU, so the last line also compares difflit in bf16 with that.
"""

import argparse
import contextlib
import copy
import gc
import statistics
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import matrix_rate, seconds

from difflit.diffusion import Diffusion
from difflit.glide import Glide, create_glide, keep_freed_memory
from difflit.precision import Precision, choose_device
from difflit.sampling import sample
from difflit.spacing import spaced_times
from difflit.tasks import create_task
from difflit.averaging import EMA
from difflit.optimizers import make_optimizer
from difflit.training import TrainState, forward_backward, seed_step, to_device, update_weights

try:
    from glide_text2im.model_creation import create_gaussian_diffusion, create_model, model_and_diffusion_defaults, model_and_diffusion_defaults_upsampler
except ImportError:
    create_model = None

TASKS = {"base": "text-to-image", "base-inpaint": "inpaint", "upsample": "upsample", "upsample-inpaint": "upsample-inpaint"}
SHAPE = {"channels": "num_channels", "residual_blocks": "num_res_blocks", "text_layers": "xf_layers"}


def build(arguments, device, train=False, **overrides) -> tuple[Glide, nn.Module | None]:
    """Both models, with the same random weights."""
    shape = {"channels": arguments.channels, "residual_blocks": arguments.blocks, "text_layers": arguments.text_layers}
    if train and not arguments.whole:
        shape = {"residual_blocks": 1, "text_layers": 4, **{k: v for k, v in shape.items() if v is not None}}
    shape = {k: v for k, v in shape.items() if v is not None}
    mine = create_glide(arguments.variant, **shape, **overrides)
    with torch.no_grad():
        for p in mine.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
    theirs = None
    if create_model is not None:
        options = model_and_diffusion_defaults_upsampler() if mine.config.super_resolution else model_and_diffusion_defaults()
        options |= {"inpaint": mine.config.inpaint, "use_fp16": False} | {SHAPE[k]: v for k, v in shape.items()}
        for name in ("diffusion_steps", "noise_schedule", "timestep_respacing"):
            options.pop(name)
        theirs = create_model(**options)
        theirs.load_state_dict(mine.state_dict())
        theirs.to(device)
    if arguments.compile:
        mine.compile()
    return mine.to(device), theirs


def inputs_for(config, arguments, device, batch: int) -> dict[str, Tensor]:
    """Random inputs of the right shapes: time does not depend on what they show."""
    side, context = arguments.size, config.text_context
    given = {"tokens": torch.randint(0, config.vocabulary, (batch, context)), "mask": torch.arange(context).expand(batch, -1) < 12}
    if config.super_resolution:
        given["low_res"] = torch.rand(batch, 3, side // 4, side // 4) * 2 - 1
    if config.inpaint:
        given["inpaint_image"], given["inpaint_mask"] = torch.rand(batch, 3, side, side) * 2 - 1, (torch.rand(batch, 1, side, side) > 0.5).float()
    return {k: v.to(device) for k, v in given.items()}


def flops_of(config, size: int, text: bool = True) -> float:
    """Floating-point operations of a forward pass of one image, counted without computing."""
    with torch.device("meta"):
        model = Glide(config)
        given = {"low_res": torch.zeros(1, 3, size // 4, size // 4)} if config.super_resolution else {}
        with torch.no_grad():
            words = model.empty_text()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size), torch.zeros(1), text=None if text else words, **given)
    return counter.get_total_flops()


def processor_seconds(step, device) -> float:
    """Processor time of one call: what a busy machine does not lengthen."""
    start = time.process_time()
    step()
    return time.process_time() - start


def compare(name: str, ours, theirs, arguments, device, flops: float, rate: float) -> None:
    """Take turns, print one line."""
    for step in (ours, theirs):
        if step:
            step()
    pairs, clock = arguments.pairs, processor_seconds if arguments.processor_time else seconds
    times = [(clock(ours, device), clock(theirs, device) if theirs else float("nan")) for _ in range(pairs)]
    mine = statistics.median(a for a, _ in times)
    line = f"{name:22} difflit {mine:8.3f} s, {flops / mine / 1e9:6.0f} GFLOP/s, {flops / mine / rate:5.1%} of the matrix rate"
    if theirs:
        ratios = sorted(b / a for a, b in times)
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs)"
        line += f"; original {statistics.median(b for _, b in times):8.3f} s; ratio {statistics.median(ratios):.2f} {spread}"
    print(line, flush=True)


def forward(arguments, device, rate) -> None:
    """One question to each model."""
    mine, theirs = build(arguments, device)
    batch, side = arguments.batch_size, arguments.size
    given = inputs_for(mine.config, arguments, device, batch)
    x, t = torch.randn(batch, 3, side, side, device=device), torch.randint(1000, (batch,), device=device)
    mine.eval()
    if theirs is not None:
        theirs.eval()
        with torch.no_grad():
            a, b = mine(x, t, **given), theirs(x, t, **given)
        print(f"answers in fp32 differ by {((a - b).norm() / b.norm()).item():.1e} of their size")

    def ask(model, dtype):
        def question():
            with torch.no_grad(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                model(x, t, **given)

        return question

    flops = flops_of(mine.config, side) * batch
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        if name in arguments.precision:
            compare(f"forward {name}", ask(mine, dtype), ask(theirs, dtype) if theirs else None, arguments, device, flops, rate)


def our_step(model, arguments, device, image):
    """difflit's update, everything of it but the loader and the tracker."""
    precision = Precision("bf16" if "bf16" in arguments.precision else "fp32", device)
    state = TrainState(model, EMA(model, 0.9999), make_optimizer(model, 1e-4), Accelerator(cpu=device.type == "cpu"), precision)
    text = inputs_for(model.config, arguments, device, len(image))
    batch = {"image": image, "position": torch.arange(len(image)), "tokens": text["tokens"], "mask": text["mask"]}
    task = create_task(TASKS[arguments.variant], diffusion=Diffusion("linear" if model.config.super_resolution else "squared_cosine", "eps"))
    batch = to_device(batch, device)

    def step():
        seed_step(0, state.step + 1)
        forward_backward(state, task, batch, 1)
        update_weights(state, 1e-4, 1.0)

    return step


def their_step(model, arguments, device, image, half=False):
    """An update as fine-tuning scripts around the original write it; `half`: with the original's own fp16 weights."""
    if half:
        model.convert_to_fp16()
        model.dtype = torch.float16
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    given = {k: v for k, v in arguments.given.items()}
    diffusion = create_gaussian_diffusion(1000, "linear" if "low_res" in given else "squaredcos_cap_v2", "")
    autocast = contextlib.nullcontext() if half else torch.autocast(device.type, torch.bfloat16, enabled="bf16" in arguments.precision)

    def step():
        t, noise = torch.randint(0, 1000, (len(image),), device=device), torch.randn_like(image)
        x = diffusion.q_sample(image, t, noise=noise)
        with autocast:
            eps = model(x, t, **given)[:, :3]
        loss = nn.functional.mse_loss(eps.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(average, model.parameters()):
                mean.mul_(0.9999).add_(p, alpha=0.0001)

    return step


def train(arguments, device, rate) -> None:
    """One update of each model."""
    mine, theirs = build(arguments, device, train=True)
    batch, side, config = arguments.batch_size, arguments.size, mine.config
    image = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    arguments.given = inputs_for(config, arguments, device, batch)
    millions = sum(p.numel() for p in mine.parameters()) / 1e6
    print(f"training: {millions:.0f} M weights, {config.residual_blocks} residual blocks per level, {config.text_layers} layers of text, batch {batch}")
    flops = 3 * flops_of(config, side) * batch
    ours = our_step(mine.train(), arguments, device, image)
    compare("training step", ours, their_step(theirs.train(), arguments, device, image) if theirs else None, arguments, device, flops, rate)
    if theirs is not None and device.type == "cuda":
        half = their_step(copy.deepcopy(theirs), arguments, device, image, half=True)
        compare("against its fp16 path", ours, half, arguments, device, flops, rate)


def memory(arguments, device, rate) -> None:
    """Peak memory of an update on a GPU, with and without checkpointing."""
    if device.type != "cuda":
        print("memory: measured on a GPU only; the test of activation checkpointing counts bytes on any machine")
        return
    image = torch.rand(arguments.batch_size, 3, arguments.size, arguments.size, device=device) * 2 - 1
    for checkpointing in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        step = our_step(build(arguments, device, train=True, checkpointing=checkpointing)[0].train(), arguments, device, image)
        step()
        torch.cuda.reset_peak_memory_stats()
        print(f"update with{'' if checkpointing else 'out'} checkpointing: {seconds(step, device):.3f} s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        del step


def their_sample(model, arguments, device, given, guidance, dtype):
    """As in the original's notebooks: both branches in one batch, text cached, DDIM."""
    diffusion = create_gaussian_diffusion(1000, "linear" if "low_res" in given else "squaredcos_cap_v2", arguments.spacing)
    count, side = arguments.batch_size, arguments.size
    doubled = {k: torch.cat([v, v]) for k, v in given.items()} if guidance != 1 else dict(given)
    if guidance != 1:
        doubled["mask"] = torch.cat([given["mask"], torch.zeros_like(given["mask"])])
    model.cache_text_emb = True

    def guided(x, t, **kwargs):
        if guidance == 1:
            return model(x, t, **kwargs)
        first = x[: len(x) // 2]
        answer = model(torch.cat([first, first]), t, **kwargs)
        eps, rest = answer[:, :3], answer[:, 3:]
        given_text, without = eps.chunk(2)
        eps = without + guidance * (given_text - without)
        return torch.cat([torch.cat([eps, eps]), rest], 1)

    def draw():
        model.del_cache()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            diffusion.ddim_sample_loop(guided, (len(doubled["mask"]), 3, side, side), device=device, clip_denoised=True, model_kwargs=doubled)[:count]
        model.del_cache()

    return draw


def draw_samples(arguments, device, rate) -> None:
    """One guided sample of each model."""
    mine, theirs = build(arguments, device)
    config, count, side = mine.config, arguments.batch_size, arguments.size
    given, guidance = inputs_for(config, arguments, device, count), 1.0 if config.super_resolution else 3.0
    empty = {"tokens": torch.zeros_like(given["tokens"][:1]), "mask": torch.zeros_like(given["mask"][:1])}
    diffusion = Diffusion("linear" if config.super_resolution else "squared_cosine", "eps")
    mine.eval()
    if theirs is not None:
        theirs.eval()

    def ours(dtype):
        def draw():
            sample(mine, diffusion, given, seeds=range(count), shape=(3, side, side), sampler="ddim", spacing=arguments.spacing, guidance=guidance,
                   unconditional=empty, clamp=1.0, temperature=0.997 if config.super_resolution else 1.0, autocast=dtype)

        return draw

    steps = len(spaced_times(arguments.spacing))
    branches = 1 if guidance == 1 else 2
    flops = (flops_of(config, side, text=False) * steps + (flops_of(config, side) - flops_of(config, side, text=False))) * branches * count
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        if name in arguments.precision:
            other = their_sample(theirs, arguments, device, given, guidance, dtype) if theirs else None
            compare(f"{steps}-step sample {name}", ours(dtype), other, arguments, device, flops, rate)
    if theirs and device.type == "cpu" and {"fp32", "bf16"} <= set(arguments.precision.split(",")):
        other = their_sample(theirs, arguments, device, given, guidance, None)
        compare("bf16 against its fp32", ours(torch.bfloat16), other, arguments, device, flops, rate)


PARTS = {"forward": forward, "train": train, "sample": draw_samples, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="base", choices=sorted(TASKS))
    parser.add_argument("--parts", default="forward,train,sample", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=5, help="turns that are timed, after one for warming up")
    parser.add_argument("--batch-size", type=int, default=2, help="images of a forward pass or update; pictures of a sample")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--precision", default="fp32,bf16", help="of forward and sample; training takes bf16 where it is named")
    parser.add_argument("--spacing", default="fast27", help="timesteps of the sample, e.g. 2,1 for a short one")
    parser.add_argument("--channels", type=int, help="of the first level (192)")
    parser.add_argument("--blocks", type=int, help="residual blocks per level (3, or 2 for the upsamplers)")
    parser.add_argument("--text-layers", type=int, help="layers of the text tower (16)")
    parser.add_argument("--whole", action="store_true", help="train the whole model, not the shallow one")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine, with --threads 1: time of the processor, not of the clock")
    parser.add_argument("--compile", action="store_true", help="difflit's model by torch.compile")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device()
    if device.type == "cpu":
        keep_freed_memory()  # for both: it belongs to the process
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=torch.bfloat16).unbind()
    rate = 2 * 2048**3 / min(processor_seconds(lambda: a @ b, device) for _ in range(8)) if arguments.processor_time else matrix_rate(device)
    if create_model is None:
        print("glide_text2im is not importable: difflit is measured alone")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{arguments.variant}, {arguments.size} px, batch {arguments.batch_size}, {where}; bf16 matrix products {rate / 1e9:.0f} GFLOP/s")
    for part in arguments.parts.split(","):
        PARTS[part](arguments, device, rate)
        gc.collect()


if __name__ == "__main__":
    main()
