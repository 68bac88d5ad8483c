"""tools/check_copies.py on a small tree of its own, and on this repository."""

import subprocess
import sys

import check_copies
import pytest
from conftest import ROOT

ORIGINAL = '''"""Original."""
import functools

LIMIT = 25


@functools.cache
def half(x: float) -> float:
    """Half."""
    return x / 2


class Point:
    x = 0
'''


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "first.py").write_text(ORIGINAL)
    copies = "import functools\n\n# Copied from first.LIMIT\nLIMIT = 25\n\n\n# Copied from first.half\n@functools.cache\n"
    copies += 'def half(x: float) -> float:\n    """Half."""\n    return x / 2\n\n\nprint(half(1))\n'
    (tmp_path / "second.py").write_text(copies)
    return tmp_path


def check(tree, fix=False):
    return check_copies.check(tree, sorted(tree.glob("*.py")), fix)


def test_equal_copies_pass(tree):
    assert check(tree) == []


@pytest.mark.parametrize(("old", "new"), [("x / 2", "x / 3"), ("LIMIT = 25", "LIMIT = 26"), ("@functools.cache\n", "")])
def test_a_changed_copy_is_found_and_fixed(tree, old, new):
    path = tree / "second.py"
    whole = path.read_text()
    path.write_text(whole.replace(old, new))
    problems = check(tree)
    assert len(problems) == 1 and "second.py:" in problems[0] and "differs from first." in problems[0]
    assert check(tree, fix=True) == [] and path.read_text() == whole


def test_a_changed_original_is_found_and_every_copy_fixed(tree):
    path = tree / "first.py"
    path.write_text(ORIGINAL.replace("LIMIT = 25", "LIMIT = (\n    30,\n    31,\n)").replace("Half.", "One half."))
    assert len(check(tree)) == 2
    assert check(tree, fix=True) == [] and check(tree) == []
    text = (tree / "second.py").read_text()
    assert "    31,\n)\n\n\n# Copied from first.half" in text and "One half." in text and text.endswith("print(half(1))\n")


def test_a_copy_without_original_or_without_block_is_found(tree):
    (tree / "third.py").write_text(
        "# Copied from first.nothing\nX = 1\n\n# Copied from absent.Y\nY = 1\n\n# Copied from first.half\n"
    )
    problems = check(tree)
    assert len(problems) == 3
    assert "no nothing at the top level of first.py" in problems[2]


def test_this_repository_passes():
    done = subprocess.run([sys.executable, str(ROOT / "tools/check_copies.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
