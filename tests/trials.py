"""A stand-in for a training run: `python trials.py SECONDS RUN SETTINGS` writes what a run writes, goes on where it was, and obeys `stop.now`."""

import json
import math
import os
import re
import socket
import sys
import time
from pathlib import Path

STEPS = 10


def main():
    seconds, run, text = float(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_text()
    given = {name: float(value) for name, value in re.findall(r"(lr|batch_size): ([-+.e0-9]+)", text)}
    loss = abs(math.log10(given["lr"]) + 3) + abs(math.log2(given["batch_size"]) - 5) / 4
    begun = json.loads((run / "status.json").read_text())["step"] if (run / "status.json").exists() else 0
    with open(run / "starts", "a") as f:
        f.write(f"{begun}\n")

    def tell(state, step, reason=None):
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        told = {"host": socket.gethostname(), "pid": os.getpid(), "state": state, "step": step, "steps": STEPS, "heartbeat": time.time(), "reason": reason}
        (run / ".status").write_text(json.dumps({**told, "started": now, **({} if state == "running" else {"ended": now})}))
        os.replace(run / ".status", run / "status.json")

    for step in range(begun, STEPS + 1):
        (run / ".metrics").write_text("".join(["step,val_loss\n", *(f"{i},{loss + 1 / i}\n" for i in range(1, step + 1))]))
        os.replace(run / ".metrics", run / "metrics.csv")
        tell("running", step)
        if (run / "stop.now").exists():
            why = (run / "stop.now").read_text()
            return tell("pruned" if why.startswith("pruned") else "preempted", step, why)
        time.sleep(seconds)
    (run / "scores.json").write_text(json.dumps({"alignment.colour": {"value": 1 / (1 + loss), "low": 0, "high": 1, "n": 8, "protocol": "none"}}))
    tell("done", STEPS)


if __name__ == "__main__":
    main()
