"""How long a save keeps the trainer: difflit's checkpoint against accelerate's `save_state`.

Both save the same network with AdamW's two moments; difflit saves an average of the weights as well (--no-ema: not), which accelerate's call does not
know, so that difflit writes a third more. accelerate writes safetensors for the weights and pickle for the rest, and returns when the files are with the
system; it neither hashes nor waits for the disk. difflit returns when its copy is made; its thread then hashes, writes, waits for the disk, and renames.
They take turns, and the writer is waited for before the other's turn. Then steps are timed with and without a write under way.

Measured with --width 1280 --rounds 5 --steps 6 (26.2 M parameters) on two cores under a load of three to ten by other processes, which makes all times long and
spreads them; median of the rounds' ratios (lowest…highest). One torch thread: 0.17 (0.14…0.23), --convolutions 0.14 (0.09…0.33). Two threads: 0.24 (0.15…0.64),
--convolutions 0.21 (0.12…0.26), --no-ema, where both save the same, 0.21 (0.13…0.30). Before each tensor was copied as it lies and by one thread, two threads
gave 0.52 (0.33…0.94) with --width 1024. How much a step slows while the thread writes was measured before only, with one thread: 1.47 (1.44…1.81).

    python tests/bench/checkpoint.py [--width 1792] [--rounds 7] [--steps 12] [--no-ema] [--convolutions] [--folder /tmp/somewhere]
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from difflit.checkpoints import CheckpointWriter, Retention, pack_optimizer


def spread(values, digits=1):
    """Median (lowest…highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}…{max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-ema", action="store_true")
    parser.add_argument("--convolutions", action="store_true", help="3 × 3 in channels_last, of about as many parameters, in place of linear layers")
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    torch.manual_seed(0)
    accelerator = Accelerator()
    device, width = accelerator.device, arguments.width
    if arguments.convolutions:
        width = round(width * 2 / 3)
        plain = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))).to(memory_format=torch.channels_last)
        batch = torch.randn(1, width, 8, 8, device=device).to(memory_format=torch.channels_last)
    else:
        plain = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))))
        batch = torch.randn(256, width, device=device)
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True))
    average = {name: value.detach().clone() for name, value in plain.state_dict().items()}

    def step():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        torch._foreach_lerp_(list(average.values()), list(plain.state_dict().values()), 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    writer = CheckpointWriter(folder / "ours", Retention(last=1))
    count = iter(range(1, 10**6))

    def ours():
        tensors, rest = pack_optimizer(optimizer.optimizer)
        writer.save(next(count), {"model": plain.state_dict(), "optimizer": tensors, **({} if arguments.no_ema else {"ema": average})}, {"optimizer": rest})

    def theirs():
        accelerator.save_state(str(folder / "theirs"), safe_serialization=True)

    for _ in range(3):
        step()
    first = timed(ours)
    writer.wait()
    theirs()
    rows = []
    for _ in range(arguments.rounds):
        step()
        stall = timed(ours)
        writer.wait()
        step()
        rows.append((stall, timed(theirs), writer.write_seconds, writer.written_bytes))
    parameters = sum(p.numel() for p in plain.parameters())
    size = sum(p.stat().st_size for p in (folder / "theirs").rglob("*") if p.is_file())
    print(f"{parameters / 1e6:.1f} M parameters, AdamW, fp32, {device}, {torch.get_num_threads()} threads")
    print(f"a checkpoint is {rows[0][3] / 1e9:.2f} GB here, {size / 1e9:.2f} GB there")
    print(f"stall in ms: difflit {spread([1000 * a for a, *_ in rows])}, the first one, with fresh memory, {1000 * first:.0f}")
    print(f"             save_state {spread([1000 * b for _, b, *_ in rows])}")
    print(f"ratio difflit/save_state: {spread([a / b for a, b, *_ in rows], 3)}")
    print(f"the thread writes {spread([n / s / 1e6 for *_, s, n in rows], 0)} MB/s, hash and disk included")

    slow = []
    for _ in range(arguments.rounds):
        quiet = statistics.median([timed(step) for _ in range(arguments.steps)])
        ours()
        busy = []
        while writer.busy:
            busy.append(timed(step))
        writer.wait()
        slow.append(statistics.median(busy or [quiet]) / quiet)
    print(f"a step while the thread writes takes {spread(slow, 2)} times as long")
    writer.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
