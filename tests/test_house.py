"""The shape of the house: every module imports alone, and only modules above it."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

NUMBERED = sorted(p for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
ORDER = {p.stem[3:]: int(p.stem[:2]) for p in NUMBERED}
RUN_NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not re.match(r"\d\d_|index", p.name)]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def siblings(module):
    """Names of difflit modules that a module imports anywhere, late imports included."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "difflit" / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("difflit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and (node.module == "difflit" or node.level):
            found |= {alias.name for alias in node.names} if not node.level or not node.module else {node.module.split(".")[0]}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("difflit.")}
    return found - {"__version__"}


def test_every_number_exports_one_module():
    assert ORDER, "no numbered notebooks"
    assert len(set(ORDER.values())) == len(ORDER), f"two notebooks share a number: {ORDER}"
    modules = {p.stem for p in (ROOT / "difflit").glob("*.py") if not p.stem.startswith("_")}
    assert modules == set(ORDER), "modules without a notebook, or notebooks without a module"


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_what_stands_above(module):
    for sibling in siblings(module):
        assert ORDER[sibling] < ORDER[module], f"{module} ({ORDER[module]}) imports {sibling} ({ORDER[sibling]}), which stands below it"


def needed(module):
    """Names of difflit modules that have to be there before a module is."""
    body = [n for n in ast.parse((ROOT / "difflit" / f"{module}.py").read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom) and n.module]
    return {node.module.split(".")[-1] for node in body if node.level or node.module.startswith("difflit.")}


def test_each_module_imports_in_a_fresh_process():
    """Each in a process that has imported nothing of ours but what it imports itself; what many need, ours and the libraries, is loaded once and forked."""
    after = {}
    for module in ORDER:
        after.setdefault(max(needed(module) & set(ORDER), key=ORDER.__getitem__, default=""), []).append(module)
    code = """
import json, os, sys, traceback
import torch, torchvision, matplotlib.pyplot, open_clip
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
assert not [name for name in sys.modules if name.startswith("difflit")]
after = json.loads(sys.argv[1])
def visit(above):
    failed = 0
    for module in after.get(above, []):
        if not (child := os.fork()):
            try:
                __import__(f"difflit.{module}")
                print(module, flush=True)
                os._exit(visit(module))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        failed |= os.waitpid(child, 0)[1] != 0
    return failed
sys.exit(visit(""))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(after)], capture_output=True, text=True, cwd="/", timeout=600)
    assert done.returncode == 0 and sorted(done.stdout.split()) == sorted(ORDER), (sorted(set(ORDER) - set(done.stdout.split())), done.stderr[-2000:])


def test_import_of_the_package_and_settings_is_light():
    code = "import sys, difflit, difflit.config, difflit.cli; sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted((ROOT / "difflit").glob("*.py")), ids=lambda p: p.stem)
def test_no_module_draws_by_pyplot(module):
    """In a kernel pyplot keeps every figure until its cell ends, and a run trains for days in one cell; `Picture` is kept by nobody."""
    assert "pyplot" not in re.sub(r'"[^"]*"', "", module.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_notebook_keeps_the_rhythm(path):
    """Title, subtitle, short export cells, documented and asserted public names, more prose than code."""
    title = source(cells(path)[0])
    assert re.match(r"# .+\n\n> .+", title), "the first cell is `# Title`, an empty line, `> subtitle`"
    exports = [(i, source(c)) for i, c in enumerate(cells(path)) if c["cell_type"] == "code" and re.search(r"^#\|\s*export", source(c), re.M)]
    everything = [source(c) for c in cells(path) if c["cell_type"] == "code"]
    for i, text in exports:
        assert text.count("\n") < 60, f"cell {i} exports {text.count(chr(10)) + 1} lines"
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"
                shown = "\n".join(s for s in everything if not re.search(r"^#\|\s*export", s, re.M))
                assert re.search(rf"\b{node.name}\b", shown), f"{node.name} is neither shown nor tested"
    assert any(re.search(r"\bassert\b|test_\w+\(", s) for s in everything), "no assertion"


def test_run_notebooks_are_parametrised():
    assert RUN_NOTEBOOKS
    for path in RUN_NOTEBOOKS:
        tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, f"{path.name} needs exactly one cell tagged `parameters`"
        code = [source(c) for c in cells(path) if c["cell_type"] == "code"]
        assert not any(re.search(r"^#\|\s*(export|default_exp)", s, re.M) for s in code), f"{path.name} must export nothing"
        assert "skip_exec: true" in source(cells(path)[0])
        assert all(not c.get("outputs") for c in cells(path)), f"{path.name} is committed without outputs"


def test_papermill_understands_every_parameter():
    """What papermill cannot parse it calls unknown, and leaves out of --help-notebook: an equals sign in a comment is enough."""
    from papermill.translators import PythonTranslator

    from difflit.config import AuditSettings, EvaluateSettings, ExploreSettings, FillSettings, SearchSettings, TrainSettings, parameters_cell

    for kind in (TrainSettings, FillSettings, EvaluateSettings, AuditSettings, SearchSettings, ExploreSettings):
        known = {parameter.name for parameter in PythonTranslator.inspect({"source": parameters_cell(kind)})}
        assert known == set(kind.model_fields)


JOBS = {"train": "TrainSettings", "precompute": "FillSettings", "evaluate": "EvaluateSettings", "audit": "AuditSettings", "search": "SearchSettings",
        "explore": "ExploreSettings"}


@pytest.mark.parametrize("name, kind", [*JOBS.items()])
def test_parameters_of_run_notebooks_are_the_settings(name, kind):
    from difflit import config

    cell = next(c for c in cells(ROOT / "nbs" / f"{name}.ipynb") if "parameters" in c["metadata"].get("tags", []))
    made = config.parameters_cell(getattr(config, kind))
    assert source(cell) == made, f"regenerate the parameters cell: difflit.config.parameters_cell({kind})"
