"""Pictures of any origin as RGB, and the prompts that other programs wrote into them."""

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

# What Pillow raises for files that are no whole picture.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, KeyError, RuntimeError, Image.DecompressionBombError)


def open_picture(source: Path | bytes) -> Image.Image:
    """A picture file, or its bytes, in RGB of 8 bits: upright by its EXIF orientation, transparent parts over white, 16 bits
    scaled, the first frame of several. Raises one of UNREADABLE; ValueError for pixels whose white is not known."""
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"its values, {values.min():g} to {values.max():g}, are not of 8 or 16 bits")
            if (clear := image.info.get("transparency")) is not None:
                values = np.where(values == clear, 65535, values)
            return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def prompt_inside(path: Path) -> str:
    """The prompt that AUTOMATIC1111's web UI or ComfyUI wrote into a picture, "" where there is none. ValueError where it
    cannot be told which of several; UNREADABLE for what is no picture."""
    with Image.open(path) as image:
        # A PNG's EXIF would have its pixels read.
        info, exif = image.info, image.getexif() if image.format != "PNG" else Image.Exif()
    if prompt := webui_prompt(info.get("parameters") or user_comment(exif)):
        return prompt
    graph = info.get("prompt") or str(exif.get(ExifTags.Base.Model, "")).partition("prompt:")[2]
    try:
        nodes = json.loads(graph or "null")
    except (ValueError, TypeError, RecursionError):
        return ""
    return comfyui_prompt(nodes) if isinstance(nodes, dict) else ""


def user_comment(exif: Image.Exif) -> str:
    """EXIF's UserComment, whose first 8 bytes name its encoding. The web UI writes UTF-16 with its high bytes first."""
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    comment = comment.encode() if isinstance(comment, str) else bytes(comment)
    if not comment.startswith(b"UNICODE\0"):
        return comment.removeprefix(b"ASCII\0\0\0").decode("utf-8", "ignore")
    big = comment[8::2].count(0) >= comment[9::2].count(0)
    return comment[8:].decode("utf-16-be" if big else "utf-16-le", "ignore")


def webui_prompt(text: str) -> str:
    """The prompt in the web UI's parameters, found as it finds it: what stands before a line "Negative prompt:" and before
    the last line, that of the settings; "" for a text without such a line."""
    *lines, settings = text.strip("\0 \r\n").split("\n")
    if len(re.findall(r'\s*\w[\w \-/]+:\s*(?:"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', settings)) < 3:
        return ""
    negative = (i for i, line in enumerate(lines) if line.strip().startswith("Negative prompt:"))
    return "\n".join(lines[: next(negative, len(lines))]).strip()


def comfyui_prompt(nodes: dict) -> str:
    """The text of ComfyUI's graph that comes to its samplers as positive. Of SDXL's two it is text_g, unless that is empty.
    ValueError where it is several, or the work of other nodes; "" where there is no sampler."""
    inputs = {k: x["inputs"] for k, x in nodes.items() if isinstance(x, dict) and isinstance(x.get("inputs"), dict)}
    samplers = [k for k in inputs if re.search("Sampler|Guider", str(nodes[k].get("class_type")))]
    ahead = [inputs[k].get("positive", inputs[k].get("conditioning")) for k in samplers]
    texts, seen = set(), set()
    while ahead:
        link = ahead.pop()
        if not isinstance(link, list) or not link or str(link[0]) in seen or str(link[0]) not in inputs:
            continue
        seen.add(str(link[0]))
        node = inputs[str(link[0])]
        if found := [text for name in ("text", "text_g", "text_l") if name in node and (text := linked(inputs, node[name]))]:
            texts.add(" ".join(found[0].split()))
        else:
            ahead += [x for name, x in node.items() if name.startswith(("positive", "conditioning"))]
    if len(texts) > 1:
        raise ValueError(f"{len(texts)} prompts in its ComfyUI graph")
    return "".join(texts)


def linked(inputs: dict, value) -> str:
    """A text, or that of the node that it is linked to. ValueError where that node has none or several."""
    if isinstance(value, str):
        return value
    node = inputs.get(str(value[0]), {}) if isinstance(value, list) and value else {}
    texts = [x for x in node.values() if isinstance(x, str)]
    if len(texts) != 1:
        raise ValueError("its ComfyUI prompt is made by other nodes")
    return texts[0]
