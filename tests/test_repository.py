"""Notebooks and package agree; nothing in the repository changes at every run or names a machine."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TRACKED = [ROOT / p for p in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n") if p]


def body(text):
    """A module without the cell identities in its comments."""
    return re.sub(r"^# %% .*$", "# %%", text, flags=re.M)


def test_export_is_in_sync(tmp_path, monkeypatch):
    from nbdev.export import nb_export

    monkeypatch.chdir(ROOT)
    shutil.copytree(ROOT / "difflit", tmp_path / "difflit", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    for path in NOTEBOOKS:
        nb_export(path, lib_path=tmp_path / "difflit")
    for module in sorted((ROOT / "difflit").glob("*.py")):
        if module.stem not in ("__init__", "_modidx"):
            assert body((tmp_path / "difflit" / module.name).read_text()) == body(module.read_text()), f"run nbdev_export: {module.name} differs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path, tmp_path, monkeypatch):
    from nbdev.clean import nbdev_clean

    monkeypatch.chdir(ROOT)
    copy = shutil.copy(path, tmp_path / path.name)
    nbdev_clean(str(copy))
    assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text()), "run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_says_nothing_of_a_machine(path):
    assert path.stat().st_size < 1_000_000
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = json.dumps({k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}) + json.dumps(output.get("text", ""))
            assert not re.search(r"/(root|home|work|tmp)/|0x[0-9a-f]{8,}", text), f"a machine's path or address in an output: {text[:300]}"
            assert output["output_type"] != "error", text[:300]
            assert len(text.split("\\n")) <= 41, "an output of more than 40 lines"


def test_no_machine_paths_or_registries_in_files():
    for path in TRACKED:
        if path.suffix in (".py", ".md", ".ini", ".toml", ".txt", ".yml", ".sh", "") and path.is_file() and path != ROOT / "tests" / "test_repository.py":
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/work/|index-url|find-links", text), path


def test_readme_comes_from_the_index(tmp_path):
    from build_readme import readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run make readme"
