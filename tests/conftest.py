"""Shared by all tests: the repository's folder, tiny run settings, and quiet environment variables for child processes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = {"steps": 4, "batch_size": 8, "score_images": 8, "sampler_steps": 2, "validation_images": 16, "precision": "fp32", "workers": 0}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True, scope="session")
def quiet():
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
