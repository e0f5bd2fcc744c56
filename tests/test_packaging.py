"""The wheel holds what a user needs, and the command works from it."""

import subprocess
import sys
import zipfile

from conftest import ROOT


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
