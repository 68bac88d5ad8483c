"""What several test files need: child processes, the loops of the scripts, pictures."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from dipo.batches import Batch
from dipo.files import ROOT
from dipo.rows import read_rows
from dipo.settings import DEMO_PATHS

STUDIES = ("compare_quality", "Ablation_experiment", "Semantic_Categories", "Human_Preference_compare")
SAMPLERS = ("hasty_sample", *STUDIES)
SCRIPTS = (*SAMPLERS, "train_dipo", "download_models")
PROMPTS = ["a landscape with red hills under a white sky and a yellow sun", "abstract art of a blue star"]


def script(name):
    return importlib.import_module(name)


def listen_to_ctrl_c():
    """A shell starts the jobs of a script in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def popen(*command, **options):
    """A child process to which Ctrl-C can be sent."""
    return subprocess.Popen([str(x) for x in command], preexec_fn=listen_to_ctrl_c, text=True, **options)


def start(*command, cwd=None, timeout=300, **environment):
    """A finished child process, its output as text."""
    env = os.environ | environment
    command = [str(x) for x in command]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, preexec_fn=listen_to_ctrl_c
    )


def start_two(name, *flags, cwd=None):
    """A script on two processes of this machine's CPU; the finished launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return start(*launch, ROOT / f"{name}.py", *flags, cwd=cwd, OMP_NUM_THREADS="1")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def demo_settings(name="hasty_sample", **more):
    """A script's settings with the demo's models."""
    module = script(name)
    paths = {k: v for k, v in DEMO_PATHS.items() if hasattr(module.Settings, k)}
    return module.Settings(**paths, **more)


def study_rows(*files, **more):
    """The rows of such files, for compare_quality.py with the demo's models."""
    return read_rows(demo_settings("compare_quality", rows=files, timestep_spacing="leading", **more), [])


def load(name="hasty_sample", **more):
    """The demo model as a script loads it, float32 on the CPU."""
    return script(name).load_pipeline(demo_settings(name, **more), torch.device("cpu"), torch.float32)


def latents(pipe, prompts, tau, eta=0.0, w=5.0, seeds=(0, 1), size=(64, 64), name="hasty_sample", **more):
    """What a script's loop makes of prompts and seeds."""
    batch = Batch(pipe, list(prompts), list(seeds), *size)
    return script(name).sample(pipe, batch, tau, eta, w, **more)


# ------------------------------------------------------------------------------------------------------- the loop alone


class Noise(Batch):
    """A batch of one image whose noise is what it was given, in float64."""

    def __init__(self, *values, shape=(1, 4, 8, 8)):
        self.prompts, self.height, self.width, self.device = [""], 64, 64, torch.device("cpu")
        self.values = [torch.full(shape, float(v), dtype=torch.float64) for v in values]

    def noise(self):
        return self.values.pop(0)


def bare_pipe(unet, alphas_cumprod):
    """A pipeline that has no more than the loop asks for: a function of x and t as its UNet, and alpha_bar."""
    config = SimpleNamespace(prediction_type="epsilon")
    scheduler = SimpleNamespace(alphas_cumprod=alphas_cumprod, final_alpha_cumprod=alphas_cumprod[0], config=config)
    text = (torch.zeros(1, 77, 8, dtype=torch.float64), None, torch.zeros(1, 8, dtype=torch.float64), None)

    def call(x, t, **_):
        return (unet(x, t),)

    call.device = torch.device("cpu")
    return SimpleNamespace(unet=call, scheduler=scheduler, encode_prompt=lambda *_, **__: text)


def coefficients(a_t, a_next, eta, name="hasty_sample"):
    """The (a, b, sigma) of a loop's one step x_next = a x + b e + sigma z from alpha_bar a_t to a_next, in float64."""
    alphas = torch.tensor([a_next, a_t], dtype=torch.float64)

    def step(x, e, z):
        pipe = bare_pipe(lambda *_: torch.full((1, 4, 8, 8), float(e), dtype=torch.float64), alphas)
        return script(name).sample(pipe, Noise(x, z), [1], eta, 1.0)[0, 0, 0, 0].item()

    return step(1, 0, 0), step(0, 1, 0), step(0, 0, 1)
