"""Fixtures shared by the tests: everything runs on the CPU with the demo model, without network."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes test side by side; with threads of their own they would hold each other up.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "gpu" not in " ".join(sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "tools")]

import torch  # noqa: E402

DEMO = ROOT / "assets" / "demo" / "sdxl"


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where no GPU is visible. Run them with: pytest -m gpu"""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def demo_pipe():
    """The demo model as hasty_sample.py loads it, float32 on the CPU."""
    import hasty_sample

    settings = hasty_sample.with_demo(hasty_sample.Settings())
    hasty_sample.quiet_libraries()
    return hasty_sample.load_pipeline(settings, torch.device("cpu"), torch.float32)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run("script", "--flag", ...) runs a script's main() in this process, inside tmp_path; returns the exit code,
    standard output and standard error."""
    import importlib

    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(script).main()
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        return code, out, err

    return call
