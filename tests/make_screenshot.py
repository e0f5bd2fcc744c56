"""Take the picture of the page that the README shows.

    python tests/make_screenshot.py RUNS                       # writes nbs/images/app.png
    python tests/make_screenshot.py RUNS --out page.png --width 390 --prompt "two white stars"

RUNS is a folder with a trained run; the README's picture is of `difflit train -p preset=emoji -p limit=64 -p steps=1000 -p run_dir=runs/emoji`, a network
that knows its 64 emoji by heart, and of --prompt "black heart suit". It takes a Chromium on the machine and no network.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from difflit.app import serve
from difflit.files import atomic_write
from difflit.studio import Studio


def screenshot(runs: str, prompt: str, width: int, height: int) -> Image.Image:
    "The page after drawing a prompt."
    studio = Studio(runs, device="cpu", precision="fp32")
    page = serve(studio, block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"])
            window = browser.new_page(viewport={"width": width, "height": height})
            window.set_default_timeout(600_000)
            window.goto(page.local_url)
            window.wait_for_selector("#draw")
            window.wait_for_timeout(2000)
            window.fill("#prompt textarea", prompt)
            window.click("#draw")
            window.wait_for_selector("#mine img")
            window.mouse.move(0, 0)
            window.wait_for_timeout(1500)
            return Image.open(io.BytesIO(window.screenshot(full_page=width < 600)))
    finally:
        page.close()
        studio.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("--prompt", default="a red circle on a white background")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=880)
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "nbs" / "images" / "app.png"))
    arguments = parser.parse_args()
    buffer = io.BytesIO()
    screenshot(arguments.runs, arguments.prompt, arguments.width, arguments.height).convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    print(f"{atomic_write(arguments.out, buffer.getvalue())}: {len(buffer.getvalue()) / 1e3:.0f} kB")
