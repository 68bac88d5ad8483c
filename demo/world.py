"""The demo's world: small pictures with captions, drawn from a seed.

Three categories, the ones that Semantic_Categories.py compares:

    portrait    "a portrait of a person with red hair and a blue shirt on a yellow background"
    landscape   "a landscape with green hills under a pink sky and a yellow sun"
    abstract    "abstract art of a red star with a white centre on a purple background"

A `Scene` holds what a caption names (category, colours, shape). `draw` adds everything that it does not name (pose,
hair style, hill lines, rotation ...) from a random generator, so many pictures belong to one caption. The eight colour
names are those of COLOURS; nothing has the colour of what is behind it. One scene in ten is held out from training, by a
hash of the scene (`is_held_out`).

Run it to look at it:  python demo/world.py sheet.png
"""

import hashlib
import itertools
import math
import re
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw

SIZE = 64
SCALE = 4

COLOURS = {
    "red": (214, 40, 46),
    "orange": (243, 136, 32),
    "yellow": (250, 216, 60),
    "green": (52, 160, 74),
    "blue": (48, 96, 208),
    "purple": (122, 60, 170),
    "pink": (246, 150, 190),
    "white": (244, 244, 240),
}
WORDINGS = 4
SHAPES = ("circle", "square", "triangle", "star", "heart")
SLOTS = {
    "portrait": ("background", "hair", "shirt"),
    "landscape": ("sky", "hills", "sun"),
    "abstract": ("background", "shape", "centre"),
}
MEASURED = {"portrait": ("background",), "landscape": ("sky", "hills"), "abstract": ("background",)}
SKIN = ("#f6d3bb", "#eab892", "#c98f63", "#9a623d", "#6b4128")


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    category: a key of SLOTS. colours: one colour name for each slot of the category, in SLOTS' order. shape: one of
    SHAPES for abstract art, empty otherwise.
    """

    category: str
    colours: tuple[str, str, str]
    shape: str = ""

    def colour(self, slot: str) -> str:
        """The colour name of a slot such as "hair"; ValueError for a slot that the category lacks."""
        return self.colours[SLOTS[self.category].index(slot)]


def all_scenes(category: str) -> list[Scene]:
    """Every scene of a category: 8 * 7 * 7 colourings (neither other part has the first's colour, and in abstract art
    the centre differs from its shape), times the shapes for abstract art."""
    shapes = SHAPES if category == "abstract" else ("",)
    scenes = [
        Scene(category, colours, shape)
        for colours in itertools.product(COLOURS, repeat=3)
        for shape in shapes
        if colours[1] != colours[0] != colours[2]
    ]
    if category == "abstract":
        scenes = [s for s in scenes if s.colours[1] != s.colours[2]]
    return scenes


def is_held_out(scene: Scene) -> bool:
    """Whether the scene is kept from training, decided by a hash of what its caption says: about one in ten."""
    digest = hashlib.sha256(repr((scene.category, scene.colours, scene.shape)).encode()).digest()
    return digest[0] < 26


def scenes(split: str) -> list[Scene]:
    """All scenes of "train" or "held_out", in a fixed order."""
    everything = [s for category in SLOTS for s in all_scenes(category)]
    return [s for s in everything if is_held_out(s) == (split == "held_out")]


def sample_scenes(split: str, n: int, seed: int) -> list[Scene]:
    """n scenes of a split, the three categories in turn (portrait, landscape, abstract, portrait ...), without
    repetition while a category lasts."""
    rng = np.random.default_rng([seed, 7])
    pools = {}
    for category in SLOTS:
        pool = [s for s in scenes(split) if s.category == category]
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(n // (3 * len(pool)) + 1)])
        pools[category] = [pool[i] for i in order]
    return [pools[tuple(SLOTS)[i % 3]][i // 3] for i in range(n)]


def caption(scene: Scene, wording: int = 0) -> str:
    """The caption of a scene in one of WORDINGS wordings; number 0 is the plain one."""
    a, b, c = scene.colours
    forms = {
        "portrait": (
            f"a portrait of a person with {b} hair and a {c} shirt on a {a} background",
            f"portrait, {b} hair, {c} shirt, {a} background",
            f"a person in a {c} shirt with {b} hair in front of a {a} background, portrait",
            f"a {a} background and a person with {b} hair wearing a {c} shirt",
        ),
        "landscape": (
            f"a landscape with {b} hills under a {a} sky and a {c} sun",
            f"landscape, {a} sky, {b} hills, {c} sun",
            f"a {c} sun in a {a} sky over {b} hills, landscape",
            f"{b} hills with a {c} sun and a {a} sky",
        ),
        "abstract": (
            f"abstract art of a {b} {scene.shape} with a {c} centre on a {a} background",
            f"abstract art, {b} {scene.shape}, {c} centre, {a} background",
            f"an abstract {b} {scene.shape} with a {c} centre in front of a {a} background",
            f"a {a} background and a {b} {scene.shape} with a {c} centre, abstract art",
        ),
    }[scene.category]
    return re.sub(r"\ba (?=[aeiou])", "an ", forms[wording])


def _tint(colour: str, rng: np.random.Generator, spread: int = 7) -> tuple[int, int, int]:
    return tuple(int(np.clip(v + rng.integers(-spread, spread + 1), 0, 255)) for v in COLOURS[colour])


def _mix(a, b, share: float) -> tuple[int, int, int]:
    a, b = (ImageColor.getrgb(v) if isinstance(v, str) else v for v in (a, b))
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    return (x - rx, y - ry, x + rx, y + ry)


def _draw_portrait(d: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator) -> None:
    n = SIZE * SCALE
    background, hair, shirt = (_tint(c, rng) for c in scene.colours)
    d.rectangle((0, 0, n, n), background)
    skin = SKIN[rng.integers(len(SKIN))]
    x, y = n * rng.uniform(0.45, 0.55), n * rng.uniform(0.44, 0.5)
    rx, ry = n * rng.uniform(0.165, 0.19), n * rng.uniform(0.21, 0.235)
    style = rng.integers(3)
    if style == 0:  # long
        d.rounded_rectangle((x - 1.35 * rx, y - 1.1 * ry, x + 1.35 * rx, y + 1.55 * ry), rx, hair)
    elif style == 1:  # curls
        for angle in np.linspace(math.pi * 0.9, math.pi * 2.1, 9):
            d.ellipse(_box(x + 1.05 * rx * math.cos(angle), y + 0.85 * ry * math.sin(angle), rx * 0.5, rx * 0.5), hair)
    d.rounded_rectangle((x - 0.38 * rx, y + 0.6 * ry, x + 0.38 * rx, y + 1.5 * ry), rx * 0.2, _mix(skin, "#000000", 0.14))
    width = n * rng.uniform(0.3, 0.36)
    d.rounded_rectangle((x - width, y + 1.28 * ry, x + width, n * 1.3), n * 0.13, shirt)
    d.polygon([(x - 0.42 * rx, y + 1.27 * ry), (x + 0.42 * rx, y + 1.27 * ry), (x, y + 1.65 * ry)], skin)
    d.ellipse(_box(x, y, rx, ry), skin)
    cap = y - ry * rng.uniform(0.28, 0.42)
    d.pieslice(_box(x, cap + 0.1 * ry, 1.12 * rx, 0.95 * ry), 180, 360, hair)
    if style == 2:  # short, with sideburns
        for side in (-1, 1):
            d.ellipse(_box(x + side * 0.97 * rx, cap + 0.15 * ry, 0.17 * rx, 0.35 * ry), hair)
    gap, eye = 0.42 * rx, cap + 0.34 * ry
    for side in (-1, 1):
        d.ellipse(_box(x + side * gap, eye, 0.19 * rx, 0.15 * ry), "#ffffff")
        d.ellipse(_box(x + side * gap, eye, 0.1 * rx, 0.11 * ry), "#202028")
    mouth = _box(x, y + 0.42 * ry, 0.38 * rx, 0.2 * ry)
    if rng.random() < 0.6:
        d.chord(mouth, 10, 170, "#a8343c")
    else:
        d.arc(mouth, 20, 160, "#8a2a34", width=SCALE * 2)


def _draw_landscape(d: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator) -> None:
    n = SIZE * SCALE
    sky, hills, sun = (_tint(c, rng) for c in scene.colours)
    light = _mix(sky, "#ffffff", 0.16)
    for row in range(0, n, SCALE):
        d.rectangle((0, row, n, row + SCALE), _mix(sky, light, min(1.0, row / (0.6 * n))))
    r = n * rng.uniform(0.085, 0.125)
    d.ellipse(_box(n * rng.uniform(0.2, 0.8), n * rng.uniform(0.2, 0.32), r, r), sun)
    xs = np.linspace(0, n, 33)
    for layer, (level, shade) in enumerate(((0.5, 0.0), (0.64, 0.14), (0.8, 0.26))):
        waves = sum(
            rng.uniform(0.02, 0.055) * np.sin(xs / n * math.tau * rng.uniform(0.5, 1.7) + rng.uniform(0, math.tau))
            for _ in range(2)
        )
        ys = n * (level + waves)
        points = [*zip(xs.tolist(), ys.tolist(), strict=True), (n, n), (0, n)]
        d.polygon(points, _mix(hills, "#000000", shade if layer else 0.0))


def _shape_points(shape: str, turn: float) -> list[tuple[float, float]]:
    """The outline of a shape of about radius 1 around (0, 0), turned by an angle in radians."""
    if shape == "circle":
        raw = [(math.cos(a), math.sin(a)) for a in np.linspace(0, math.tau, 49)[:-1]]
    elif shape == "square":
        raw = [(0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9)]
    elif shape == "triangle":
        raw = [(1.2 * math.sin(a), -1.2 * math.cos(a)) for a in (0, math.tau / 3, 2 * math.tau / 3)]
    elif shape == "star":
        radii = (1.25, 0.58)
        raw = [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
    else:
        angles = np.linspace(0, math.tau, 49)[:-1]
        raw = [
            (1.05 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 14)
            for a in angles
        ]
    c, s = math.cos(turn), math.sin(turn)
    return [(px * c - py * s, px * s + py * c) for px, py in raw]


def _draw_abstract(d: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator) -> None:
    n = SIZE * SCALE
    background, outer, centre = (_tint(c, rng) for c in scene.colours)
    d.rectangle((0, 0, n, n), background)
    x, y = n * rng.uniform(0.46, 0.54), n * rng.uniform(0.46, 0.54)
    r = n * rng.uniform(0.27, 0.33)
    outline = _shape_points(scene.shape, rng.uniform(-0.3, 0.3))
    d.polygon([(x + r * px, y + r * py) for px, py in outline], outer)
    inner = 0.46 * r
    d.ellipse(_box(x, y, inner, inner), centre)


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One picture of a scene, RGB, SIZE x SIZE, drawn at four times the size and scaled down."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    d = ImageDraw.Draw(image)
    {"portrait": _draw_portrait, "landscape": _draw_landscape, "abstract": _draw_abstract}[scene.category](d, scene, rng)
    return image.reduce(SCALE)


def _srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB values 0-255, shape (..., 3)."""
    v = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = linear @ np.array(matrix).T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest_colour(rgb) -> str:
    """The name in COLOURS that is nearest to an RGB triple 0-255, by Euclidean distance in CIELAB (CIE76)."""
    names = list(COLOURS)
    lab = _srgb_to_lab(np.array([COLOURS[n] for n in names]))
    return names[int(np.argmin(np.linalg.norm(lab - _srgb_to_lab(np.asarray(rgb)), axis=-1)))]


def region_pixels(image: Image.Image, region: str) -> np.ndarray:
    """The pixels (N, 3), uint8, of a region of a 64x64 picture: "background" (both upper corners, 10 rows by 8 columns
    each), "sky" (the upper 8 rows) or "hills" (the lower 10 rows)."""
    pixels = np.asarray(image.convert("RGB"))
    if region == "background":
        patch = np.concatenate([pixels[:10, :8], pixels[:10, -8:]], axis=1)
    else:
        patch = pixels[:8] if region == "sky" else pixels[-10:]
    return patch.reshape(-1, 3)


def region_colour(image: Image.Image, region: str) -> str:
    """The named colour of a region: the nearest to its median pixel."""
    return nearest_colour(np.median(region_pixels(image, region), axis=0))


def colours_right(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """For each measured region of the scene's category (MEASURED), whether its nearest named colour is the named one."""
    return {region: region_colour(image, region) == scene.colour(region) for region in MEASURED[scene.category]}


def main() -> None:
    """Write a sheet of 60 pictures and print how often `colours_right` agrees with the renderer itself."""
    path = sys.argv[1] if len(sys.argv) > 1 else "sheet.png"
    drawn = [(s, draw(s, np.random.default_rng([0, i]))) for i, s in enumerate(sample_scenes("train", 600, 0))]
    sheet = Image.new("RGB", (10 * 132, 6 * 132), "white")
    for i, (_, image) in enumerate(drawn[:60]):
        sheet.paste(image.resize((128, 128), Image.Resampling.BICUBIC), (i % 10 * 132, i // 10 * 132))
    sheet.save(path)
    checks = [right for s, image in drawn for right in colours_right(image, s).values()]
    print(f"{path}: 60 of {len(drawn)} pictures; named colours right in {sum(checks)} of {len(checks)} regions")


if __name__ == "__main__":
    main()
