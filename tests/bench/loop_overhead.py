"""What the loop costs beside the network: everything that watches, checks, averages and records, against the bare loop.

    python tests/bench/loop_overhead.py [--pairs 9] [--steps 10] [--precision bf16]

Both train the default model (2.26 M weights, 32 px) on the same batches from memory with the same optimizer. The bare loop is forward, backward, clip,
step. The other is `train` as a run calls it: keyed seeds, finite checks, averages, loss by time, gradient norms by part, attention's gradients, CSV and
TensorBoard, hooks, an open ear for signals. The two take turns of some steps each in one process; the figure is the ratio of their times, pair by pair.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from difflit.recipes import _make_state, job_hooks, make_loader, prepare
from difflit.runs import finish, open_run
from difflit.training import to_device, train


def bare(state, task, batches, steps, lr):
    """The loop without anything: what a tutorial shows."""
    network, optimizer = state.network.train(), state.optimizer
    for batch in islice(batches, steps):
        with state.precision.autocast():
            loss = task.loss(network, to_device(batch, state.precision.device)).loss.mean()
        if state.arithmetic.scaler:
            scaler = state.arithmetic.scaler
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step() if not state.arithmetic.scaler else (scaler.step(optimizer), scaler.update())
        optimizer.zero_grad(set_to_none=True)
    if state.precision.device.type == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="turns of each")
    parser.add_argument("--steps", type=int, default=10, help="updates in a turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    chosen = parser.parse_args()
    total = (chosen.pairs + 1) * chosen.steps
    folder = Path(tempfile.mkdtemp())
    never = {f"{what}_every_steps": 10**6 for what in ("checkpoint", "sample", "validate")}
    run = open_run({"run_dir": str(folder / "run"), "steps": total, "batch_size": chosen.batch_size, "precision": chosen.precision, "limit": 2048,
                    "lr_schedule": "constant", **never})
    job = prepare(run)
    with make_loader(run, job.data.train, job.tokenizer, job.state) as loader:
        batches = list(islice(loader, 8))
    plain = _make_state(run.settings, copy.deepcopy(job.state.model))
    hooks = [hook for hook in job_hooks(job) if hook.every_steps < 10**6]
    both = {"bare": [], "difflit": []}
    for turn in range(chosen.pairs + 1):
        for name in ("bare", "difflit") if turn % 2 else ("difflit", "bare"):
            began = time.perf_counter()
            if name == "bare":
                bare(plain, job.task, cycle(batches), chosen.steps, run.settings.lr)
            else:
                train(job.state, job.task, cycle(batches), steps=total + 1, batch_size=chosen.batch_size, lr=run.settings.lr, tracker=job.tracker,
                      hooks=hooks, stopper=job.stopper, stop_after=job.state.step + chosen.steps, bins_every_steps=10)
            if turn:  # the first turn of each warms up
                both[name].append(time.perf_counter() - began)
    ratios = [ours / theirs for ours, theirs in zip(both["difflit"], both["bare"])]
    middle = statistics.median(both["bare"]) / chosen.steps
    print(f"{chosen.precision} on {job.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {chosen.batch_size}: "
          f"bare step {middle * 1e3:.1f} ms; difflit's over it "
          f"{statistics.median(ratios):.3f} ({min(ratios):.3f}…{max(ratios):.3f}), {len(ratios)} pairs of {chosen.steps} steps")
    finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
