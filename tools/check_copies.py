"""Keep copied blocks the same as their originals.

Every script stands alone, so what several need is copied. A copy is a top-level function, class or assignment with the
line "# Copied from FILE.NAME" above it, where FILE is the original's path without .py, with dots for slashes
(hasty_sample, demo.world) and NAME the object's name there. Apart from that line both must be equal, letter for letter.

    python tools/check_copies.py          # list the copies that differ; exit code 1 if there are any
    python tools/check_copies.py --fix    # rewrite them from their originals
"""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

MARK = re.compile(r"# Copied from ([\w.]+)\.(\w+)\s*$")


@functools.lru_cache(64)
def blocks(source: str) -> dict[str, tuple[int, int]]:
    """First and last line (from 1) of every top-level function, class and simple assignment by name, decorators included.

    Raises SyntaxError when the source cannot be parsed.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = (first, node.end_lineno)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = (node.lineno, node.end_lineno)
    return found


def check(root: Path, files: list[Path], fix: bool) -> list[str]:
    """One line for each copy that differs from its original or has none; with fix, the copies that differ are rewritten
    and only what cannot be is returned. Raises SyntaxError when a file cannot be parsed."""
    problems = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        # From the end on, so that a rewritten block does not move the ones still to come.
        for k in range(len(lines) - 1, -1, -1):
            mark = MARK.match(lines[k])
            if not mark:
                continue
            place = f"{path.relative_to(root)}:{k + 1}"
            original = root / (mark[1].replace(".", "/") + ".py")
            text = original.read_text(encoding="utf-8") if original.exists() else ""
            span = blocks(text).get(mark[2])
            if span is None:
                problems.append(f"{place}: no {mark[2]} at the top level of {original.relative_to(root)}")
                continue
            copy = next((s for s in blocks("\n".join(lines)).values() if s[0] == k + 2), None)
            if copy is None:
                problems.append(f"{place}: no function, class or assignment right below this line")
                continue
            wanted = text.splitlines()[span[0] - 1 : span[1]]
            if lines[copy[0] - 1 : copy[1]] == wanted:
                continue
            if fix:
                lines[copy[0] - 1 : copy[1]] = wanted
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                print(f"{place}: rewritten from {mark[1]}.{mark[2]}")
            else:
                problems.append(f"{place}: differs from {mark[1]}.{mark[2]}; python tools/check_copies.py --fix")
    return problems


def main() -> None:
    if unknown := [a for a in sys.argv[1:] if a != "--fix"]:
        print(f"error: unknown argument {unknown[0]}; the only one is --fix", file=sys.stderr)
        sys.exit(2)
    root = Path(__file__).resolve().parents[1]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [root / name for name in listed.stdout.splitlines() if (root / name).exists()]
    problems = check(root, files, fix="--fix" in sys.argv)
    copies = sum(bool(MARK.match(line)) for p in files for line in p.read_text(encoding="utf-8").splitlines())
    print("\n".join(problems) or f"{copies} copies in {len(files)} files, all like their originals")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
