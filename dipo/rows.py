"""Rows of a study from YAML files such as rows/training_free.yaml: what else people sample with."""

import inspect
import re
from dataclasses import replace

import diffusers
import yaml
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps

from dipo.checks import check_etas, check_lora, check_models, check_steps, check_timesteps
from dipo.cli import UserError, first_line
from dipo.files import find_path
from dipo.settings import StudySettings
from dipo.study import Row

# What a file can say of a row; what it leaves out is as the study's settings have it. steps: a row for each. dpo_lora:
# merged besides the study's own, unless the row has its own dpo_unet too. note: for readers.
KINDS = {"label": str, "scheduler": str, "options": dict, "steps": int | list, "timesteps": list, "eta": int | float}
KINDS |= {"guidance_scale": int | float, "timestep_spacing": str, "dpo_unet": str, "dpo_lora": list, "note": str}
SPACINGS = ("leading", "trailing", "linspace", "ays")
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def read_rows(s: StudySettings, taken: list[Row]) -> list[Row]:
    """The rows of the files --rows. UserError for what a file cannot mean, and for a row whose folder is taken."""
    rows = []
    for file in s.rows:
        path = find_path(file)
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
            labels = [entry["label"] for entry in entries]
        except Exception as e:
            what = f"not a list of rows with labels ({first_line(e)})" if path else "no such file"
            raise UserError(f"--rows {file}: {what}; rows/training_free.yaml shows the form") from e
        for label, entry in zip(labels, entries, strict=True):
            try:
                rows += rows_of(s, **entry)
            except (UserError, ValueError, TypeError) as e:
                raise UserError(f"--rows {file}: {label}: {first_line(e)}") from e
    variants = [row.variant for row in (*taken, *rows)]
    if twice := [row.label for row in rows if variants.count(row.variant) > 1]:
        raise UserError(f"--rows: {twice[0]!r} is there twice; give every row a label of its own")
    return rows


def rows_of(s: StudySettings, **entry) -> list[Row]:
    """The rows of an entry, one for each of its steps."""
    for key, value in entry.items():
        if not isinstance(value, KINDS.get(key, ())):
            raise UserError(f"{key}: {value!r} cannot be; a row has {', '.join(KINDS)}")
    label, steps, tau = entry["label"], entry.pop("steps", 0), tuple(entry.get("timesteps", ()))
    if bool(steps) == bool(tau):
        raise UserError("give either steps or timesteps")
    loras = (*(() if "dpo_unet" in entry else s.dpo_lora), *entry.get("dpo_lora", ()))
    entry |= {"timesteps": tau, "dpo_lora": loras if {"dpo_lora", "dpo_unet"} & {*entry} else None}
    check_etas("eta", entry.get("eta", 0))
    check_timesteps(tau)
    if (spacing := entry.get("timestep_spacing", "ays")) not in SPACINGS:
        raise UserError(f"timestep_spacing: {spacing}: use one of {', '.join(SPACINGS)}")
    rows = []
    for n in [steps or len(tau)] if tau or isinstance(steps, int) else steps:
        check_steps("steps", n)
        name = re.sub(r"\W+", "-", f"{label} {n}".lower()).strip("-")
        shared = {k: v for k, v in entry.items() if k not in ("label", "note")}
        rows.append(checked(Row(variant=name, label=f"{label}, {n} steps", group=label, steps=n, **shared), s))
    return rows


def checked(row: Row, s: StudySettings) -> Row:
    """The row with the UNet calls that its scheduler makes, such as Heun's two a step. UserError for models that could not
    be, for no scheduler of diffusers, and for steps that would not start near the last timestep."""
    own = row.of(s)
    check_models(own)
    for lora in own.dpo_lora:
        check_lora(lora)
    if own.timestep_spacing == "ays" and (row.steps > 50 or row.scheduler != "ddim"):
        raise UserError("timestep_spacing: ays is for 50 steps at most of ddim; give others the timesteps themselves")
    if row.scheduler == "ddim":
        return row
    cls = getattr(diffusers, row.scheduler, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UserError(f"scheduler {row.scheduler}: diffusers has no such class; give one, or ddim")
    if unknown := row.options.keys() - inspect.signature(cls.__init__).parameters.keys():
        raise UserError(f"options: {row.scheduler} of diffusers {diffusers.__version__} has no {', '.join(sorted(unknown))}")
    if row.eta and "eta" not in inspect.signature(cls.step).parameters:
        raise UserError(f"eta {row.eta}: {row.scheduler} has none; leave it out")
    calls = scheduled(row, SDXL, own.timestep_spacing, row.steps).timesteps
    if not row.timesteps and calls[0] < 1000 - 2.5 * 1000 / row.steps:
        first = f"{row.steps} {own.timestep_spacing} steps would start at t = {calls[0]:.0f} from pure noise"
        raise UserError(f"{first}; use fewer, or timestep_spacing: trailing")
    return replace(row, calls=len(calls))


def scheduled(row: Row, config: dict, spacing: str, steps: int, device="cpu"):
    """The row's scheduler for a model whose own has this configuration, set to so many steps, or to the row's timesteps."""
    cls = getattr(diffusers, row.scheduler)
    scheduler = cls.from_config(config, timestep_spacing=spacing, **row.options)
    if row.timesteps:
        retrieve_timesteps(scheduler, device=device, timesteps=list(row.timesteps[:steps]))
    else:
        scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        # Without it a scheduler looks its step up on the device, and waits.
        scheduler.set_begin_index(0)
    return scheduler
