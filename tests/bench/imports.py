"""What each module pulls in, and what that costs: a table of the heavy packages that a fresh `import difflit.X` loads, and its processor time.

    python tests/bench/imports.py                # all modules, as Markdown
    python tests/bench/imports.py config studio  # some

Processor time (user and system) of the import alone, in a fresh process each; a module's line appears when it is measured, the table at the end.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "torchvision", "diffusers", "transformers", "open_clip", "accelerate", "peft", "matplotlib", "pandas", "scipy", "sklearn", "optuna",
         "webdataset", "tensorboard", "gradio", "papermill", "IPython", "torchmetrics", "cv2", "pyarrow"]
CODE = """
import sys, time
begun = time.process_time()
import difflit.{name}
seconds = time.process_time() - begun
print(round(seconds, 2), *[name for name in {heavy} if name in sys.modules])
"""


def measure(name: str) -> tuple[float, list[str]]:
    "Seconds of the processor, and the heavy packages that are loaded."
    command = [sys.executable, "-c", CODE.format(name=name, heavy=HEAVY)]
    seconds, *heavy = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), heavy


if __name__ == "__main__":
    groups: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for name in sys.argv[1:] or sorted(p.stem for p in (ROOT / "difflit").glob("*.py") if not p.stem.startswith("_")):
        seconds, heavy = measure(name)
        print(f"{name:16} {seconds:5.1f}  {' '.join(heavy)}", file=sys.stderr, flush=True)
        groups.setdefault(tuple(heavy), []).append((name, seconds))
    print("| loads | seconds of the processor | modules |\n|---|---:|---|")
    for heavy, members in sorted(groups.items(), key=lambda group: max(seconds for _, seconds in group[1])):
        least, most = min(s for _, s in members), max(s for _, s in members)
        print(f"| {', '.join(heavy) or 'nothing heavy'} | {least:.1f} – {most:.1f} | {', '.join(name for name, _ in members)} |")
