"""The four studies: what they sample, what they write, how they go on, what they say of bad input."""

import pytest
import torch
from conftest import DEMO
from diffusers import StableDiffusionXLPipeline

import compare_quality as cq


@pytest.mark.parametrize("key", list(cq.SAMPLERS))
def test_other_samplers_are_the_stock_pipelines(demo_pipe, key):
    """Latents of diffusers' own StableDiffusionXLPipeline with the same scheduler, prompts, seeds and UNet."""
    label, cls = cq.SAMPLERS[key]
    stock = StableDiffusionXLPipeline.from_pretrained(DEMO, unet=demo_pipe.unet, add_watermarker=False).to(torch.float32)
    stock.scheduler = cls.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    prompts = ["a landscape with green hills under a red sky and a purple sun", "abstract art, blue star, white centre"]
    wanted = stock(
        prompts,
        num_inference_steps=20,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
        output_type="latent",
    ).images
    records = [{"prompt": p, "seed": s, "height": 64, "width": 64} for p, s in zip(prompts, (3, 4), strict=True)]
    got = cq.sample_latents(cq.Settings(), demo_pipe, cq.Variant("x", label, 20, 0.0, label), records)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    by_ddim = cq.sample_latents(cq.Settings(), demo_pipe, cq.Variant("x", "DIPO", 20), records)
    assert (by_ddim - wanted).abs().max() > 1e-2
