"""JupyterLab as a person drives it: a real server, system Chromium, one click after the other."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, TINY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
pytest.importorskip("jupyterlab")
sync_api = pytest.importorskip("playwright.sync_api")


def with_parameters(name, folder, **settings):
    """A copy of a run notebook whose parameters cell says more, as a person edits it."""
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = [*cell["source"], *(f"\n{key} = {value!r}" for key, value in settings.items())]
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server of its own: folder, settings, token, port."""
    base = tmp_path_factory.mktemp("lab")
    folder, port, token = base / "work", free_port(), secrets.token_hex(16)
    folder.mkdir()
    tracker = base / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # a cell that cannot be seen is otherwise taken off the page, and its text stands still
    own = {f"JUPYTER_{kind}_DIR": str(base / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(base / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces"), "IPYTHONDIR": str(base / "ipython")}
    env = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("MPLBACKEND", None)  # the kernel's own, as a person has it
    words = ["--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
             f"--ServerApp.root_dir={folder}", "--ServerApp.allow_root=True", "--LabApp.news_url=",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(base / "lab.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (base / "lab.log").read_text()[-2000:]
                time.sleep(0.2)
        yield url, token, folder
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(lab):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(180_000)
        yield page
        browser.close()


def open_notebook(page, lab, name):
    url, token, _ = lab
    page.goto(f"{url}/lab/tree/{name}.ipynb?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector(".jp-Toolbar-kernelName:has-text('Python 3')")  # before that, Run asks which kernel is meant
    page.wait_for_selector("#jp-main-statusbar :text('| Idle')")


def run_all(page):
    page.click("li.lm-MenuBar-item:has-text('Run')")
    page.click(".lm-Menu-item:has-text('Run All Cells')")


def cell(page, text):
    """The cell whose source holds a text; it is rendered only where it can be seen."""
    found = page.locator(".jp-CodeCell", has=page.locator(".jp-InputArea-editor", has_text=text)).first
    found.scroll_into_view_if_needed()
    return found


def wait_for(page, condition, what, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        page.wait_for_timeout(300)  # and not time.sleep, which would let the browser's messages lie
    wrong = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
    raise AssertionError(f"waited {seconds} s in vain for {what}; the page says: {wrong or page.inner_text('body')[-1500:]}")


def status(path):
    try:
        return json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def test_training_is_watched_in_place_and_an_interrupt_saves(lab, page):
    """The line and the curves change where they stand; the stop button leaves a checkpoint and the state `preempted`."""
    folder = lab[2]
    run = folder / "run"
    small = {**TINY, "preset": "digits", "steps": 100_000, "limit": 64, "batch_size": 2, "score_images": 0, "trackers": "none", "validate_every_steps": 50_000,
             "sample_every_steps": 50_000, "checkpoint_every_steps": 50_000}
    with_parameters("train", folder, **small, run_dir=str(run))
    open_notebook(page, lab, "train")
    run_all(page)
    wait_for(page, lambda: status(run).get("state") == "running", "the run")
    training = cell(page, "train_job(job)")
    training.locator(".jp-OutputArea-output img").wait_for()
    outputs = training.locator(".jp-OutputArea-child")

    def line():
        return training.locator(".jp-OutputArea-output pre").first.inner_text()

    def picture():
        return training.locator(".jp-OutputArea-output img").first.get_attribute("src")

    first, curves = line(), picture()
    assert outputs.count() == 2, "a line of progress and a figure"
    wait_for(page, lambda: line() != first, "progress")
    wait_for(page, lambda: picture() != curves, "other curves")
    assert outputs.count() == 2, "nothing is added below"
    assert line().count("\n") == 0 and "/100000" in line()
    height = training.locator(".jp-OutputArea").first.bounding_box()["height"]
    second = line()
    wait_for(page, lambda: line() != second, "more progress")
    assert training.locator(".jp-OutputArea").first.bounding_box()["height"] == pytest.approx(height, abs=2)

    page.keyboard.press("Escape")
    page.click("li.lm-MenuBar-item:has-text('Kernel')")
    page.click(".lm-Menu-item:has-text('Interrupt Kernel')")
    wait_for(page, lambda: status(run).get("state") == "preempted", "the state preempted")
    assert "interrupted" in status(run)["reason"]
    kept = sorted((run / "checkpoints").glob("step-*"))
    assert kept and int(kept[-1].name[5:]) == status(run)["step"], "the last checkpoint is where it stopped"
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", state="attached")
    assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count(), "no traceback"


@pytest.mark.slow
def test_a_slider_of_explore_turns_the_page(lab, page):
    folder = lab[2]
    few = {"steps": 8, "limit": 48, "sampler_steps": 2, "samples": 4, "pictures": 8, "samplers": "euler", "guidances": "1", "precision": "fp32"}
    with_parameters("explore", folder, **few, run_dir=str(folder / "look"))
    open_notebook(page, lab, "explore")
    run_all(page)
    wait_for(page, lambda: status(folder / "look").get("state") == "done", "the end of the notebook", 900)
    for text, name in (("partial(page_figure", "page"), ("partial(noised_figure", "picture"), ("show(attention", "step")):
        looked = cell(page, text)
        looked.locator(".widget-image").wait_for()
        before = looked.locator("img.widget-image").get_attribute("src")
        if name == "step":  # words among its values: a list
            looked.locator(".widget-dropdown:has-text('step') select").select_option("1")
        else:
            slider = looked.locator(f".widget-inline-hbox:has-text('{name}') .noUi-handle").first
            slider.focus()
            slider.press("ArrowRight")
        wait_for(page, lambda: looked.locator("img.widget-image").get_attribute("src") != before, f"another picture of {text}")  # noqa: B023
        assert looked.locator("img.widget-image").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_config", "40_diffusion"])
def test_a_numbered_notebook_runs_from_top_to_bottom(lab, page, name):
    folder = lab[2]
    text = (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    notebook["cells"] = [c for c in notebook["cells"] if not re.search(r"^#\|\s*(eval: false|slow|cuda)", "".join(c["source"]), re.M)]
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    open_notebook(page, lab, name)
    page.click("li.lm-MenuBar-item:has-text('Kernel')")
    page.click(".lm-Menu-item:has-text('Restart Kernel and Run All Cells')")
    page.click(".jp-Dialog button:has-text('Restart')")

    def saved():
        page.keyboard.press("Control+s")
        try:
            found = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))
        except ValueError:  # it is being written
            return False
        cells = [c for c in found["cells"] if c["cell_type"] == "code" and c["source"]]
        wrong = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not wrong, "\n".join(wrong[0]["traceback"])[-2000:]
        return all(c["execution_count"] for c in cells)

    wait_for(page, saved, "the last cell")


def test_a_server_without_its_token_answers_nobody(lab):
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{lab[0]}/api/kernels", timeout=20)
    assert not Path(lab[2], ".jupyter").exists()
