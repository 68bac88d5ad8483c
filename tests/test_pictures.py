"""Pictures of every kind come out as the same RGB, and the prompts that other programs wrote into them come out whole."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from dipo.grids import save_grids
from dipo.pairs import read_pixels
from dipo.pictures import UNREADABLE, comfyui_prompt, open_picture, prompt_inside

GREY = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
DEEP = GREY.astype(np.uint16) * 257
RGB = np.stack([GREY, GREY[:, ::-1], GREY // 2], axis=-1)


def png16(pixels, clear=None):
    """A PNG of 16 bits a channel, which Pillow does not write: pixels (H, W, channels); the grey clear is transparent."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    grey = () if clear is None else ((b"tRNS", struct.pack(">H", clear)),)
    chunks = ((b"IHDR", header), *grey, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels, order=">"):
    """A grey TIFF of 16 bits in either order of bytes: pixels (H, W)."""
    (height, width), data = pixels.shape, pixels.astype(f"{order}u2").tobytes()
    short = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 278: height}
    entries = [(tag, struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)) for tag, value in short.items()]
    entries += [(tag, struct.pack(f"{order}HHII", tag, 4, 1, value)) for tag, value in ((273, 8), (279, len(data)))]
    start = struct.pack(f"{order}2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", 8) + b"".join(entry for _, entry in sorted(entries)) + bytes(4)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def values(source):
    picture = open_picture(source)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def palette(transparent=None):
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([x for i in range(256) for x in (i, i, i)])
    image.putdata(GREY.reshape(-1).tolist())
    return saved(image, transparency=transparent) if transparent is not None else saved(image)


GREYS = {
    "1": (saved(Image.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0), 0),
    "L": (saved(Image.fromarray(GREY)), GREY, 0),
    "16-bit PNG": (saved(Image.fromarray(DEEP)), GREY, 0),
    "16-bit PNG, one transparent": (png16(DEEP[..., None], 7 * 257), np.where(GREY == 7, 255, GREY), 0),
    "16-bit TIFF, high bytes first": (tiff(DEEP, ">"), GREY, 0),
    "16-bit TIFF, low bytes first": (tiff(DEEP, "<"), GREY, 0),
    "16-bit PGM": (b"P5 256 16 65535\n" + DEEP.astype(">u2").tobytes(), GREY, 0),
    "32-bit TIFF": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), GREY, 0),
    "16-bit RGB": (png16(np.stack([DEEP] * 3, axis=-1)), GREY, 1),
    "palette": (palette(), GREY, 0),
    "palette, one transparent": (palette(7), np.where(GREY == 7, 255, GREY), 0),
    "palette, all half": (palette(bytes([128] * 256)), 255 - (255 - GREY.astype(int)) * 128 / 255, 1),
    "grey, one transparent": (saved(Image.fromarray(GREY), transparency=7), np.where(GREY == 7, 255, GREY), 0),
    "LA": (saved(Image.fromarray(np.stack([GREY * 0, GREY], axis=-1), "LA")), 255 - GREY.astype(int), 1),
    "RGBA": (saved(Image.fromarray(np.stack([GREY * 0] * 3 + [GREY], axis=-1))), 255 - GREY.astype(int), 1),
    "16-bit RGBA": (png16(np.stack([DEEP * 0] * 3 + [DEEP], axis=-1)), 255 - GREY.astype(int), 1),
    "RGBA WebP": (
        saved(Image.fromarray(np.stack([GREY * 0] * 3 + [GREY], axis=-1)), "WEBP", lossless=True),
        255 - GREY.astype(int),
        1,
    ),
    "CMYK TIFF": (saved(Image.fromarray(np.stack([GREY * 0] * 3 + [255 - GREY], axis=-1), "CMYK"), "TIFF"), GREY, 1),
    "Adobe's CMYK JPEG": (
        saved(Image.fromarray(np.stack([GREY * 0] * 3 + [255 - GREY], axis=-1), "CMYK"), "JPEG", quality=100),
        GREY,
        3,
    ),
}


@pytest.mark.parametrize("kind", GREYS)
def test_a_gradient_is_the_same_from_every_kind_of_file(kind, tmp_path):
    data, wanted, tolerance = GREYS[kind]
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture"):
        assert np.abs(values(source) - np.stack([wanted] * 3, axis=-1)).max() <= tolerance
    both = read_pixels({"winner": data, "loser": data}, 16)
    assert abs(both.mean() - np.asarray(wanted)[:, 120:136].mean()) <= tolerance + 0.5


def test_16_bits_are_rounded_and_half_of_black_over_white_is_grey():
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    assert (values(saved(Image.fromarray(deep)))[..., 0] == np.rint(deep / 257)).all()
    assert values(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0, 0] in (127, 128)


# What makes the stored pixels upright (EXIF 2.32, tag 274).
UPRIGHT = {
    **{1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)},
    **{6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90},
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for pixels, kind in ((RGB, "PNG"), (RGB, "WEBP"), (DEEP, "PNG"), (np.dstack([RGB, GREY * 0 + 255]), "PNG")):
        wanted = UPRIGHT[orientation](pixels if pixels is not DEEP else GREY)
        wanted = np.stack([wanted] * 3, axis=-1) if wanted.ndim == 2 else wanted[..., :3]
        assert (values(saved(Image.fromarray(pixels), kind, exif=exif, lossless=True)) == wanted).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3 and (values(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        saved(Image.fromarray(DEEP.astype(np.int32) * 3), "TIFF"),
        saved(Image.fromarray(DEEP.astype(np.int32) - 1), "TIFF"),
    ],
    ids=["floats", "above 16 bits", "below 0"],
)
def test_pixels_whose_white_is_unknown_are_refused(data):
    with pytest.raises(ValueError, match="are not of 8 or 16 bits"):
        open_picture(data)


@pytest.mark.parametrize(
    "data", [b"", b"no picture", saved(Image.fromarray(RGB))[:-300], saved(Image.fromarray(RGB), "JPEG")[:300]]
)
def test_what_is_no_whole_picture_is_named_so(data):
    with pytest.raises(UNREADABLE):
        open_picture(data)


def test_grids_show_pictures_of_any_kind(tmp_path):
    data = saved(Image.fromarray(np.dstack([RGB, GREY * 0])), "PNG")
    (tmp_path / "clear.png").write_bytes(data)
    (page,) = save_grids(tmp_path, "grid", {"": [tmp_path / "clear.png"]}, [""])
    assert (values(page) == 255).all()


# ------------------------------------------------------------------------------------------- prompts that others wrote

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b, Model: x"
HOSTILE = 'a "quoted" café, (night:1.3), <lora:x:0.8>\nSteps: two, of stone\nthen: [a|b], 日本 🎨, Negative prompt: no'
INFOTEXTS = {
    "plain": (f"a cat\nNegative prompt: ugly, bad\n{SETTINGS}", "a cat"),
    "no negative": (f"a cat, sitting\n{SETTINGS}", "a cat, sitting"),
    "hostile": (f'{HOSTILE}\nNegative prompt: one\ntwo: "three"\n{SETTINGS}', HOSTILE),
    "settings in the prompt": (f"a\nSteps: 1, Sampler: x, Seed: 2\nb\n{SETTINGS}", "a\nSteps: 1, Sampler: x, Seed: 2\nb"),
    "quoted settings": (f'a cat\n{SETTINGS}, Lora hashes: "x: 1, y: 2", Version: v1.10.1', "a cat"),
    "none": (SETTINGS, ""),
    "not the web UI's": ('{"prompt": "a cat", "steps": 20, "seed": 1}', ""),
    "a camera's": ("Screenshot", ""),
    "a note": ("a house\nTaken: yesterday, Place: here", ""),
}


def text_png(**chunks):
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    return saved(Image.fromarray(RGB), pnginfo=info)


def exif_of(comment):
    """EXIF as piexif.dump writes it: big-endian, a directory whose one entry leads to another with UserComment alone."""
    first = struct.pack(">HHHII", 1, 0x8769, 4, 1, 26) + b"\0\0\0\0"
    second = struct.pack(">HHHII", 1, 0x9286, 7, len(comment), 44) + b"\0\0\0\0"
    return b"Exif\0\0" + b"MM\0*\0\0\0\x08" + first + second + comment


@pytest.mark.parametrize("case", INFOTEXTS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_web_uis_prompts(kind, case, tmp_path):
    """PNGs have a chunk `parameters`, the others UserComment in UTF-16 (modules/images.py, save_image_with_geninfo)."""
    text, wanted = INFOTEXTS[case]
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    data = text_png(parameters=text) if kind == "PNG" else saved(Image.fromarray(RGB), kind, exif=exif_of(comment))
    (tmp_path / "picture").write_bytes(data)
    assert prompt_inside(tmp_path / "picture") == wanted


@pytest.mark.parametrize(
    ("code", "encoding"), [(b"UNICODE\0", "utf-16-le"), (b"ASCII\0\0\0", "ascii"), (b"\0" * 8, "utf-8")]
)
def test_user_comments_of_other_programs(code, encoding, tmp_path):
    exif = exif_of(code + f"a cat\n{SETTINGS}".encode(encoding))
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert prompt_inside(tmp_path / "a.jpg") == "a cat"


def graph(text="a cat", positive=("6", 0), **more):
    """ComfyUI's default workflow in the form of its `prompt`, as the server's API takes it."""
    sampler = {"seed": 1, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    sampler |= {"model": ["4", 0], "positive": [*positive], "negative": ["7", 0], "latent_image": ["5", 0]}
    nodes = {"3": ("KSampler", sampler), "4": ("CheckpointLoaderSimple", {"ckpt_name": "x.safetensors"})}
    nodes |= {"6": ("CLIPTextEncode", {"text": text, "clip": ["4", 1]})}
    nodes |= {"7": ("CLIPTextEncode", {"text": "ugly", "clip": ["4", 1]})}
    nodes |= {"9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]})}
    return {k: {"inputs": x, "class_type": name, "_meta": {"title": name}} for k, (name, x) in (nodes | more).items()}


GRAPHS = {
    "default": (graph(), "a cat"),
    "hostile": (graph('say "positive": ["7", 0]\n日本, Steps: 3'), 'say "positive": ["7", 0] 日本, Steps: 3'),
    "text of another node": (graph(["10", 0], **{"10": ("PrimitiveStringMultiline", {"value": "a dog"})}), "a dog"),
    "through a control net": (
        graph(positive=("20", 0), **{"20": ("ControlNetApplyAdvanced", {"positive": ["6", 0], "negative": ["7", 0]})}),
        "a cat",
    ),
    "SDXL": (graph(**{"6": ("CLIPTextEncodeSDXL", {"text_g": "a cat", "text_l": "tags", "width": 1024})}), "a cat"),
    "SDXL, one text": (graph(**{"6": ("CLIPTextEncodeSDXL", {"text_g": "", "text_l": "a cat"})}), "a cat"),
    "base and refiner": (
        graph(
            **{"11": ("CLIPTextEncodeSDXLRefiner", {"text": "a  cat", "ascore": 6})},
            **{"12": ("KSamplerAdvanced", {"positive": ["11", 0], "negative": ["7", 0], "noise_seed": 1})},
        ),
        "a cat",
    ),
    "guider": (
        graph(**{"3": ("CFGGuider", {"positive": ["6", 0], "negative": ["7", 0]})}),
        "a cat",
    ),
    "a loop": (graph(positive=("20", 0), **{"20": ("ConditioningSetArea", {"conditioning": ["20", 0]})}), ""),
    "no sampler": (graph(**{"3": ("PreviewImage", {})}), ""),
    "rubbish": ({"1": 2, "3": {"class_type": "KSampler", "inputs": {"positive": [[], 0]}}}, ""),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_comfyuis_prompts(case, tmp_path):
    """In a PNG the chunk `prompt` (nodes.py, SaveImage), in a WebP the EXIF tag Model (SaveAnimatedWEBP)."""
    nodes, wanted = GRAPHS[case]
    (tmp_path / "a.png").write_bytes(text_png(prompt=json.dumps(nodes), workflow="{}"))
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0110] = f"prompt:{json.dumps(nodes)}"
    image.save(tmp_path / "a.webp", exif=exif)
    assert prompt_inside(tmp_path / "a.png") == prompt_inside(tmp_path / "a.webp") == wanted


def test_graphs_that_leave_the_prompt_open_say_so():
    combined = {"20": ("ConditioningCombine", {"conditioning_1": ["6", 0], "conditioning_2": ["21", 0]})}
    combined |= {"21": ("CLIPTextEncode", {"text": "a dog"})}
    with pytest.raises(ValueError, match="2 prompts in its ComfyUI graph"):
        comfyui_prompt(graph(positive=("20", 0), **combined))
    styler = {"10": ("SDXLPromptStyler", {"text_positive": "a cat", "text_negative": "ugly", "style": "base"})}
    twice = {"10": ("StringConcatenate", {"string_a": ["11", 0]}), "11": ("PrimitiveString", {"value": "a cat"})}
    for more in (styler, twice):
        with pytest.raises(ValueError, match="made by other nodes"):
            comfyui_prompt(graph(["10", 0], **more))


@pytest.mark.parametrize("text", ["a cat", "[1, 2]", "NaN", "[" * 100_000, ""])
def test_other_chunks_called_prompt_are_no_graph(text, tmp_path):
    (tmp_path / "a.png").write_bytes(text_png(prompt=text))
    assert prompt_inside(tmp_path / "a.png") == ""


def test_a_damaged_avif_is_unreadable():
    """Whichever byte is wrong."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data, found = saved(Image.fromarray(RGB), "AVIF"), set()
    for i in range(0, min(len(data), 1000), 3):
        try:
            open_picture(data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :])
        except UNREADABLE as e:
            found.add(type(e))
    assert len(found) > 1
