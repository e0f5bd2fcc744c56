"""One training step of the tiny GLIDE, as difflit trains it against the same step written plainly.

Both have the same network, batch, loss and optimizer. *Plain* is how a first script does it: fp32, contiguous memory, an optimizer that loops over tensors, an
average over a state dict. The two take turns in one process, so that a busy machine slows both. Prints the ratio of medians with its spread over pairs,
images per second, and the share of this machine's measured rate of bf16 matrix products.

    python tests/bench/train_step.py [--pairs 9] [--batch-size 64]
"""

import argparse
import statistics
import time

import torch
from accelerate import Accelerator

from difflit.diffusion import Diffusion
from difflit.glide import create_glide, keep_freed_memory
from difflit.models import count_parameters, flops_per_image
from difflit.precision import Precision, choose_device, choose_precision
from difflit.tasks import TextToImage
from difflit.averaging import EMA
from difflit.optimizers import make_optimizer
from difflit.training import TrainState, forward_backward, seed_step, to_device, update_weights


def make_batch(size, vocabulary, context):
    """Random images and tokens: the cost of a step does not depend on what they show."""
    tokens = torch.randint(0, vocabulary, (size, context))
    return {"image": torch.rand(size, 3, 32, 32) * 2 - 1, "position": torch.arange(size), "tokens": tokens, "mask": torch.ones(size, context).bool()}


def ours(batch, device):
    """difflit's own step, everything of it but the loader and the tracker."""
    model = create_glide("tiny").to(device)
    state = TrainState(model, EMA(model, 0.99), make_optimizer(model, 1e-4), Accelerator(cpu=device.type == "cpu"), choose_precision("auto", device))
    task, batch = TextToImage(Diffusion("flow", "flow", time_sampling="logit_normal")), to_device(batch, device)

    def step():
        seed_step(0, state.step + 1)
        forward_backward(state, task, batch, 1)
        update_weights(state, 1e-4, 1.0)

    return step, model


def plain(batch, device):
    """The same mathematics written down without thought for the machine."""
    model = create_glide("tiny").to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    batch = {k: v.to(device) for k, v in batch.items()}

    def step():
        image = batch["image"]
        t = torch.sigmoid(torch.randn(len(image), device=device))
        noise, wide = torch.randn_like(image), t.reshape(-1, 1, 1, 1)
        answer = model((1 - wide) * image + wide * noise, t * 1000, tokens=batch["tokens"], mask=batch["mask"])
        loss = torch.nn.functional.mse_loss(answer, noise - image)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].mul_(0.99).add_(v, alpha=0.01)

    return step


def seconds(step, device):
    """Wall time of one call, the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device, side=2048, tries=8):
    """FLOP/s of bf16 matrix products on this device: the best of several."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(tries))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = choose_device()
    config = create_glide("tiny").config
    batch = make_batch(arguments.batch_size, config.vocabulary, config.text_context)
    if device.type == "cpu":
        keep_freed_memory()  # for both: it belongs to the process
    (fast, model), slow = ours(batch, device), plain(batch, device)
    for step in (fast, slow) * 3:  # warm-up
        step()
    pairs = [(seconds(fast, device), seconds(slow, device)) for _ in range(arguments.pairs)]
    ratios = sorted(b / a for a, b in pairs)
    mine = statistics.median(a for a, _ in pairs)
    flops = 3 * flops_per_image(model, config.image_size, config.text_context) * arguments.batch_size
    rate, counts = matrix_rate(device), count_parameters(model)
    precision: Precision = choose_precision("auto", device)
    millions = (counts["total"] - counts["embeddings"]) / 1e6
    print(f"tiny GLIDE, {millions:.2f} M parameters besides embeddings, batch {arguments.batch_size}, {precision.name}, {device}")
    print(f"difflit {1000 * mine:.0f} ms, plain {1000 * statistics.median(b for _, b in pairs):.0f} ms a step (medians of {len(pairs)} pairs)")
    print(f"ratio plain/difflit: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
    print(f"{arguments.batch_size / mine:.0f} images/s, {flops / 1e9:.0f} GFLOP a step = {flops / mine / 1e9:.0f} GFLOP/s")
    print(f"share of the measured bf16 matrix rate ({rate / 1e9:.0f} GFLOP/s): {flops / mine / rate:.1%}")


if __name__ == "__main__":
    main()
