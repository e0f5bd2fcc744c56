"""One process of judging jobs, alone or one of several: runs what a JSON file asks for, one job after the other.

    python -m torch.distributed.run --nproc-per-node 2 tests/judges.py jobs.json
"""

import json
import sys
from pathlib import Path

import difflit.audits
from difflit.config import AuditSettings, EvaluateSettings
from difflit.judging import audit_job, evaluate_job
from difflit.runs import fail, finish, open_run, rank_and_world

KINDS = {"audit": (AuditSettings, audit_job), "evaluate": (EvaluateSettings, evaluate_job)}
QUANTISED = difflit.audits.quantised


def broken(images):
    raise OSError(28, "No space left on device (injected)")


def go(kind: str, settings: dict, fails_in: int | None = None):
    """One job from its settings to its end; in one process it may fail."""
    difflit.audits.quantised = broken if fails_in == rank_and_world()[0] else QUANTISED
    cls, job = KINDS[kind]
    run = open_run(settings, cls=cls, kind=kind)
    try:
        found = job(run)
    except Exception as error:
        fail(run, error)
        raise
    finish(run)
    return found


def note(found, file: Path) -> None:
    """What every process found, with its verdicts where it is an audit."""
    copies = getattr(found, "copies", {})
    seen = {name: [each.value.tolist(), each.index.tolist(), each.copied.tolist()] for name, each in copies.items()}
    more = {name: getattr(found, name) for name in ("compared", "space", "background", "sharpness", "notes") if hasattr(found, name)}
    file.write_text(json.dumps({"scores": found.scores, "copies": seen, **more}))


if __name__ == "__main__":
    for wanted in json.loads(Path(sys.argv[1]).read_text()):
        found = go(**wanted)
        note(found, Path(wanted["settings"]["run_dir"]) / f"rank-{rank_and_world()[0]}.json")
