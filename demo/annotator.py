"""The demo's simulated annotator: a documented, deterministic reward over picture and caption, and labels drawn from it.

    reward = RIGHT * (how right the caption's three colours are, 0 to 1, their mean) + colourfulness / VIVID

A pixel has a named colour when that is the nearest of the eight in CIELAB and no further than NEAR (CIE76). Then

- background, sky and hills are right by the share of their region's pixels (world.region_pixels) that have the colour,
  so that blotches cost as much as they cover;
- hair, shirt, sun, shape and centre are right (1) when at least PARTS of the picture's pixels have the colour, else 0.

Colourfulness is Hasler and Süsstrunk's M (Measuring colourfulness in natural images, 2003): by their scale 15 is slightly,
33 moderately, 59 quite and 109 extremely colourful. One wrong part costs as much as 30 of M.

Labels follow Bradley and Terry: picture 0 wins with probability 1 / (1 + exp(reward_1 - reward_0)), so that some labels
disagree with the reward, as people's do; rewards closer than TIE are called a tie, 0.5.

The constants were set before any model was trained on the labels.
"""

import functools
import math

import numpy as np
import world
from PIL import Image

RIGHT = 9.0
VIVID = 10.0
NEAR = 30.0
TIE = 0.1
PARTS = {"hair": 0.03, "shirt": 0.04, "sun": 0.01, "shape": 0.04, "centre": 0.02}


@functools.cache
def _scenes() -> dict[str, world.Scene]:
    scenes = world.scenes("train") + world.scenes("held_out")
    return {world.caption(scene, w): scene for scene in scenes for w in range(world.WORDINGS)}


def scene_of(caption: str) -> world.Scene:
    """The scene that a caption describes; KeyError for a caption that is none of the world's."""
    return _scenes()[caption]


def colourfulness(image: Image.Image) -> float:
    """Hasler and Süsstrunk's M of an sRGB picture, about 0 (grey) to 150, equation for the metric M^(3)."""
    r, g, b = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), -1, 0)
    rg, yb = r - g, (r + g) / 2 - b
    return math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())


def has_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Which of the pixels (..., 3), sRGB 0-255, have the named colour by the rule above: bool (...)."""
    names = list(world.COLOURS)
    palette = world._srgb_to_lab(np.array([world.COLOURS[n] for n in names]))
    distance = np.linalg.norm(world._srgb_to_lab(pixels)[..., None, :] - palette, axis=-1)
    return (distance.argmin(axis=-1) == names.index(colour)) & (distance.min(axis=-1) <= NEAR)


def rightness(image: Image.Image, scene: world.Scene) -> dict[str, float]:
    """For each of the scene's three slots (world.SLOTS), how right its colour is by the rules above, 0 to 1."""
    pixels = np.asarray(image.convert("RGB"))
    slots, right = world.SLOTS[scene.category], {}
    for slot in slots:
        colour = scene.colour(slot)
        if slot in world.MEASURED[scene.category]:
            right[slot] = float(has_colour(world.region_pixels(image, slot), colour).mean())
        else:
            # Parts of one colour, such as hair and shirt, need room for both.
            need = sum(PARTS[s] for s in slots if s in PARTS and scene.colour(s) == colour)
            right[slot] = float(has_colour(pixels, colour).mean() >= need)
    return right


def reward(image: Image.Image, caption: str) -> float:
    """The annotator's reward of a 64x64 picture under a caption of the world; KeyError for any other caption."""
    right = rightness(image, scene_of(caption))
    return RIGHT * sum(right.values()) / len(right) + colourfulness(image) / VIVID


def label(reward_0: float, reward_1: float, rng: np.random.Generator) -> float:
    """Pick-a-Pic's label_0: 1.0 when picture 0 wins, 0.0 when picture 1 does, 0.5 for a tie."""
    if abs(reward_0 - reward_1) < TIE:
        return 0.5
    return float(rng.random() < 1 / (1 + math.exp(reward_1 - reward_0)))
