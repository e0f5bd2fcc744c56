"""Stands in for `bsub` of LSF and `qsub` of PBS Pro and SGE: records its arguments and runs the script in the background, again if the scheduler would.

Called under the name of the command; STANDIN names a folder for its records and is made by `install`, STANDIN_KIND is pbs or sge where the name does not tell.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

AGAIN = {"lsf": 75, "sge": 99, "pbs": None}
TASKS = {"lsf": r'-J ".*\[(\d+)-(\d+)\](?:%(\d+))?"', "sge": r"-t (\d+)-(\d+)", "pbs": r"-J (\d+)-(\d+)(?::\d+)?(?:%(\d+))?"}


def install(folder: Path) -> Path:
    """Commands on a PATH of their own; the folder to put in front."""
    (folder / "bin").mkdir(parents=True)
    for name in ("bsub", "qsub"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
    (folder / "bin" / "qrerun").write_text("#!/bin/sh\necho 'qrerun: Unauthorized Request' >&2; exit 159\n")
    (folder / "bin" / "qacct").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" qacct "$@"\n')
    for path in (folder / "bin").iterdir():
        path.chmod(0o755)
    return folder / "bin"


def surroundings(kind: str, job: str, task: int | None) -> dict[str, str]:
    """What the scheduler tells a job about itself."""
    if kind == "lsf":
        return {"LSB_JOBID": job, "LSB_JOBINDEX": str(task or 0)}
    if kind == "sge":
        return {"JOB_ID": job, "SGE_TASK_ID": "undefined" if task is None else str(task)}
    return {"PBS_JOBID": f"{job}.server"} if task is None else {"PBS_JOBID": f"{job}[{task}].server", "PBS_ARRAY_INDEX": str(task)}


def run(kind: str, folder: Path, job: str, task: int | None, script: Path) -> None:
    """One task, as often as the scheduler begins it."""
    name, codes = job if task is None else f"{job}.{task}", []
    for _ in range(5):
        with open(folder / f"{name}.log", "ab") as log:
            child = subprocess.Popen(["bash", str(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                     env={**os.environ, **surroundings(kind, job, task)})
        (folder / f"{name}.pid").write_text(str(child.pid))
        began = time.time()
        codes.append(child.wait())
        (folder / f"{name}.codes").write_text(json.dumps(codes))
        with open(folder / "times", "a") as times:
            times.write(f"{began} {time.time()}\n")
        if codes[-1] != AGAIN[kind]:
            break
    (folder / f"{name}.over").touch()


def main(command: str, words: list[str]) -> None:
    folder = Path(os.environ["STANDIN"])
    if command == "qacct":
        codes = json.loads((folder / f"{words[1]}.codes").read_text())
        return print(f"jobnumber    {words[1]}\nfailed       0\nexit_status  {codes[-1]}")
    kind = "lsf" if command == "bsub" else os.environ["STANDIN_KIND"]
    text = sys.stdin.read() if kind == "lsf" else Path(words[-1]).read_text()
    job = str(len(list(folder.glob("*.sh"))) + 1)
    (folder / f"{job}.sh").write_text(text)
    (folder / f"{job}.words").write_text(json.dumps(words))
    told = " ".join(words) if "-J" in words else "\n".join(re.findall(r"(?m)^#(?:BSUB|PBS|\$) (.*)", text))
    array = re.search(TASKS[kind], told)
    steps = re.search(r"-J \d+-\d+:(\d+)", told)
    tasks = range(int(array[1]), int(array[2]) + 1, int(steps[1]) if steps else 1) if array else [None]
    limit = re.search(r"-tc (\d+)", told) if kind == "sge" else None
    at_once = int(limit[1]) if limit else int(array[3]) if array and array.lastindex == 3 else len(tasks)
    said = {"lsf": f"Job <{job}> is submitted to default queue <normal>.", "sge": f"{job}.1-4:1" if array else job, "pbs": f"{job}{'[]' * bool(array)}.server"}
    print(said[kind], flush=True)
    if os.fork():
        return
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # a scheduler's jobs ignore nothing, whatever the shell that runs the tests does
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    gate = threading.Semaphore(at_once)

    def one(task):
        with gate:
            run(kind, folder, job, task, folder / f"{job}.sh")

    threads = [threading.Thread(target=one, args=(task,)) for task in tasks]
    [thread.start() for thread in threads], [thread.join() for thread in threads]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
