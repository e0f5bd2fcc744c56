"""The wheel holds what a user needs, and the command works from it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT, TINY


def test_wheel_holds_notebooks_assets_and_scripts(tmp_path):
    source = tmp_path / "source"
    names = ["difflit", "nbs", "hpc", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    for name in names:  # a copy, so that the build leaves nothing in the repository
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("difflit-*.whl"))
    inside = zipfile.ZipFile(wheel).namelist()
    for name in ("difflit/notebooks/precompute.ipynb", "difflit/assets/tiny/model_index.json", "difflit/assets/tiny/vae/diffusion_pytorch_model.safetensors",
                 "difflit/assets/tiny/tokenizer/vocab.json", "difflit/assets/tiny/unet/config.json", "difflit/hpc/train_sd.sh"):
        assert name in inside, name
    for name in ("difflit/notebooks/train.ipynb", "difflit/assets/emoji.tar", "difflit/assets/emoji.OFL.txt", "difflit/py.typed", "difflit/cli.py"):
        assert name in inside, name
    assert wheel.stat().st_size < 8e6

    unpacked = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "import difflit, difflit.cli as c; print(difflit.__version__, c.run_notebook('train').parent.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=unpacked, env={"PYTHONPATH": str(unpacked), "PATH": "/usr/bin"})
    assert done.stdout.split()[1:] == ["notebooks"], done.stderr


def test_command_line_speaks_plainly():
    done = subprocess.run([sys.executable, "-m", "difflit.cli", "--help"], capture_output=True, text=True)
    for word in ("train", "sample", "runs", "new", "presets"):
        assert word in done.stdout, done.stderr


def test_sampling_from_the_command_line(tmp_path):
    from conftest import TINY

    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    run = open_run({**TINY, "steps": 2, "score_images": 0, "run_dir": str(tmp_path / "run")})
    train_job(prepare(run), show=False)
    finish(run)
    words = ["sample", str(tmp_path / "run"), "--prompt", "a small red star", "--prompt", "東京 🗼", "--steps", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "difflit.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000-a-small-red-star.png", "00001-東京.png", "grid.png"]
    done = subprocess.run([sys.executable, "-m", "difflit.cli", "sample", str(tmp_path / "nothing"), "--prompt", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "holds no model" in done.stderr and "Traceback" not in done.stderr


OPTIONAL = ("gradio", "optuna", "wandb", "ipywidgets", "jupyterlab", "cv2", "pyarrow", "aiohttp", "s3fs", "bitsandbytes", "torch_fidelity", "torchmetrics",
            "schedulefree", "prodigyopt", "pytorch_optimizer", "sklearn", "playwright", "nbdev", "fastcore")


@pytest.mark.slow
def test_no_module_needs_an_optional_part():
    "Each module is imported in a process where nothing of an extra can be: what needs one imports it where it is used."
    modules = sorted(p.stem for p in (ROOT / "difflit").glob("*.py") if not p.stem.startswith("_"))
    code = """
import os, sys
from importlib.abc import MetaPathFinder
import torch, torchvision, matplotlib.pyplot, open_clip, scipy.stats, accelerate.utils  # loaded once, then forked
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
optional = set(sys.argv[1].split())
class Never(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            frame, asked = sys._getframe(1), ""
            while frame is not None and not asked:
                asked = frame.f_globals.get("__name__", "") if str(frame.f_globals.get("__name__", "")).startswith("difflit") else ""
                frame = frame.f_back
            print("asked", name, asked, flush=True)
            raise ImportError(name)
sys.meta_path.insert(0, Never())
for name in [n for n in sys.modules if n.split(".")[0] in optional]:
    del sys.modules[name]
for module in sys.argv[2:]:
    if not (child := os.fork()):
        try:
            __import__(f"difflit.{module}")
        except BaseException as error:
            print("failed", module, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", code, " ".join(OPTIONAL), *modules], capture_output=True, text=True, timeout=600, cwd="/")
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    asked = sorted({line for line in done.stdout.splitlines() if line.startswith("asked") and line.split()[-1].startswith("difflit")})
    assert done.returncode == 0 and not failed, (failed, done.stderr[-2000:])
    assert not asked, f"imported as soon as the module is: {asked}"


def test_the_package_itself_costs_nothing():
    "`import difflit` is less than half a second beyond Python's own start, and loads nothing; settings and the command line load no torch."
    code = ("import sys, time; begun = time.process_time(); import difflit; "
            "print(time.process_time() - begun, len([n for n in sys.modules if n.startswith('difflit')]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    seconds, loaded = done.stdout.split()
    assert float(seconds) < 0.5 and int(loaded) == 1, done.stdout


def test_versions_and_python_are_told(tmp_path):
    from importlib.metadata import metadata

    import difflit

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    told = metadata("difflit")
    assert difflit.__version__ == config["DEFAULT"]["version"]
    assert told["Requires-Python"] == f">={config['DEFAULT']['min_python']}"


@pytest.mark.slow
def test_both_distributions_build_as_a_release_does(tmp_path):
    "`python -m build` makes the source distribution first and the wheel from it: whatever it lacks is missed here."
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "reports"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"settings.ini", "nbs/train.ipynb", "nbs/explore.ipynb", "nbs/00_config.ipynb", "hpc/slurm.sh", "constraints.txt"} <= names
    assert "difflit/assets/emoji.tar" in names
    assert {f"tests/{p.name}" for p in (ROOT / "tests").glob("*.py")} <= names
    inside = set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    wanted = {p.stem for p in (ROOT / "nbs").glob("*.ipynb") if not p.stem[:2].isdigit() and p.stem != "index"}
    assert {f"difflit/notebooks/{name}.ipynb" for name in wanted} <= inside, "a run notebook is not shipped: RUN_NOTEBOOKS in setup.py"
    meta = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).read(next(n for n in inside if n.endswith("METADATA"))).decode()
    assert "Classifier: Programming Language :: Python :: 3.11" in meta and "Requires-Python: >=3.11" in meta


@pytest.mark.slow
def test_the_wheel_trains_where_nothing_but_runtime_dependencies_are(tmp_path):
    "A clean environment, a command, a run: minutes of installing."
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True, timeout=900, env=env)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, env=env)
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(next(tmp_path.glob("*.whl")))], check=True, timeout=3000, env=env)
    subprocess.run([python, "-m", "pip", "check"], check=True, env=env)
    command = tmp_path / "env" / "bin" / "difflit"
    words = [word for name, value in {**TINY, "run_dir": "run", "score_images": 0}.items() for word in ("-p", f"{name}={value}")]
    for call in (["--help"], ["new", "train"], ["new", "explore"], ["presets"], ["train", *words]):
        done = subprocess.run([command, *call], capture_output=True, text=True, cwd=tmp_path, timeout=900, env=env)
        assert done.returncode == 0, (call, done.stderr[-2000:])
    assert (tmp_path / "run" / "checkpoints").is_dir() and (tmp_path / "train.ipynb").exists() and (tmp_path / "explore.ipynb").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
def test_all_extras_resolve_together(tmp_path, pinned):
    "With the newest versions, and with those of constraints.txt."
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    values = config["DEFAULT"]
    wanted = [word for name, value in values.items() if name in ("requirements", "dev_requirements") or name.startswith("extra_") for word in value.split()]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, env=env)
    words = ["-c", str(ROOT / "constraints.txt")] if pinned else []
    command = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(tmp_path / "report.json"), *words, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["train", "train.ipynb", "slurm.sh"])
def test_new_copies_here_by_either_name(tmp_path, monkeypatch, name):
    from difflit.cli import new_command
    from difflit.config import SettingsError

    monkeypatch.chdir(tmp_path)
    new_command(name)
    assert [p.name for p in tmp_path.iterdir()] == [name if "." in name else f"{name}.ipynb"]
    with pytest.raises(SettingsError, match="exists; give another name"):
        new_command(name)
