"""One process of a run, alone or one of several: trains what a JSON file asks for, one run after the other, with the trouble that it asks for.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py jobs.json
"""

import json
import os
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import torch

import difflit.recipes
import difflit.training
from difflit.checkpoints import list_checkpoints
from difflit.recipes import prepare, train_job
from difflit.runs import fail, finish, open_run, rank_and_world

RANK = rank_and_world()[0]
FORWARD_BACKWARD, SAVE_PREVIEW = difflit.training.forward_backward, difflit.recipes.save_preview


def wait_for_checkpoint(folder: Path, seconds: float = 60) -> None:
    """Until the folder holds a whole checkpoint: a process that is killed takes with it the one that its thread is writing."""
    deadline = time.monotonic() + seconds
    while not list_checkpoints(folder / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)


def troubled(kind: str, rank: int, step: int, parts: int = 2, folder: Path | None = None):
    """`forward_backward` with an accident in one process at one step; a kill waits until `folder` holds a checkpoint."""

    def attempt(state, task, batch, pieces=1, dump=None):
        if RANK != rank or state.step + 1 != step:
            return FORWARD_BACKWARD(state, task, batch, pieces, dump)
        if kind in ("kill", "stop") and folder:
            wait_for_checkpoint(folder)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "oom" and pieces < parts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB (injected)")
        if kind == "nan":
            batch["image"][0, 0, 0, 0] = float("nan")
        losses = FORWARD_BACKWARD(state, task, batch, pieces, dump)
        if kind == "overflow":
            next(p for p in state.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return losses

    return attempt


def broken_preview(job):
    raise OSError(28, "No space left on device (injected)")


def digest(tensors) -> str:
    """Equal for equal bits."""
    sums = sha256()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        sums.update(name.encode() + whole.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def note(job) -> None:
    """What the tests want to know of this process."""
    state, scaler = job.state, job.state.arithmetic.scaler
    rows = [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "val_loss", "lr", "loss_scale", "micro_batches")} for row in job.tracker.rows]
    known = {"weights": digest(state.model.state_dict()), "averages": {k: digest(v) for k, v in state.averages.tensors().items()}, "step": state.step,
             "parts": state.parts, "stopped": state.stopped, "scale": scaler.state_dict() if scaler else None, "rows": rows, "state": job.run.state,
             "lr": state.optimizer.param_groups[0]["lr"], "watch": job.watch.state_dict() if job.watch else None}
    (job.run.path / f"rank-{RANK}.json").write_text(json.dumps(known))


def go(settings: dict, trouble: dict | None = None, stop_after: int | None = None, broken: bool = False, caught: bool = False) -> None:
    """One run from its settings to its end. An error that all processes meet may be caught, for the next run."""
    difflit.training.forward_backward = troubled(**trouble, folder=Path(settings["run_dir"])) if trouble else FORWARD_BACKWARD
    difflit.recipes.save_preview = broken_preview if broken else SAVE_PREVIEW
    run = open_run(settings)
    try:
        job = prepare(run)
        train_job(job, show=False, stop_after=stop_after)
        note(job)
    except Exception as error:
        fail(run, error)
        if not caught:
            raise
        return
    finish(run, "preempted" if stop_after else "done")


if __name__ == "__main__":
    for wanted in json.loads(Path(sys.argv[1]).read_text()):
        go(**wanted)
