"""README.md from nbs/index.ipynb: prose and outputs, no code cells, pictures as files beside it."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    """The text of README.md. Markdown cells as they are; links to notebooks seen from the repository's top."""
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)(?:\.\./)?([^)]+)\)", lambda m: f"]({_from_top(m[1])})", text))
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                parts.append("".join(output["data"]["text/markdown"]))
    return "\n\n".join(parts) + "\n"


def _from_top(target: str) -> str:
    """A link of the index notebook as seen from the top folder."""
    return f"nbs/{target}" if (ROOT / "nbs" / target.split("#")[0]).exists() else target


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
