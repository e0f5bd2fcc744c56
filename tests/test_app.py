"""The page in a browser: headless Chromium draws, stops, paints, reloads, errs and trespasses, as users do."""

import http.client
import io
import json
import shlex
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from studios import save_enlarger, save_judge, save_run, save_runs
from typer.testing import CliRunner

from difflit.albums import read_picture
from difflit.app import Desk
from difflit.cli import app
from difflit.config import SettingsError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
gradio = pytest.importorskip("gradio", reason="the page is an extra: pip install difflit[app]")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PATIENCE = 60_000  # milliseconds; a busy machine is slow


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    from difflit.studio import Studio

    root = save_runs(tmp_path_factory.mktemp("app") / "runs")
    made = Studio(root, device="cpu", precision="fp32", enlargers=[str(save_enlarger(root.parent / "x2"))], **save_judge(root.parent, "app-judge"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(studio):
    from difflit.app import serve

    served = serve(studio, block=False)
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def user(browser, page):
    "Opens windows, each of a user of his own, and watches that none of them talks to anybody else."
    contexts, outside, complaints = [], [], []

    def open_window(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        contexts[-1].set_default_timeout(PATIENCE)
        window = contexts[-1].new_page()
        window.on("request", lambda request: None if request.url.startswith((page.local_url, "data:", "blob:")) else outside.append(request.url))
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.goto(page.local_url)
        window.wait_for_selector("#draw")
        window.wait_for_timeout(300)
        return window

    yield open_window
    for context in contexts:
        context.close()
    assert not outside, f"the page asked for {outside}"
    assert not complaints


def ask(window, prompt="a red circle", count=1, steps=None, more=None):
    "Fill in the form and press Draw."
    window.fill("#prompt textarea", prompt)
    window.fill("#count input[type=number]", str(count))
    if steps:
        place = "#steps textarea, #steps input"
        if not window.is_visible(place):
            window.click("#sampling > button")
        window.fill(place, str(steps))
    window.click("#draw")


def told(window, text):
    "Wait until the page says so."
    try:
        window.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text, timeout=PATIENCE)
    except sync_api.TimeoutError:
        pytest.fail(f"the page says {window.inner_text('#status')!r} instead of {text!r}")


def cancel(window, monkeypatch):
    "Press Cancel, and know that the server has heard of it."
    heard, hear = threading.Event(), Desk.cancel
    with monkeypatch.context() as patched:
        patched.setattr(Desk, "cancel", lambda desk, session: (hear(desk, session), heard.set()))
        window.click("#cancel")
        for _ in range(PATIENCE // 100):
            if heard.is_set():
                return
            window.wait_for_timeout(100)
    pytest.fail("the page never asked for an end")


def newest(studio):
    "The pictures of the last request."
    rooms = sorted((room for room in studio.folder.iterdir() if any(room.glob("0*.png"))), key=lambda room: room.stat().st_mtime_ns)
    return sorted(rooms[-1].glob("0*.png"))


def test_draws_and_says_what_made_the_pictures(user, studio, tmp_path):
    window = user()
    ask(window, count=4)
    told(window, "shapes")
    window.wait_for_selector("#first img")
    assert window.locator("#first .thumbnail-item img").count() == 4
    command = window.inner_text("#command .cm-content")
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for path in newest(studio):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    window.click("#mine .thumbnail-item >> nth=0")
    window.wait_for_selector("#behind .cm-content")
    assert '"seed": 0' in window.inner_text("#behind .cm-content") and "difflit sample" in window.inner_text("#again .cm-content")
    (tmp_path / "shown.png").write_bytes(urllib.request.urlopen(window.get_attribute("#first img", "src")).read())
    assert read_picture(tmp_path / "shown.png")["prompt"] == "a red circle", "the file that a user saves says what made it"


def test_two_users_wait_for_each_other_and_cancel_stops(user, studio, monkeypatch):
    first, second = user(), user()
    ask(first, count=16, steps=500)
    first.wait_for_selector("#previews img")
    ask(second)
    told(second, "1 request is before yours")
    cancel(first, monkeypatch)
    told(first, "Cancelled")
    told(second, "done")
    second.wait_for_selector("#mine img")
    assert first.locator("#first img").count() == 0
    assert first.locator("#mine img").count() == 0 and second.locator("#mine img").count() == 1, "a gallery is its user's own"
    ask(first, steps=3)
    told(first, "done")


@pytest.mark.slow
def test_a_closed_window_stops_its_drawing(user, studio):
    window = user()
    ask(window, count=16, steps=500)
    window.wait_for_selector("#previews img")
    window.close()
    begun = time.monotonic()
    while len(studio.line) and time.monotonic() - begun < 30:
        time.sleep(0.05)
    assert len(studio.line) == 0


@pytest.mark.slow
def test_side_by_side(user, studio):
    window = user()
    window.click("#stages > button")
    window.click("#against input")
    window.get_by_role("option", name="shapes-a, step 10").click()
    ask(window, count=2)
    window.wait_for_selector("#second img")
    assert window.locator("#first .thumbnail-item img").count() == window.locator("#second .thumbnail-item img").count() == 2
    assert "step 10: seed 0" in window.inner_text("#second")


def test_cancel_while_a_model_is_loaded(user, studio, monkeypatch):
    "The page says so at once and can be used again, although the disk still hangs."
    studio.shelf._kept.clear()  # whichever model earlier tests drew with
    ready, read = threading.Event(), studio.shelf._load
    monkeypatch.setattr(studio.shelf, "_load", lambda path, device: ready.wait(60) and read(path, device))
    try:
        window = user()
        window.click("#model input")
        window.get_by_role("option", name="shapes-b").click()
        ask(window)
        told(window, "Loading shapes-b")
        cancel(window, monkeypatch)
        begun = time.monotonic()
        told(window, "Cancelled")
        assert time.monotonic() - begun < 10 and not ready.is_set()
        window.wait_for_selector("#draw:not([disabled])")
        assert len(studio.line) == 0
    finally:
        ready.set()
    ask(window)
    told(window, "shapes-b: done")


def test_the_best_of_some_enlarged(user, studio):
    "Reranking and a third stage, chosen in the page: what is shown is the best first, twice as large."
    window = user()
    window.click("#stages > button")
    window.fill("#candidates textarea, #candidates input", "6")
    window.click("#factor input")
    window.get_by_role("option", name="2 times").click()
    ask(window, count=2)
    told(window, "done")
    window.wait_for_selector("#first img")
    assert window.locator("#first .thumbnail-item img").count() == 2
    room = max(studio.folder.iterdir(), key=lambda room: room.stat().st_mtime_ns)
    record = json.loads((room / "metadata.json").read_text())
    says = [read_picture(room / f"image_rank_{rank:03d}.png") for rank in (1, 2)]
    assert len(record["scores"]) == 6 and says[0]["score"] == max(record["scores"]) and says[0]["score"] >= says[1]["score"]
    assert says[0]["factor"] == 2 and Image.open(room / "image_rank_001.png").size == (32, 32)
    captions = window.inner_text("#first")
    assert all(f"seed {each['seed']}, score {each['score']:.3f}" in captions for each in says)
    command = window.inner_text("#command .cm-content")
    assert all(words in command for words in ("--candidates 6 --top 2", "--factor 2", "--enlarger"))


def test_fills_in_what_is_painted(user, studio):
    window = user()
    window.click("#filling > button")
    buffer = io.BytesIO()
    Image.new("RGB", (200, 200), (0, 0, 255)).save(buffer, "PNG")
    window.wait_for_selector("#editor canvas")
    window.wait_for_timeout(3000)
    window.set_input_files("#editor input[type=file]", {"name": "blue.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    window.wait_for_timeout(2000)
    window.locator("#editor canvas").first.scroll_into_view_if_needed()
    box = window.locator("#editor canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    window.mouse.move(*middle)
    window.mouse.down()
    window.mouse.move(middle[0] + 40, middle[1] + 5, steps=4)
    window.mouse.up()
    window.wait_for_timeout(500)
    ask(window)
    told(window, "done")
    path = newest(studio)[0]
    says = read_picture(path)
    mask = np.array(Image.open(says["mask"]["file"]))
    picture = np.array(Image.open(path))
    assert 0 < (mask == 0).mean() < 0.5, "a part is painted"
    blue = (picture == (0, 0, 255)).all(-1)
    assert blue.mean() > 0.5 and not blue.all(), "what was not painted is kept, what was is drawn"


def test_bad_input_is_told_and_the_server_lives(user):
    window = user()
    for prompt, steps, message in (("  ", None, "the prompt is empty"), ("x" * 1001, None, "at most 1,000"), ("a red circle", 100000, "equal to 500")):
        ask(window, prompt, steps=steps)
        told(window, message)
        assert window.locator("#status .error").count() == 1
    ask(window, steps=2)
    told(window, "done")


def test_reload_keeps_the_gallery(user):
    window = user()
    ask(window, count=2)
    window.wait_for_selector("#mine img")
    window.reload()
    window.wait_for_selector("#mine img")
    assert window.locator("#mine .thumbnail-item img").count() == 2
    ask(window)
    told(window, "done")


@pytest.mark.slow
def test_runs_are_shown_and_new_models_are_found(user, studio):
    window = user()
    save_run(studio.root / "fresh", seed=4, steps=(30,))
    window.click("#look")
    window.click("#model input")
    window.get_by_role("option", name="fresh").click()
    ask(window)
    told(window, "fresh: done")
    window.get_by_role("tab", name="Runs").click()
    window.wait_for_selector("#curves img")
    table = window.inner_text("#runs")
    assert "fresh" in table and "upsampler" in table and "lr=0.005" in table


def test_fits_a_telephone(user):
    window = user(390, 844)
    ask(window, count=4)
    window.wait_for_selector("#first img")
    assert window.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out to the right"


def status(page, path, data=None, **headers):
    request = urllib.request.Request(page.local_url.rstrip("/") + path, data, headers)
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "{runs}/shapes-a/settings.yaml",
                                  "{runs}/../runs/shapes-a/status.json", "https://example.com/", "{here}"])
def test_no_file_but_pictures_is_served(page, studio, path):
    assert status(page, f"/gradio_api/file={path.format(runs=studio.root, here=__file__)}") == 403


def test_other_names_oversized_uploads_and_hidden_pages_are_refused(page):
    assert status(page, "/", Host="evil.example") == 421
    connection = http.client.HTTPConnection(page.local_url.split("/")[2], timeout=30)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in (("Content-Type", "multipart/form-data; boundary=x"), ("Content-Length", "12000000")):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413, "refused by its header, before a byte of it is read"
    connection.close()
    assert status(page, "/docs") == status(page, "/openapi.json") == 404
    assert status(page, "/") == 200


def test_a_model_is_only_looked_up_whatever_a_client_sends(page):
    "The request that the page sends, with another name in it."
    config = json.loads(urllib.request.urlopen(page.local_url + "config").read())
    drawing = next(d for d in config["dependencies"] if len(d["inputs"]) > 10)
    named = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    values = {"model": "../../x", "prompt": "a red circle", "count": 1, "seed": 0}
    data = [values.get(named.get(i), "" if named.get(i) in ("negative", "sampler", "spacing", "upsampler", "against") else None) for i in drawing["inputs"]]
    body = json.dumps({"data": data, "fn_index": drawing["id"], "session_hash": "trespasser"}).encode()
    assert status(page, "/gradio_api/queue/join", body, **{"Content-Type": "application/json"}) == 200
    text = ""
    with urllib.request.urlopen(page.local_url + "gradio_api/queue/data?session_hash=trespasser", timeout=60) as stream:
        for line in stream:
            text += line.decode()
            if "process_completed" in text:
                break
    assert "../../x" in text and ("there is no model" in text or "not in the list of choices" in text)
    assert status(page, "/") == 200


def test_elsewhere_needs_a_password(studio, tmp_path, monkeypatch):
    from difflit.app import PASSWORD, read_password, serve

    monkeypatch.delenv(PASSWORD, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(SettingsError, match="needs a password"):
            serve(studio, host=host, password=read_password(), block=False)
    monkeypatch.setenv(PASSWORD, "correct horse")
    served = serve(studio, password=read_password(), block=False)  # on this machine, with a password all the same
    try:
        assert status(served, "/config") == 401 and status(served, "/gradio_api/file=/etc/passwd") == 401
        form = b"username=difflit&password=wrong-horse"
        assert status(served, "/login", form, **{"Content-Type": "application/x-www-form-urlencoded"}) == 400
        form = b"username=difflit&password=correct+horse"
        request = urllib.request.Request(served.local_url + "login", form, {"Content-Type": "application/x-www-form-urlencoded"})
        cookie = urllib.request.urlopen(request).headers["set-cookie"].partition(";")[0]
        assert status(served, "/config", Cookie=cookie) == 200
        assert "correct horse" not in " ".join(sys.argv)
    finally:
        served.close()
