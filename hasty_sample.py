"""Sample Stable Diffusion XL with a DPO-trained UNet by DDIM: prompts in, PNGs out, in 20 to 50 steps instead of 500.

DIPO changes no training objective: a UNet trained with Diffusion-DPO is put into SDXL, a DDIM scheduler is swapped in,
and the sampling loop below runs over a short subsequence of the 1,000 training timesteps.

    python hasty_sample.py --demo                                      # the small model in assets/demo, without GPU
    python hasty_sample.py --output-dir generated_images/sdxl          # SDXL and the DPO UNet, from the hub or its cache
    python hasty_sample.py --prompts prompts.txt --num-inference-steps 50 --eta 0.5 --output-dir generated_images/mine
    python hasty_sample.py --prompts parti --limit 100 --base-model models/sdxl --output-dir generated_images/parti
    accelerate launch hasty_sample.py --prompts prompts.txt            # shares the images out over all GPUs

To use other models, edit the paths at the top of Settings or pass them as flags. The output folder gets 00000.png and
so on (each with its settings inside, readable by AUTOMATIC1111's web UI), grid.png and images.csv. A run that was
stopped goes on when the same command is given again; a folder holds the images of one set of settings.
"""

from dataclasses import dataclass
from typing import Literal

from dipo import cli
from dipo.settings import SamplingSettings


@dataclass(kw_only=True)
class Settings(SamplingSettings):
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    dpo_unet: str = "mhdang/dpo-sdxl-text2image-v1"
    dpo_lora: tuple[str, ...] = ()
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    parti: str = "nateraw/parti-prompts"
    pickapic: str = "yuvalkirstain/pickapic_v2"
    prompts: str = ""
    """a .txt with a prompt a line, a .csv, .tsv, .json, .jsonl or .parquet, a folder of such files, parti, pickapic or
    hpdv2; empty: EXAMPLE_PROMPTS"""
    output_dir: str = "generated_images/hasty_sample"

    num_inference_steps: int = 30
    """DDIM steps, 1 to 1000"""
    timestep_spacing: Literal["auto", "leading", "trailing", "linspace", "ays"] = "auto"
    """auto: the base model's own, leading for SDXL; ays: Align Your Steps (Sabour et al. 2024), made for 10 steps"""
    timesteps: tuple[int, ...] = ()
    """the timesteps themselves instead, each below the one before, such as 999 845 730 587 443 310 193 116 53 13"""
    eta: float = 0.0
    """share of the ancestral noise, 0 (DDIM) to 1 (DDPM on the same timesteps)"""
    guidance_interval: tuple[float, float] | None = None
    """guide only at noise levels sigma = sqrt(1 / alpha_bar - 1) above the first number and up to the second, which changes
    the images; 0.28 5.42 is Kynkäänniemi et al. 2024's for SDXL. Steps outside cost half the operations"""
    negative_prompt: str = ""
    """what to steer away from; empty: SDXL's own unconditional embeddings"""


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

import math
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

from dipo.batches import Batch, Batches
from dipo.checks import check_sampling, check_timesteps, completed
from dipo.compiled import projected_once
from dipo.devices import DTYPES, claimed, dtype_for, start
from dipo.files import fingerprint, finished_images, lora_names, read_record, writable_folder, write_csv
from dipo.grids import remove_grids, save_grids
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, image_settings, load_part, pipeline_class, ready, warn_of_long_prompts
from dipo.prompts import one_line, read_prompts
from dipo.timesteps import noise_level, subsequence, successive

# What --demo sets besides the demo's models, wherever the command line left the default.
DEMO = {"prompts": "assets/demo/prompts.txt"}
EXAMPLE_PROMPTS = (
    "a close-up portrait of an old fisherman in a yellow raincoat, soft window light",
    "a young woman with freckles reading in a train, 35mm photograph",
    "an oil painting of a king with a parrot on his shoulder",
    "a lighthouse on a cliff above a stormy sea at dusk",
    "terraced rice fields at sunrise, fog in the valley",
    "a frozen lake under the northern lights, wide angle",
    "abstract composition of overlapping circles in teal and copper",
    "swirling ink in water, deep blue and gold, macro",
)


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline, batch: Batch, tau: list[int], eta: float, w: float, interval=None, negative_prompt=""
) -> torch.Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16) with classifier-free guidance w (Ho and Salimans 2022).

    tau: timesteps, descending. eta: 0 (DDIM) to 1 (ancestral DDPM). w: 1 or less for no guidance. interval: the noise levels
    that are guided, low < sigma <= high (Kynkäänniemi et al. 2024, equation 6); None: all. Returns latents, float32
    (B, 4, H/8, W/8). Nothing in the loop waits for the device. The UNet predicts the noise e, or v (Salimans and Ho 2022).
    """
    low, high = interval or (0, math.inf)
    text = encode(pipe, batch, w > 1, negative_prompt)
    predicts_v = pipe.scheduler.config.prediction_type == "v_prediction"
    x = batch.noise()
    with projected_once(pipe.unet, text):
        for t, a_t, a_next in batch.progress(successive(pipe.scheduler, tau, x.device)):
            guided = w > 1 and low < noise_level(a_t) <= high
            x_in = torch.cat([x, x]) if guided else x
            out = pipe.unet(x_in.to(text.prompt_embeds.dtype), t, **text.last(len(x_in)))[0].to(x.dtype)
            if guided:
                uncond, cond = out.chunk(2)
                out = uncond + w * (cond - uncond)
            if predicts_v:
                x_0, e = sqrt(a_t) * x - sqrt(1 - a_t) * out, sqrt(a_t) * out + sqrt(1 - a_t) * x
            else:
                x_0, e = (x - sqrt(1 - a_t) * out) / sqrt(a_t), out
            variance = eta**2 * (1 - a_next) / (1 - a_t) * (1 - a_t / a_next)
            x = sqrt(a_next) * x_0 + sqrt(1 - a_next - variance) * e
            if variance > 0:
                x = x + sqrt(variance) * batch.noise()
    return x


def load_pipeline(s: Settings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """SDXL (or SD 1.5, 2.1) with the DPO-trained UNet and a DDIM scheduler swapped in."""
    loras, parts = read_loras(s), {}
    if s.dpo_unet:
        parts["unet"] = load_part(UNet2DConditionModel, "dpo-unet", s.dpo_unet, "unet", dtype, s.base_model)
    if s.vae:
        parts["vae"] = load_part(AutoencoderKL, "vae", s.vae, "vae", dtype, s.base_model)
    pipe = load_part(pipeline_class(s.base_model), "base-model", s.base_model, "", dtype, **parts)
    # from_config would fill in True for both where the file lacks them, and clipping ruins latents.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    merge_loras(pipe, loras, s.lora_strict)
    return ready(pipe, s, device)


def wanted_images(s: Settings, prompts: list[str], dtype_name: str) -> tuple[dict[str, dict], dict]:
    """The settings of every image by its file in the folder, and those that all have in common."""
    common = image_settings(s, dtype_name)
    # In the order in which images have had them since before there was a dpo_lora.
    common["weights"] = fingerprint(s.base_model, s.dpo_unet, s.vae, *lora_names(s.dpo_lora))
    common |= {"num_inference_steps": s.num_inference_steps, "eta": s.eta, "negative_prompt": s.negative_prompt}
    common |= {"timesteps": list(s.timesteps), "guidance_interval": s.guidance_interval and list(s.guidance_interval)}
    wanted = {
        f"{i:05d}.png": {"prompt": prompts[i // s.images_per_prompt], "seed": s.seed + i} | common
        for i in range(len(prompts) * s.images_per_prompt)
    }
    return wanted, common


def make_images(s: Settings, todo: dict[Path, dict], state, device: torch.device, dtype: torch.dtype) -> None:
    """Sample this process's share of the missing images and save them."""
    pipe = load_pipeline(s, device, dtype)
    tau = list(s.timesteps) or subsequence(pipe, s.num_inference_steps, s.timestep_spacing)
    low, high = s.guidance_interval or (0, math.inf)
    guided = [low < noise_level(a_t) <= high for _, a_t, _ in successive(pipe.scheduler, tau, device)]
    if state.is_main_process:
        warn_of_long_prompts(pipe, [*(r["prompt"] for r in todo.values()), s.negative_prompt])
        if tau[0] < 900:
            first = f"{len(tau)} {'given' if s.timesteps else s.timestep_spacing} steps start at t = {tau[0]}"
            cli.warn(f"{first}, not near 999; use --timestep-spacing trailing for so few")
        if s.guidance_interval:
            none = "" if any(guided) else "; that is --guidance-scale 1"
            print(f"guidance in {sum(guided)} of {len(guided)} steps{none}")
    # Two steps, and one wherever guidance begins or ends, as that is another batch for the UNet.
    warm_up = [t for i, t in enumerate(tau) if i < 2 or guided[i] != guided[i - 1]]
    share = {path: todo[path] for path in list(todo)[state.process_index :: state.num_processes]}
    with tqdm(total=len(share) * len(tau), unit="step", disable=not state.is_local_main_process) as bar:
        for batch in Batches(pipe, share, tau, min(s.batch_size, len(share)), bar, s.compile, timing=False, warm_up=warm_up):
            with batch:
                with batch.timed("seconds_per_image"):
                    latents = sample(pipe, batch, batch.tau, s.eta, s.guidance_scale, s.guidance_interval, s.negative_prompt)
                    images = decode(pipe.vae, latents)
                batch.save(images)


def report(s: Settings, paths: list[Path], new: dict[Path, dict]) -> None:
    """Write images.csv and the grid from the finished PNGs, and say where they are and how long the new ones took."""
    out, records = paths[0].parent, [read_record(path) for path in paths]
    table = pd.DataFrame({"file": path.name} | record for path, record in zip(paths, records, strict=True))
    columns = s.images_per_prompt if 1 < s.images_per_prompt <= 8 else max(4, math.isqrt(len(paths)))
    remove_grids(out)
    grids = save_grids(out, "grid", {"": paths}, list(table["prompt"]), font=s.font, columns=columns)
    seconds = [r["seconds_per_image"] for path, r in zip(paths, records, strict=True) if path in new]
    speed = f"{np.median(seconds):.2f} s per image (median), " if seconds else ""
    print(f"{len(paths)} images, {speed}{', '.join(map(str, [write_csv(out / 'images.csv', table), *grids]))}")


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    check_sampling(s)
    check_timesteps(s.timesteps)
    if s.timestep_spacing == "ays" and s.num_inference_steps > 50:
        raise cli.UserError(f"--timestep-spacing ays: made for few steps, not {s.num_inference_steps}; use 50 or fewer")
    if s.guidance_interval:
        low, high = s.guidance_interval
        if not 0 <= low < high < math.inf:
            what = "use two noise levels, the lower one first; SDXL's go from 0.03 to 14.6"
            raise cli.UserError(f"--guidance-interval {low} {high}: {what}")
        if s.guidance_scale <= 1:
            raise cli.UserError(f"--guidance-interval: --guidance-scale {s.guidance_scale:g} switches it off; use above 1")


def main(s: Settings) -> None:
    s = completed(s, DEMO)
    check_settings(s)
    s = replace(fitted(s), num_inference_steps=len(s.timesteps) or s.num_inference_steps)
    s = replace(s, negative_prompt=one_line(s.negative_prompt))
    prompts = read_prompts(s.prompts, s.parti, s.pickapic)["prompt"].tolist() if s.prompts else [*EXAMPLE_PROMPTS]
    state, device = start(s.device)
    dtype_name = dtype_for(s.dtype, device)
    out = writable_folder(s.output_dir)
    with claimed(out, state):
        wanted, common = wanted_images(s, prompts[: s.limit], dtype_name)
        # Images of a longer run before belong to the folder too, if they were made with the same settings.
        numbered = [p for p in out.glob("[0-9]" * 5 + "*.png") if p.stem.isdecimal() and read_record(p)]
        others = {p.name: common | {"seed": s.seed + int(p.stem)} for p in numbered}
        done = finished_images(out, dict(sorted((others | wanted).items())), s.overwrite)
        todo = {out / file: record for file, record in wanted.items() if file not in done}
        # Every process has to have looked before the first one writes.
        state.wait_for_everyone()
        if state.is_main_process:
            gone = others.keys() - wanted.keys() - done.keys()
            for path in [*out.glob(".*.png*.part"), *out.glob(".*.csv.part"), *(out / file for file in gone)]:
                path.unlink()
            if len(todo) < len(wanted):
                print(f"{len(wanted) - len(todo)} of {len(wanted)} images are in {out} already")
        state.wait_for_everyone()
        if todo:
            make_images(s, todo, state, device, DTYPES[dtype_name])
        state.wait_for_everyone()
        if state.is_main_process:
            report(s, [out / file for file in wanted], todo)
    state.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
