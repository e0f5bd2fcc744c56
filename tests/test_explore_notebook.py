"""The explore notebook under papermill: pictures where sliders would be, nothing of widgets, no error."""

import json
import os
import subprocess
import sys

from conftest import ROOT

FEW = {"data": "emoji", "steps": 4, "limit": 32, "sampler_steps": 2, "samples": 4, "pictures": 8, "samplers": "euler", "guidances": "1, 3", "precision": "fp32"}


def test_a_report_of_pictures(tmp_path):
    words = [word for name, value in {**FEW, "run_dir": tmp_path / "run"}.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(ROOT / "nbs" / "explore.ipynb"), str(tmp_path / "out.ipynb"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["kind"], status["state"]) == ("explore", "done")
    assert json.loads((tmp_path / "run" / "small" / "status.json").read_text())["step"] == 4
    cells = [c for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    outputs = {c["source"] if isinstance(c["source"], str) else "".join(c["source"]): c["outputs"] for c in cells}
    assert "widget-view" not in json.dumps([*outputs.values()])
    for text in ("page_figure, x.train", "statistics_figure(about)", "latents_figure(x.latents)", "channels_figure, x", "schedule_figure(", "noised_figure, x",
                 "show(attention", "samplers_figure(x", "seeds_figure(x", "nearest_figure(x"):
        shown = next(found for source, found in outputs.items() if text in source and "import" not in source)
        assert any("image/png" in o.get("data", {}) for o in shown), f"{text} showed no picture"
        assert not [o for o in shown if o["output_type"] == "error"]
    assert (tmp_path / "out.ipynb").stat().st_size < 1_500_000
