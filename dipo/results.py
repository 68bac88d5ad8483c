"""What a training run leaves: validation pictures, loss.png, weights with settings and a model card; its upload."""

import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import matplotlib.figure
import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm

from dipo.cli import UserError, clean, first_line
from dipo.devices import DTYPES
from dipo.files import find_path, write_text, written_whole
from dipo.grids import save_grids
from dipo.models import decode
from dipo.training import autocast, picture_size, result_flags


def base_pictures(out: Path, prompts: list[str]) -> list[Path]:
    return [out / "validation" / f"base-{i}.png" for i in range(len(prompts))]


@torch.no_grad()
def validate(s, pipe, unet, prompts: list[str], accelerator: Accelerator, out: Path, step: int) -> None:
    """validation/step-N.png: the base model's pictures above those of this step, 30 DDIM steps, guidance 5, same seeds.
    Step 0 is the base model. Every process samples, as a UNet in parts needs all of them, and the first one writes."""
    base, main = base_pictures(out, prompts), accelerator.is_main_process
    made = [p.with_name(f"{step:07d}-{i}.png") for i, p in enumerate(base)] if step else base
    base[0].parent.mkdir(exist_ok=True)
    trained_unet, training = pipe.unet, unet.training
    pipe.unet = accelerator.unwrap_model(unet).eval()
    options = {"num_inference_steps": 30, "guidance_scale": 5.0, "output_type": "latent"}
    options["height"] = options["width"] = picture_size(s, pipe)
    for i, prompt in enumerate(tqdm(prompts, desc="validation", leave=False, disable=not main)):
        with autocast(accelerator):
            generator = torch.Generator().manual_seed(i)
            latents = pipe(prompt, generator=generator, **options).images
        if main:
            with written_whole(made[i]) as part:
                pipe.image_processor.postprocess(decode(pipe.vae, latents))[0].save(part, format="PNG")
    pipe.unet.train(training)
    pipe.unet = trained_unet
    if main and step:
        save_grids(base[0].parent, f"step-{step:07d}", {"base": base, f"step {step}": made}, prompts, columns=len(prompts))
        for path in made:
            path.unlink()


def plot_metrics(out: Path, start: float | None) -> None:
    """loss.png: loss (with a line at its start, where that is known), implicit accuracy, and how the noise errors of winners
    and losers changed, over the steps, each step and a running mean."""
    table = pd.read_csv(out / "metrics.csv")
    window = max(1, len(table) // 20)
    errors, changes = (table.reindex(columns=[f"{side}_{x}" for side in ("winner", "loser")]) for x in ("mse", "change"))
    before = (errors - changes.to_numpy()).rolling(window, min_periods=1).mean()
    changes = 100 * changes / before.to_numpy()
    panels = [
        ("loss", {"": table.loss}, start, "where it starts"),
        ("implicit accuracy", {"": table.implicit_accuracy}, 0.5, "chance"),
        ("change of the noise error, %", {"winners, ": changes.winner_change, "losers, ": changes.loser_change}, 0, None),
    ]
    figure = matplotlib.figure.Figure(figsize=(7, 7.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (title, curves, level, name) in zip(axes, panels, strict=True):
        for (of, curve), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=False):
            axis.plot(table.step, curve, color=colour, alpha=0.3, lw=1, label=f"{of}each step")
            mean = curve.rolling(window, min_periods=1).mean()
            axis.plot(table.step, mean, color=colour, lw=2, label=f"{of}mean of the last {window}")
        if level is not None:
            axis.axhline(level, color="grey", ls="--", lw=1, label=name)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[2].set_xlabel("optimizer step")
    with written_whole(out / "loss.png") as part:
        figure.savefig(part, format="png", dpi=120)


def save_result(s, out: Path, unet: UNet2DConditionModel, weights: dict, summary: dict) -> None:
    """unet/ or pytorch_lora_weights.safetensors in save_dtype, settings.yaml and the model card, each whole or not there.
    weights: the trained UNet's state dict. summary: what the run came to, for settings and card."""
    dtype = DTYPES[s.save_dtype]
    if s.lora_rank:
        # With alpha in B no reader has to know of it.
        scale = (s.lora_alpha or s.lora_rank) / s.lora_rank
        layers = get_peft_model_state_dict(unet, state_dict=weights)
        layers = {k: (v * scale if "lora_B" in k else v).to(dtype) for k, v in layers.items()}
        with written_whole(out / "pytorch_lora_weights.safetensors") as part:
            layers = convert_state_dict_to_diffusers(layers)
            StableDiffusionXLPipeline.save_lora_weights(out, unet_lora_layers=layers, weight_name=part.name)
    else:
        with torch.device("meta"):
            result = UNet2DConditionModel.from_config(unet.config)
        result.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
        with written_whole(out / "unet") as part:
            shutil.rmtree(part, ignore_errors=True)
            result.save_pretrained(part)
    write_text(out / "settings.yaml", yaml.safe_dump(asdict(s) | summary, sort_keys=False))
    write_text(out / "README.md", model_card(s, summary))


def model_card(s, summary: dict) -> str:
    kind, name = "LoRA" if s.lora_rank else "UNet", s.push_to_hub or s.output_dir
    use = f'pipe.unet = UNet2DConditionModel.from_pretrained("{name}", subfolder="unet")'
    if s.lora_rank:
        use = f'pipe.load_lora_weights("{name}")'
    how = "Diffusion-DPO" if s.loss == "dpo" else f"the loss {s.loss} (dipo/losses.py)"
    data = huggingface_hub.ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusion-dpo" if s.loss == "dpo" else s.loss, "dipo"] + (["lora"] if s.lora_rank else []),
        # Of a file on the hub, its repository.
        base_model="/".join(s.base_model.split("/")[:2]) if find_path(s.base_model) is None else None,
        datasets=[s.dataset] if find_path(s.dataset) is None else None,
    )
    rows = "\n".join(f"| {k} | {v} |" for k, v in (asdict(s) | summary).items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {kind} trained with {how}\n\n"
        f"Trained by train_dipo.py from {s.init_unet or s.base_model} on {s.dataset}: {summary['steps']} steps of "
        f"{s.effective_batch_size} pairs. Made to be sampled by DDIM in 20 to 50 steps:\n\n"
        f'```bash\npython hasty_sample.py --base-model {s.base_model} --vae "{s.vae}" {result_flags(s, name)}\n```\n\n'
        f"or with diffusers, `{use}` and a `DDIMScheduler`.\n\n| setting | value |\n|---|---|\n{rows}\n"
    )


def check_upload(name: str) -> None:
    """UserError unless name is owner/name, and the hub knows a token that is here and may write for that owner."""
    flag = f"--push-to-hub {name}"
    try:
        huggingface_hub.utils.validate_repo_id(name)
        owner, repo = name.split("/")
    except ValueError as e:
        raise UserError(f"{flag}: is not the name of a hub repository; give owner/name") from e
    try:
        me = huggingface_hub.whoami()
    except Exception as e:
        hub, todo = clean(huggingface_hub.constants.ENDPOINT), "look at HF_TOKEN (or `hf auth login`) and the connection"
        raise UserError(f"{flag}: {hub} takes no token from here ({first_line(e)}); {todo}") from e
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"{flag}: the token may only read; give one that may write, of huggingface.co/settings/tokens")
    owners = [me["name"], *(org["name"] for org in me.get("orgs", []))]
    # What a fine-grained token may do is the hub's to judge.
    if role == "write" and owner.lower() not in [x.lower() for x in owners]:
        raise UserError(f"{flag}: the token may not write there; give {' or '.join(f'{x}/{repo}' for x in owners)}")


def upload_result(s, out: Path, step: int) -> None:
    """Upload what a finished run leaves but checkpoints, cache and events. UserError with the command that does it later."""
    files = ["pytorch_lora_weights.safetensors" if s.lora_rank else "unet/*", "README.md", "settings.yaml", "metrics.csv"]
    files += ["loss.png", f"validation/step-{step:07d}*.png"]
    try:
        url = huggingface_hub.create_repo(s.push_to_hub, private=True, exist_ok=True)
        what = {"allow_patterns": files, "commit_message": f"train_dipo.py, {step} steps"}
        huggingface_hub.upload_folder(repo_id=s.push_to_hub, folder_path=out, **what)
    except Exception as e:
        command = ["hf", "upload", s.push_to_hub, str(out), ".", "--private", *(f"--include={x}" for x in files)]
        what = f"not uploaded ({first_line(e)}); the result is kept in {out}, upload it with {shlex.join(command)}"
        raise UserError(f"--push-to-hub {s.push_to_hub}: {what}") from e
    print(f"{out}: uploaded to {url}")
