"""README and docs: every command parses, those in blocks of shell run, every link leads somewhere."""

import glob
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionXLPipeline
from helpers import PROMPTS, SCRIPTS, script
from original import save_original, small_pipeline
from safetensors.torch import save_file

from dipo import cli
from dipo.settings import DEMO_PATHS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
PAGES += [ROOT / "assets/demo/README.md", ROOT / "tests/README.md"]


def commands():
    """What the pages and the scripts' docstrings tell to run: (script, flags), each once."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + [script(name).__doc__ for name in SCRIPTS]
    found = {}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for name, flags in re.findall(r"(?:python3?|launch) (\w+)\.py((?: (?!&&)[^`#|;]*?)?)(?=\s*(?:$|#|`|&&|\||;))", line):
            if name in SCRIPTS and "..." not in flags and "$" not in flags:
                found[name, flags.strip()] = None
    return list(found)


@pytest.mark.parametrize(("name", "flags"), commands())
def test_every_command_that_is_told_parses(name, flags, monkeypatch):
    """Flags that are gone or misspelt, and values that no longer fit, end here as they would for a reader."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(flags)])
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            cli.parse(script(name).Settings, script(name).__doc__)
    else:
        assert isinstance(cli.parse(script(name).Settings, script(name).__doc__), script(name).Settings)


def test_configurations_that_commands_name_are_there():
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + [script("train_dipo").__doc__]
    named = re.findall(r"--config_file (\S+)", "".join(texts))
    assert len({*named}) == 2 and all((ROOT / name).exists() for name in named)


def test_there_are_commands_of_every_script():
    assert {name for name, _ in commands()} == {*SCRIPTS} and len(commands()) > 60


# ------------------------------------------------------------------------------------------------- commands that are run

# What makes a command small, whatever sizes it has itself.
SIZES = {
    "hasty_sample": ("--limit", 2, "--num-inference-steps", 2),
    "compare_quality": ("--limit", 1, "--steps", 2, "--baseline-steps", 3),
    "Ablation_experiment": ("--limit", 1, "--num-inference-steps", 2, "--etas", 0, 1),
    "Semantic_Categories": ("--limit", 1, "--dipo-steps", 2, "--baseline-steps", 3),
    "Human_Preference_compare": ("--limit", 1, "--dipo-steps", 2, "--baseline-steps", 3),
    "train_dipo": (
        *("--effective-batch-size", 2, "--train-batch-size", 2, "--max-train-steps", 1, "--max-train-pairs", 8),
        *("--validate-every", 0),
    ),
    "voter": (),
    "measure_dpo": ("--n", 2, "--model", ROOT / DEMO_PATHS["base_model"]),
}


def told():
    """The commands in the pages' blocks of shell, as bash makes words of them, loops and variables done: (script, flags).
    Blocks that make an environment are left out."""
    # The README last: its pictures are those of docs/training.md.
    text = "".join(page.read_text(encoding="utf-8") for page in reversed(PAGES))
    text = text.replace("# open vote.html", "python demo/voter.py generated_images/demo/Human_Preference_compare #")
    blocks = re.findall(r"^```bash\n(.*?)^```|^((?:    (?:python|head) [^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    blocks = ["".join(parts) for parts in blocks]
    # What is no command of ours does nothing.
    start = 'PATH=; head() { :; }; cp() { :; }; python() { echo "${@@Q}"; }\n'
    start += 'accelerate() { while [[ $1 != *.py ]]; do shift; done; python "$@"; }\n'
    shell = start + "\n".join(block for block in blocks if "pip install" not in block)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True, cwd=folder)
    commands = {line: shlex.split(line) for line in done.stdout.splitlines()}
    return [(Path(words[0]).stem, words[1:]) for words in commands.values()]


@pytest.fixture
def home(tmp_path, tiny):
    """What the pages' commands find where they run, besides what those before them left."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "parti").mkdir()
    (tmp_path / "parti/PartiPrompts.tsv").write_text("Prompt\tCategory\na red circle\tAbstract\n")
    (tmp_path / "my_pairs").symlink_to(ROOT / DEMO_PATHS["pickapic"])
    (tmp_path / "votes-Ann.csv").symlink_to("generated_images/demo/Human_Preference_compare/votes-annotator-0.csv")
    small_pipeline("sd15").save_pretrained(tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    (tmp_path / "mhdang").mkdir()
    (tmp_path / "mhdang/dpo-sd1.5-text2image-v1").symlink_to(tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5/unet")
    # A single file's configuration lies beside it.
    shutil.copytree(tiny, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_original(StableDiffusionXLPipeline.from_pretrained(tiny, add_watermarker=False), tmp_path / "mine.safetensors")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 32), f"{layer}.lora_up.weight": torch.ones(32, 1)}
    for name in ("dpo", "lightning"):
        save_file(factors, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_every_command_in_a_block_runs(home, tiny, run):
    """One after the other in one folder, at a tiny size; those for SDXL on a tiny model. Benchmarks, download_models.py and
    what made the demo are run by tests of their own."""
    paths = DEMO_PATHS | {"base_model": tiny, "dpo_unet": tiny / "unet", "clip": DEMO_PATHS["pickscore"]}
    paths |= {"parti": "parti", "dataset": DEMO_PATHS["pickapic"]}
    del paths["judges"]
    commands = told()
    assert {*SIZES} <= {name for name, _ in commands}
    for name, flags in commands:
        if name in SIZES:
            models = [(f"--{k.replace('_', '-')}", v) for k, v in paths.items() if hasattr(script(name).Settings, k)]
            words = [word for flag in flags for word in (glob.glob(flag) or [flag])]
            code, _, err = run(name, *itertools.chain(*models), *words, *SIZES[name])
            assert code == 0, (name, flags, err)
        else:
            assert name == "-m" or any((ROOT / part / f"{name}.py").exists() for part in ("", "demo", "benchmarks")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files that are linked are there, and so are the headings behind a #."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], link


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_what_fits_is_what_the_benchmark_predicted():
    """The tables of docs/scaling.md: GB, and the smallest GPU."""
    table = pd.read_csv(ROOT / "benchmarks/memory.csv").query("not what.str.startswith('demo')").groupby("what", sort=False)
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    for what, rows in table:
        fits = ["" if math.isnan(size) else f" ({size:.0f})" for size in rows["fits"]]
        cells = [f"{total:.1f}{size}" for total, size in zip(rows["total"], fits, strict=True)]
        assert f"| {' | '.join([what, *cells])} |" in lines
    assert len(table) == 12
