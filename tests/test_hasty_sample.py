"""hasty_sample.py as its users run it: files, restarts, processes, and what it says of bad input."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEMO, ROOT
from filelock import FileLock
from helpers import launch_two, pixels, popen, start
from PIL import Image

import hasty_sample
from dipo import cli
from dipo.checks import completed
from dipo.files import read_record
from dipo.settings import DEMO_PATHS

SCRIPT = ROOT / "hasty_sample.py"
FAST = ("--demo", "--num-inference-steps", "4")


def write_prompts(path, n=6):
    colours = ["red", "green", "blue", "white", "pink", "purple"]
    path.write_text("\n".join(f"a landscape with {c} hills under a yellow sky" for c in colours[:n]), encoding="utf-8")
    return path


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


# ------------------------------------------------------------------------------------------------------- what comes out


def test_demo_leaves_images_grid_and_table(run, tmp_path):
    code, out, err = run("hasty_sample", *FAST, "--limit", "3", "--seed", "5", "--output-dir", "out")
    assert code == 0, err
    table = pd.read_csv("out/images.csv", keep_default_na=False)
    assert table["file"].tolist() == ["00000.png", "00001.png", "00002.png"]
    assert table["seed"].tolist() == [5, 6, 7]
    assert (table["num_inference_steps"] == 4).all() and (table["eta"] == 0).all() and (table["guidance_scale"] == 5).all()
    assert (table["base_model"] == DEMO_PATHS["base_model"]).all() and (table["dpo_unet"] == DEMO_PATHS["dpo_unet"]).all()
    assert (table["seconds_per_image"] > 0).all()
    assert {"torch", "diffusers", "transformers", "device", "dtype", "prompt", "negative_prompt"} <= set(table.columns)
    assert table["prompt"].tolist() == (ROOT / hasty_sample.DEMO["prompts"]).read_text(encoding="utf-8").splitlines()[:3]
    assert all(Image.open(f"out/{name}").size == (64, 64) for name in table["file"])
    assert Image.open("out/grid.png").width > 3 * 192
    assert "3 images" in out and "grid.png" in out and "s per image" in out
    assert sorted(p.name for p in Path("out").iterdir()) == [*table["file"], "grid.png", "images.csv"]


def test_images_per_prompt_and_their_seeds(run):
    prompts = write_prompts(Path("p.txt"), 2)
    code, _, err = run("hasty_sample", *FAST, "--prompts", prompts, "--images-per-prompt", 2, "--output-dir", "out")
    assert code == 0, err
    table = pd.read_csv("out/images.csv")
    assert table["prompt"].tolist() == [p for p in prompts.read_text().splitlines() for _ in range(2)]
    assert table["seed"].tolist() == [0, 1, 2, 3]
    assert np.abs(pixels("out/00000.png") - pixels("out/00001.png")).max() > 30


def test_size_eta_and_spacing_flags_reach_the_images(run):
    flags = ("--height", 48, "--width", 96, "--eta", 0.5, "--timestep-spacing", "trailing", "--guidance-scale", 1)
    code, _, err = run("hasty_sample", *FAST, "--limit", 1, *flags, "--negative-prompt", "red", "--output-dir", "out")
    assert code == 0, err
    assert Image.open("out/00000.png").size == (96, 48)
    row = pd.read_csv("out/images.csv").iloc[0]
    assert (row["height"], row["width"], row["eta"], row["timestep_spacing"]) == (48, 96, 0.5, "trailing")


def test_an_image_is_the_same_in_any_batch(run):
    for size in (1, 3, 4):
        code, _, err = run("hasty_sample", *FAST, "--eta", 1, "--limit", 5, "--batch-size", size, "--output-dir", f"b{size}")
        assert code == 0, err
    for i in range(5):
        for size in (3, 4):
            assert np.abs(pixels(f"b1/{i:05d}.png") - pixels(f"b{size}/{i:05d}.png")).max() <= 2


def test_two_processes_make_what_one_makes(run, tmp_path):
    flags = [*FAST, "--eta", 1, "--limit", 5]
    code, _, err = run("hasty_sample", *flags, "--output-dir", "one")
    assert code == 0, err
    done = launch_two("hasty_sample", *flags, "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grid.png") == 1
    assert len(pd.read_csv(tmp_path / "two/images.csv")) == 5
    for i in range(5):
        assert np.abs(pixels(f"one/{i:05d}.png") - pixels(tmp_path / f"two/{i:05d}.png")).max() <= 2
    # The second process really took part: its images came in batches of their own.
    assert pd.read_csv(tmp_path / "two/images.csv")["batch_size"].max() <= 3


# ------------------------------------------------------------------------------------------------- stopping and going on


def test_an_interrupted_run_is_continued(run, tmp_path):
    flags = ["--demo", "--num-inference-steps", 30, "--batch-size", 1, "--limit", 4, "--output-dir", tmp_path / "out"]
    process = popen(*command(*flags), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/00001.png").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    made = sorted((tmp_path / "out").glob("0*.png"))
    assert 2 <= len(made) < 4 and not (tmp_path / "out/images.csv").exists()
    stamps = {p: p.stat().st_mtime_ns for p in made}

    code, out, err = run("hasty_sample", *flags)
    assert code == 0, err
    assert f"{len(made)} of 4 images" in out
    assert {p: p.stat().st_mtime_ns for p in made} == stamps
    assert len(pd.read_csv(tmp_path / "out/images.csv")) == 4

    code, out, _ = run("hasty_sample", *flags[:-1], tmp_path / "whole")
    for i in range(4):
        assert np.abs(pixels(tmp_path / f"whole/{i:05d}.png") - pixels(tmp_path / f"out/{i:05d}.png")).max() <= 2


def test_a_cut_png_is_made_again_and_a_whole_one_is_kept(run):
    flags = (*FAST, "--limit", 3, "--output-dir", "out")
    assert run("hasty_sample", *flags)[0] == 0
    before = [pixels(f"out/{i:05d}.png") for i in range(3)]
    whole = Path("out/00001.png").read_bytes()
    Path("out/00001.png").write_bytes(whole[: len(whole) // 2])
    Path("out/.00002.png.part").write_bytes(whole[:100])
    stamp = Path("out/00000.png").stat().st_mtime_ns
    code, out, _ = run("hasty_sample", *flags)
    assert code == 0 and "2 of 3 images" in out
    assert Path("out/00000.png").stat().st_mtime_ns == stamp
    assert all(np.abs(pixels(f"out/{i:05d}.png") - before[i]).max() <= 2 for i in range(3))


def test_more_prompts_later_make_only_the_new_images(run):
    prompts = write_prompts(Path("p.txt"))
    flags = (*FAST, "--prompts", prompts, "--output-dir", "out")
    assert run("hasty_sample", *flags, "--limit", 2)[0] == 0
    code, out, _ = run("hasty_sample", *flags, "--limit", 3)
    assert code == 0 and "2 of 3 images" in out
    assert len(pd.read_csv("out/images.csv")) == 3


def test_other_settings_in_the_same_folder_are_an_error_until_overwritten(run):
    flags = (*FAST, "--limit", 2, "--output-dir", "out")
    assert run("hasty_sample", *flags)[0] == 0
    old = pixels("out/00000.png")
    code, _, err = run("hasty_sample", *flags, "--seed", 100)
    assert code == 2 and "seed 0, this run has 100" in err and "--overwrite" in err
    assert (pixels("out/00000.png") == old).all()
    code, _, err = run("hasty_sample", *flags, "--guidance-scale", 3)
    assert code == 2 and "guidance_scale 5.0, this run has 3.0" in err
    assert run("hasty_sample", *flags, "--seed", 100, "--overwrite")[0] == 0
    assert (pixels("out/00000.png") != old).any()
    assert pd.read_csv("out/images.csv")["seed"].tolist() == [100, 101]


def test_a_guidance_interval_is_a_setting_of_its_images(run):
    flags = (*FAST, "--limit", 2, "--timestep-spacing", "trailing")
    assert run("hasty_sample", *flags, "--output-dir", "plain")[0] == 0
    interval = (*flags, "--guidance-interval", 0.28, 5.42)
    code, _, err = run("hasty_sample", *interval, "--output-dir", "plain")
    assert code == 2 and "guidance_interval None, this run has [0.28, 5.42]" in err
    code, out, _ = run("hasty_sample", *interval, "--output-dir", "out")
    assert code == 0 and "guidance in 3 of 4 steps" in out
    assert (pixels("out/00000.png") != pixels("plain/00000.png")).any()
    assert parse_infotext(Image.open("out/00000.png").info["parameters"])["Guidance interval"] == "0.28-5.42"
    assert pd.read_csv("out/images.csv")["guidance_interval"].tolist() == ["[0.28, 5.42]"] * 2
    assert "2 of 2 images" in run("hasty_sample", *interval, "--output-dir", "out")[1]
    for more in ((), ("--limit", 3)):
        code, _, err = run("hasty_sample", *flags, *more, "--output-dir", "out")
        assert code == 2 and "guidance_interval [0.28, 5.42], this run has None" in err
    assert (
        "0 of 4 steps; that is --guidance-scale 1"
        in run("hasty_sample", *flags, "--guidance-interval", 0, 0.001, "--output-dir", "nowhere")[1]
    )
    # Everywhere is guidance as before, to the last bit.
    assert run("hasty_sample", *flags, "--guidance-interval", 0, 100, "--output-dir", "everywhere")[0] == 0
    assert (pixels("everywhere/00001.png") == pixels("plain/00001.png")).all()


def test_images_left_over_from_another_seed_go_with_overwrite(run):
    flags = (*FAST, "--output-dir", "out")
    assert run("hasty_sample", *flags, "--limit", 3)[0] == 0
    code, _, err = run("hasty_sample", *flags, "--limit", 1, "--seed", 7)
    assert code == 2 and "seed 0, this run has 7" in err
    for name in (".00009.png.1.part", ".grid.png.part", ".images.csv.part", ".big.iso.part"):
        Path("out", name).write_bytes(b"x")
    assert run("hasty_sample", *flags, "--limit", 1, "--seed", 7, "--overwrite")[0] == 0
    # What is half-written and not ours stays.
    assert sorted(p.name for p in Path("out").iterdir()) == [".big.iso.part", "00000.png", "grid.png", "images.csv"]


def test_a_picture_of_other_origin_is_not_replaced(run):
    Path("out").mkdir()
    Image.new("RGB", (8, 8)).save("out/00001.png")
    before = Path("out/00001.png").read_bytes()
    for flags in ([], ["--overwrite"]):
        code, _, err = run("hasty_sample", *FAST, "--limit", 2, "--output-dir", "out", *flags)
        assert code == 2 and "00001.png was not made by this script" in err
    assert Path("out/00001.png").read_bytes() == before


def test_a_second_run_in_the_same_folder_is_told(run):
    flags = (*FAST, "--limit", 1, "--output-dir", "out")
    Path("out").mkdir()
    with FileLock("out/.lock"):
        code, _, err = run("hasty_sample", *flags)
    assert code == 2 and "--output-dir out: another run is writing there" in err and not list(Path("out").glob("*.png"))
    # A lock file without its process, as kill -9 leaves it, locks nobody out.
    Path("out/.lock").touch()
    assert run("hasty_sample", *flags)[0] == 0


def test_a_finished_run_loads_no_model(run, monkeypatch):
    flags = (*FAST, "--limit", 2, "--output-dir", "out")
    assert run("hasty_sample", *flags)[0] == 0
    monkeypatch.setattr(hasty_sample, "load_pipeline", None)
    code, out, _ = run("hasty_sample", *flags)
    assert code == 0 and "2 of 2 images" in out


def test_a_model_retrained_in_place_is_another_model(run):
    shutil.copytree(DEMO / "unet", "unet")
    flags = (*FAST, "--limit", 1, "--dpo-unet", "unet", "--output-dir", "out")
    assert run("hasty_sample", *flags)[0] == 0
    weights = Path("unet/diffusion_pytorch_model.safetensors")
    whole = bytearray(weights.read_bytes())
    whole[-1000] ^= 1
    weights.write_bytes(whole)
    code, _, err = run("hasty_sample", *flags)
    assert code == 2 and "was made with weights" in err


# ------------------------------------------------------------------------------------------------------------- settings


def parse_infotext(text):
    """Reads settings as AUTOMATIC1111's web UI does: the last line holds "key: value" pairs, values may be JSON strings;
    before it come the prompt and, after its marker, the negative prompt."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    prompt, negative, into_negative = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            into_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if into_negative else prompt).append(line)
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)} | dict(pairs)


def test_pngs_carry_their_settings_for_web_uis(run):
    Path("p.txt").write_text('a café, "quoted": steps: 3, 日本 🎨\n', encoding="utf-8")
    flags = ("--prompts", "p.txt", "--negative-prompt", "green hills, rain", "--eta", 0.25, "--seed", 9)
    assert run("hasty_sample", *FAST, *flags, "--output-dir", "out")[0] == 0
    read = parse_infotext(Image.open("out/00000.png").info["parameters"])
    assert read["Prompt"] == 'a café, "quoted": steps: 3, 日本 🎨'
    assert read["Negative prompt"] == "green hills, rain"
    expected = {"Steps": "4", "Sampler": "DDIM", "CFG scale": "5", "Seed": "9", "Size": "64x64", "Eta DDIM": "0.25"}
    assert {k: read[k] for k in expected} == expected
    assert pd.read_csv("out/images.csv")["prompt"][0] == 'a café, "quoted": steps: 3, 日本 🎨'


def test_a_prompt_too_long_is_named_with_what_is_cut(run):
    Path("p.txt").write_text("red hills " * 40 + "final purple sun\n")
    code, _, err = run("hasty_sample", *FAST, "--prompts", "p.txt", "--output-dir", "out")
    assert code == 0
    warning = [line for line in err.splitlines() if " tokens, " in line]
    assert len(warning) == 1 and "final purple sun" in warning[0] and "77 are read" in warning[0]


BAD_INPUT = {
    "no such model": (["--base-model", "/nowhere/sdxl"], ["--base-model", "/nowhere/sdxl", "download_models.py", "--demo"]),
    "no such unet": (["--demo", "--dpo-unet", "./nowhere"], ["--dpo-unet", "./nowhere"]),
    "no such vae": (["--demo", "--vae", "a/b/c"], ["--vae", "a/b/c"]),
    "not a model": (["--demo", "--base-model", str(ROOT / "tests")], ["--base-model", "model_index.json"]),
    "hub unreachable": (
        ["--base-model", "nobody/nothing", "--vae", "", "--dpo-unet", ""],
        ["--base-model nobody/nothing", "out of reach"],
    ),
    "no prompts file": (["--demo", "--prompts", "none.txt"], ["--prompts none.txt", "no such file"]),
    "empty prompts": (["--demo", "--prompts", "empty.txt"], ["--prompts empty.txt", "holds no prompt"]),
    "unknown kind": (["--demo", "--prompts", "prompts.docx"], ["--prompts prompts.docx", ".parquet"]),
    "no column": (["--demo", "--prompts", "wrong.csv"], ["no column prompt", "its columns are words, id"]),
    "not text": (["--demo", "--prompts", "binary.txt"], ["--prompts binary.txt", "cannot be read"]),
    "not parquet": (["--demo", "--prompts", "binary.parquet"], ["--prompts binary.parquet", "cannot be read"]),
    "no steps": (["--demo", "--num-inference-steps", "0"], ["--num-inference-steps 0", "1 to 1000"]),
    "too many steps": (["--demo", "--num-inference-steps", "1001"], ["--num-inference-steps 1001"]),
    "eta too large": (["--demo", "--eta", "1.5"], ["--eta 1.5"]),
    "eta no number": (["--demo", "--eta", "nan"], ["--eta nan"]),
    "guidance": (["--demo", "--guidance-scale", "inf"], ["--guidance-scale inf"]),
    "interval": (["--demo", "--guidance-interval", "5", "0.3"], ["--guidance-interval 5.0 0.3", "lower one first"]),
    "interval no number": (["--demo", "--guidance-interval", "0", "nan"], ["--guidance-interval 0.0 nan"]),
    "interval infinite": (["--demo", "--guidance-interval", "0", "inf"], ["--guidance-interval 0.0 inf", "14.6"]),
    "interval of one": (["--demo", "--guidance-interval", "3"], ["--guidance-interval", "xpected", " 2"]),
    "interval, no guidance": (
        ["--demo", "--guidance-interval", "0.3", "5", "--guidance-scale", "1"],
        ["--guidance-interval", "--guidance-scale 1 switches it off"],
    ),
    "height": (["--demo", "--height", "70"], ["--height 70", "multiple of 4", "72"]),
    "width": (["--demo", "--width", "-8"], ["--width -8"]),
    "dtype": (["--demo", "--dtype", "fp8"], ["--dtype", "fp8", "bf16"]),
    "device": (["--demo", "--device", "tpu"], ["--device 'tpu'"]),
    "no cuda": (["--demo", "--device", "cuda"], ["--device cuda", "no CUDA GPU"]),
    "spacing": (["--demo", "--timestep-spacing", "even"], ["--timestep-spacing", "even", "trailing"]),
    "limit": (["--demo", "--limit", "0"], ["--limit 0"]),
    "batch": (["--demo", "--batch-size", "0"], ["--batch-size 0"]),
    "seed": (["--demo", "--seed", "-1"], ["--seed -1"]),
    "output folder": (["--demo", "--output-dir", "empty.txt/out"], ["--output-dir empty.txt/out"]),
    "vae as unet": (
        ["--demo", "--dpo-unet", str(DEMO / "vae")],
        ["--dpo-unet", "holds AutoencoderKL, not the UNet2DConditionModel"],
    ),
    "mistyped folder": (["--base-model", "models/sdxl"], ["--base-model models/sdxl: cannot be loaded"]),
    "no parti": (["--demo", "--prompts", "parti"], ["--prompts parti: cannot be read"]),
    "steps no number": (["--demo", "--num-inference-steps", "ten"], ["--num-inference-steps", "'ten'"]),
    "unknown flag": (["--demo", "--step", "3"], ["--step", "--help"]),
    "font": (["--demo", "--font", "empty.txt"], ["--font empty.txt"]),
    "long prompt as a file": (["--demo", "--prompts", "a red sun " * 40], ["no such file"]),
}


def test_a_copy_of_an_image_is_none_of_the_run(run, tmp_path):
    few = ("--demo", "--num-inference-steps", "2", "--limit", "1", "--output-dir", "out")
    assert run("hasty_sample", *few)[0] == 0
    shutil.copy("out/00000.png", "out/00000 (1).png")
    code, out, err = run("hasty_sample", *few)
    assert code == 0 and "1 of 1 images are in out already" in out and (tmp_path / "out/00000 (1).png").exists(), err


@pytest.mark.parametrize("flag", ["--dpo-unet", "--dpo_unet="])
def test_a_lora_goes_on_the_unet_that_is_named_beside_it(monkeypatch, capsys, flag):
    """Though the name is the default's. Without one it goes on the base model's own, and that is said."""
    module = hasty_sample
    default = module.Settings.dpo_unet

    def unet(*flags):
        monkeypatch.setattr("sys.argv", ["hasty_sample.py", "--dpo-lora", "a.safetensors", *flags])
        return completed(cli.parse(module.Settings, ""), {}).dpo_unet

    assert unet(*([f"{flag}{default}"] if "=" in flag else [flag, default])) == default
    assert unet("--dpo-unet", "owner/name") == "owner/name" and unet("--dpo-unet=") == ""
    assert capsys.readouterr().err == ""
    assert unet() == ""
    line = f"--dpo-lora goes on the base model's own UNet; --dpo-unet {default} beside it would put it on that one"
    assert capsys.readouterr().err == f"warning: {line}\n"


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_exit_code_2(run, name, monkeypatch):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    Path("empty.txt").write_text("\n \n")
    Path("prompts.docx").write_text("x")
    Path("wrong.csv").write_text("words,id\nx,1\n")
    Path("binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    Path("binary.parquet").write_bytes(b"PAR2")
    Path("models").mkdir()
    flags, said = BAD_INPUT[name]
    code, out, err = run("hasty_sample", *flags)
    assert code == 2 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(words in lines[0] for words in said), err


def test_a_damaged_model_file_is_named(run):
    shutil.copytree(DEMO, "model")
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run("hasty_sample", "--demo", "--dpo-unet", "model/unet")
    assert code == 2 and len(err.strip().splitlines()) == 1 and "--dpo-unet model/unet: cannot be loaded" in err


def test_as_a_process_bad_input_gives_no_traceback(tmp_path):
    done = start(*command("--demo", "--eta", "2"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --eta 2.0: use 0 (DDIM, deterministic) to 1 (as random as DDPM)\n"


def test_the_script_works_with_the_package_alone_and_away_from_its_repository(tmp_path):
    """Copied with dipo/ to another folder, with the model's path given."""
    shutil.copy(SCRIPT, tmp_path / "alone.py")
    shutil.copytree(ROOT / "dipo", tmp_path / "dipo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "p.txt").write_text("a red sun")
    flags = ["--base-model", DEMO, "--dpo-unet", "", "--vae", "", "--prompts", "p.txt", "--num-inference-steps", "2"]
    done = start(sys.executable, "alone.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "generated_images/hasty_sample/grid.png").exists()
    done = start(sys.executable, "alone.py", "--demo", cwd=tmp_path)
    assert done.returncode == 2 and "assets/demo/sdxl beside dipo/" in done.stderr


def test_the_default_hub_names_load_from_the_hubs_cache(tmp_path):
    """All defaults, with the demo's weights put into a hub cache under the real models' names and in their layouts: the
    base in the fp16 variant only and without UNet and VAE, the DPO UNet in a subfolder, the VAE at the top."""

    def snapshot(name):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return repository / "snapshots" / ("0" * 40)

    defaults = hasty_sample.Settings()
    base = snapshot(defaults.base_model)
    shutil.copytree(DEMO, base, ignore=shutil.ignore_patterns("unet", "vae"))
    for weights in list(base.rglob("*.safetensors")):
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    shutil.copytree(ROOT / DEMO_PATHS["dpo_unet"], snapshot(defaults.dpo_unet) / "unet")
    shutil.copytree(DEMO / "vae", snapshot(defaults.vae))
    (tmp_path / "p.txt").write_text("a landscape with red hills under a white sky and a yellow sun")
    flags = ("--prompts", "p.txt", "--num-inference-steps", 4, "--output-dir")
    done = start(*command(*flags, "hub-out"), cwd=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
    done = start(*command("--demo", *flags, "demo-out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (pixels(tmp_path / "hub-out/00000.png") == pixels(tmp_path / "demo-out/00000.png")).all()


def test_bf16_runs_the_same_picture(run):
    flags = ("--demo", "--num-inference-steps", 10, "--limit", 2, "--output-dir")
    assert run("hasty_sample", *flags, "full")[0] == 0
    assert run("hasty_sample", *flags, "half", "--dtype", "bf16")[0] == 0
    assert set(pd.read_csv("half/images.csv")["dtype"]) == {"bf16"}
    for name in ("00000.png", "00001.png"):
        assert 0 < np.abs(pixels(f"full/{name}") - pixels(f"half/{name}")).mean() < 15


# --------------------------------------------------------------------------------------------------------------- faults


def test_nan_is_an_error_that_names_prompt_and_seed(run, monkeypatch):
    whole = hasty_sample.decode

    def overflow(vae, latents):
        images = whole(vae, latents)
        images[1, 0, 3, 3] = float("nan")
        return images

    monkeypatch.setattr(hasty_sample, "decode", overflow)
    code, _, err = run("hasty_sample", *FAST, "--limit", 3, "--seed", 40, "--output-dir", "out")
    prompt = (ROOT / hasty_sample.DEMO["prompts"]).read_text().splitlines()[1]
    assert code == 2 and "NaN" in err and prompt in err and "seed 41" in err
    assert not Path("out/00001.png").exists() and Path("out/00000.png").exists()


def test_a_full_disk_is_said_and_loses_nothing(run, monkeypatch):
    save, calls = Image.Image.save, []

    def full(self, file, *arguments, **more):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half a picture")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, file, *arguments, **more)

    flags = (*FAST, "--limit", 3, "--output-dir", "out")
    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run("hasty_sample", *flags)
    assert code == 2 and "out: No space left on device" in err and "Traceback" not in err
    assert sorted(p.name for p in Path("out").glob("*.png")) == ["00000.png", "00002.png"]
    monkeypatch.setattr(Image.Image, "save", save)
    code, out, _ = run("hasty_sample", *flags)
    assert code == 0 and "2 of 3 images" in out and not list(Path("out").glob(".*"))


def test_out_of_memory_halves_the_batch(run, monkeypatch):
    sample, sizes = hasty_sample.sample, []

    def small_gpu(pipe, batch, *arguments):
        sizes.append(len(batch.prompts))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return sample(pipe, batch, *arguments)

    monkeypatch.setattr(hasty_sample, "sample", small_gpu)
    code, _, err = run("hasty_sample", *FAST, "--limit", 5, "--batch-size", 8, "--output-dir", "out")
    assert code == 0 and sizes == [5, 2, 2, 1]
    assert "going on with batches of 2" in err
    assert len(pd.read_csv("out/images.csv")) == 5


def test_not_even_one_image_fits(run, monkeypatch):
    def no_gpu(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(hasty_sample, "sample", no_gpu)
    code, _, err = run("hasty_sample", *FAST, "--limit", 1, "--output-dir", "out")
    assert code == 2 and "one image alone does not fit" in err


def test_given_timesteps_and_align_your_steps(run):
    """The ten of Align Your Steps, given by hand or by name, make one and the same picture, unlike 10 leading steps."""
    ten = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)
    flags = ("--demo", "--limit", 1, "--num-inference-steps", 10, "--output-dir")
    for folder, more in {"a": ("--timesteps", *ten), "b": ("--timestep-spacing", "ays"), "c": ()}.items():
        code, _, err = run("hasty_sample", *flags, folder, *more)
        assert code == 0, err
    assert (pixels(Path("a/00000.png")) == pixels(Path("b/00000.png"))).all()
    assert np.abs(pixels(Path("a/00000.png")) - pixels(Path("c/00000.png"))).max() > 5
    record = read_record(Path("a/00000.png"))
    assert record["timesteps"] == list(ten) and record["num_inference_steps"] == 10
    assert "Timesteps: 999 845" in Image.open("a/00000.png").info["parameters"]
    code, out, err = run("hasty_sample", *flags, "a", "--timesteps", *ten)
    assert code == 0 and "1 of 1 images are in a already" in out, err
    for more, said in (
        (("--timesteps", 10, 20), "--timesteps 10 20: give numbers from 999 down to 0, each below the one before"),
        (("--timesteps", 1000, 20), "--timesteps 1000 20: give numbers"),
        (("--timestep-spacing", "ays", "--num-inference-steps", 60), "ays: made for few steps, not 60; use 50 or fewer"),
    ):
        code, _, err = run("hasty_sample", *flags, "d", *more)
        assert code == 2 and said in err and not Path("d").exists(), err
