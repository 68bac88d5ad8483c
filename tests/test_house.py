"""The house rules that keep the scripts readable: what may import what, what stands in each script, how long things get."""

import ast
import gc
import sys

import pytest
from conftest import ROOT
from helpers import SAMPLERS, SCRIPTS, script, start

from dipo import cli

LINES = dict.fromkeys(SAMPLERS, 350) | {"train_dipo": 450, "download_models": 250}
MODULES = sorted(p.stem for p in (ROOT / "dipo").glob("[!_]*.py"))
# From below: a module imports those of the levels before its own only.
LEVELS = (
    ("cli", "settings", "stats", "timesteps", "pictures"),
    ("files", "devices", "imagereward"),
    ("grids", "figures", "prompts", "pairs", "checkpoints", "checksums", "single_file"),
    ("models", "checks", "hub", "folders", "losses"),
    ("compiled", "judges", "loras", "training", "schemas"),
    ("batches", "scores", "tables", "cache", "results", "pickapic", "memory"),
    ("votes", "annotate"),
    ("study",),
    ("rows",),
)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """The modules that a file imports, dipo's as dipo.NAME."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"dipo.{a.name}" for a in node.names} if node.module == "dipo" else {node.module}
    return names


def calls(path):
    """What a file calls, as it is written there."""
    return {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}


def functions(path):
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_a_program_of_its_own(name):
    """It imports no other script, and ends in the one place that ends scripts."""
    assert not imported(ROOT / f"{name}.py") & {*SCRIPTS}
    *_, last = tree(ROOT / f"{name}.py").body
    assert ast.unparse(last.test) == "__name__ == '__main__'" and ast.unparse(last.body[0]).startswith(
        "cli.run(main, Settings"
    )


@pytest.mark.parametrize("name", MODULES)
def test_the_package_imports_no_script_and_one_way_only(name):
    imports = imported(ROOT / f"dipo/{name}.py")
    assert not imports & {*SCRIPTS, "conftest"}
    level = next(i for i, names in enumerate(LEVELS) if name in names)
    below = {f"dipo.{x}" for names in LEVELS[:level] for x in names}
    assert {x for x in imports if x.startswith("dipo.")} <= below


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampling_script_has_its_loop_its_scheduler_and_its_paths(name):
    path, module = ROOT / f"{name}.py", script(name)
    assert {"pipe.unet", "DDIMScheduler.from_config", "load_part"} <= calls(path)
    definitions = [n.name for n in tree(path).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert definitions[:2] == ["Settings", "sample"] and {"load_pipeline", "main"} <= {*definitions}
    loop = next(f for f in functions(path) if f.name == "sample")
    assert loop.end_lineno - loop.lineno <= 40
    settings = next(n for n in tree(path).body if isinstance(n, ast.ClassDef))
    first = [n.target.id for n in settings.body if isinstance(n, ast.AnnAssign)][:4]
    assert first == ["base_model", "dpo_unet", "dpo_lora", "vae"]
    assert all(isinstance(getattr(module.Settings, x), str | tuple) for x in first)


def test_paths_that_scripts_share_are_the_same_everywhere():
    shared = {}
    for name in (*SAMPLERS, "train_dipo"):
        settings = script(name).Settings
        paths = ("base_model", "dpo_unet", "vae", "pickscore", "pickscore_processor", "hpsv2", "parti", "pickapic", "clip")
        for path in (*paths, "imagereward", "imagereward_tokenizer", "aesthetic", "aesthetic_clip"):
            if hasattr(settings, path):
                shared.setdefault(path, {})[name] = getattr(settings, path)
    assert len(shared) == 13
    for path, values in shared.items():
        assert len({*values.values()}) == 1, (path, values)
    # And the package has no default for them.
    text = "".join((ROOT / f"dipo/{name}.py").read_text() for name in MODULES if name not in ("batches", "pickapic"))
    assert not any(f'"{next(iter(values.values()))}"' in text for values in shared.values())


@pytest.mark.parametrize("name", MODULES)
def test_no_unet_is_called_outside_the_scripts(name):
    called = {c for c in calls(ROOT / f"dipo/{name}.py") if c.split(".")[-1] in ("unet", "pipe")}
    # The validation pictures of a training run come from diffusers' own pipeline; a dry run has no numbers.
    assert called <= {"results": {"pipe"}, "memory": {"unet"}}.get(name, set())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_and_functions_keep_their_length(name):
    path = ROOT / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES[name]
    for f in functions(path):
        most = 120 if (name, f.name) == ("train_dipo", "train") else 60
        assert f.end_lineno - f.lineno < most, f.name


def test_the_house_stays_small():
    paths = [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "dipo").glob("*.py")]
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths) <= 7640
    for path in (ROOT / "dipo").glob("*.py"):
        for f in functions(path):
            assert f.end_lineno - f.lineno < 60, (path, f.name)


def test_every_module_is_used():
    used = set().union(*(imported(p) for p in [*ROOT.glob("*.py"), *(ROOT / "dipo").glob("*.py")]))
    assert {f"dipo.{name}" for name in MODULES} <= used


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_start_from_any_folder(name, tmp_path):
    """Without installing anything: the package lies beside them."""
    done = start(sys.executable, ROOT / f"{name}.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and script(name).__doc__.splitlines()[0] in " ".join(done.stdout.split()), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_wrong_flags_wait_for_no_library(name, tmp_path):
    """They are answered where torch and diffusers cannot even be imported, and cost seconds to import."""
    for library in ("torch", "diffusers", "transformers", "pandas", "matplotlib"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit(7)")
    for flag, code, said in (("--help", 0, "usage:"), ("--no-such-flag", 2, "error: Unrecognized options: --no-such-flag")):
        done = start(sys.executable, ROOT / f"{name}.py", flag, PYTHONPATH=str(tmp_path))
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_garbage_is_looked_for_in_the_run_and_not_in_what_was_imported(monkeypatch):
    """Which takes a third of a short run otherwise."""
    monkeypatch.setattr(sys, "argv", ["hasty_sample.py"])
    settings, seen = script("hasty_sample").Settings, []
    gc.unfreeze()
    cli.answer(settings, "__main__", "")
    assert not gc.isenabled()
    cli.run(lambda s: seen.append((gc.isenabled(), gc.get_freeze_count())), settings, "")
    assert seen[0][0] and seen[0][1] > 100_000


def test_under_accelerate_launch(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    flags = ["--demo", "--limit", "1", "--num-inference-steps", "2", "--output-dir", "out"]
    done = start(*launch, ROOT / "hasty_sample.py", *flags, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out/00000.png").exists(), done.stderr


def test_installed_the_package_serves_a_script_that_was_copied_alone(tmp_path):
    """pip install -e . of a copy of the repository, into a folder that stands for another environment."""
    pytest.importorskip("setuptools")
    copy, site = tmp_path / "repository", tmp_path / "site"
    copy.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "dipo"):
        (copy / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = start(*pip, "--target", site, "-e", copy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    requires = next(site.glob("dipo-*.dist-info/METADATA")).read_text()
    assert "Requires-Dist: torch>=" in requires and "Requires-Dist: diffusers" in requires
    lines = (ROOT / "hasty_sample.py").read_text()
    (tmp_path / "alone.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n{lines}")
    done = start(sys.executable, "alone.py", "--demo", "--eta", "2", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --eta 2.0"), done.stderr
