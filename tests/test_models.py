"""Models from folders, and pictures from latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO
from helpers import SAMPLERS, script

from dipo.devices import DTYPES
from dipo.models import decode as decode_images


@pytest.mark.parametrize(("side", "calls"), [(16, [5]), (128, [1] * 5), (64, [4, 1])])
def test_decoding_takes_the_area_of_one_sdxl_image_at_a_time(side, calls):
    """More would need more memory than one image of 1024x1024 does."""
    seen = []

    def decode(z, return_dict):
        seen.append(len(z))
        return (z[:, :3] * 2,)

    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5), dtype=torch.float32, decode=decode)
    latents = torch.randn(5, 4, side, side)
    assert torch.equal(decode_images(vae, latents), latents[:, :3] * 4) and seen == calls


def test_decoded_images_outlive_the_next_ones():
    """A decoder compiled with CUDA graphs gives the same memory each time."""
    memory = torch.zeros(1, 3, 128, 128)

    def decode(z, return_dict):
        return (memory.copy_(z[:, :3]),)

    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), dtype=torch.float32, decode=decode)
    latents = torch.randn(3, 4, 128, 128)
    assert torch.equal(decode_images(vae, latents), latents[:, :3])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_traps_of_other_peoples_model_folders(tmp_path, dtype, name):
    """A scheduler file without the keys that DDIM would fill in with True, and a VAE that must not run in fp16."""
    shutil.copytree(DEMO, tmp_path / "model")
    for part, change in (("scheduler/scheduler_config", {}), ("vae/config", {"force_upcast": True})):
        path = tmp_path / "model" / f"{part}.json"
        config = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("clip_sample", "set_alpha_to_one")}))
    module = script(name)
    settings = module.Settings(base_model=str(tmp_path / "model"), dpo_unet="", vae="")
    pipe = module.load_pipeline(settings, torch.device("cpu"), DTYPES[dtype])
    assert pipe.scheduler.config.clip_sample is False and pipe.scheduler.config.set_alpha_to_one is False
    assert pipe.unet.dtype == DTYPES[dtype] and pipe.vae.dtype == torch.float32
