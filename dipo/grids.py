"""Pages of pictures: a row for each kind of picture, a column for each prompt, the prompts under them."""

import math
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dipo.cli import UserError
from dipo.files import find_path, written_whole
from dipo.pictures import UNREADABLE, open_picture

MAX_GRID_PIXELS = 25_000_000
GAP = 4
# What marks a PNG as a grid of ours, which a later run may remove.
MARK = ("Software", "DIPO")


def save_grids(
    folder: Path, stem: str, rows: dict[str, list[Path]], captions: list[str], title="", font="", columns=8
) -> list[Path]:
    """Save pages with a labelled row of pictures for each of rows, in bands of so many columns, the captions under them and
    the title on top. Returns their paths: folder/stem.png, or stem-1.png and so on.

    rows: by label, the paths of the pictures that belong to captions. Pages have at most MAX_GRID_PIXELS: small pictures are
    enlarged to 192 pixels at least, large ones scaled down, to no less than that, before a second page is begun.
    """
    if not captions:
        return []
    layout = Layout(rows, captions, title, font, min(columns, len(captions)))
    starts = range(0, len(captions), layout.columns)
    groups = [starts[i : i + layout.bands] for i in range(0, len(starts), layout.bands)]
    marked, paths = PngImagePlugin.PngInfo(), []
    marked.add_text(*MARK)
    for number, group in enumerate(groups, 1):
        paths.append(folder / (f"{stem}.png" if len(groups) == 1 else f"{stem}-{number}.png"))
        with written_whole(paths[-1]) as part:
            layout.page(group).save(part, format="PNG", pnginfo=marked)
    return paths


def remove_grids(folder: Path) -> None:
    """Remove the grids that an earlier run of ours left."""
    for path in folder.glob("grid*.png"):
        if is_grid(path):
            path.unlink()


def is_grid(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get(MARK[0]) == MARK[1]
    except UNREADABLE:
        return False


class Layout:
    """Where things stand on a page, in pixels."""

    def __init__(self, rows: dict[str, list[Path]], captions: list[str], title: str, font: str, columns: int):
        self.rows, self.captions, self.title, self.font, self.columns = rows, captions, title, font, columns
        first = open_picture(next(iter(rows.values()))[0])
        width, self.shape = first.width, first.height / first.width
        self.measure(width * math.ceil(192 / width))
        bands = math.ceil(len(captions) / columns)
        while self.width * (self.top + bands * self.band) > MAX_GRID_PIXELS and self.cell > 192:
            self.measure(max(192, round(self.cell * 0.95)))
        # Where a single band is too large, nothing helps but smaller pictures.
        while self.width * (self.top + self.band) > MAX_GRID_PIXELS and self.cell > 96:
            self.measure(round(self.cell * 0.9))
        self.bands = max(1, (MAX_GRID_PIXELS // self.width - self.top) // self.band)

    def measure(self, cell: int) -> None:
        """Everything from the width of a picture."""
        self.cell, self.picture = cell, round(cell * self.shape)
        self.label_font, self.text_font = caption_font(round(cell * 1.4), self.font), caption_font(cell, self.font)
        self.label = round(cell * 0.72) if any(self.rows) else GAP
        self.width = self.label + self.columns * (cell + GAP) + GAP
        self.band = len(self.rows) * (self.picture + GAP) + round(self.text_font.size * 5)
        fits = self.label_font.getlength(self.title) <= self.width - 2 * GAP
        self.top = round(self.label_font.size * (2.2 if fits else 3.6)) if self.title else GAP

    def page(self, starts: list[int]) -> Image.Image:
        """A page with the bands that begin at these captions."""
        page = Image.new("RGB", (self.width, self.top + self.band * len(starts)), "white")
        draw_caption(page, self.title, GAP, 0, self.width - 2 * GAP, self.label_font, most=2)
        for k, start in enumerate(starts):
            top, stop = self.top + k * self.band, min(start + self.columns, len(self.captions))
            for row, (label, paths) in enumerate(self.rows.items()):
                y = top + row * (self.picture + GAP)
                lines = math.ceil(self.label_font.getlength(label) / self.label)
                middle = round(y + self.picture / 2 - self.label_font.size * (0.5 + 0.625 * lines))
                draw_caption(page, label, GAP, middle, self.label - 2 * GAP, self.label_font, most=5)
                for column, path in enumerate(paths[start:stop]):
                    small = open_picture(path).resize((self.cell, self.picture), Image.Resampling.LANCZOS)
                    page.paste(small, (self.label + column * (self.cell + GAP), y))
            y = top + len(self.rows) * (self.picture + GAP) - GAP
            for column, caption in enumerate(self.captions[start:stop]):
                draw_caption(page, caption, self.label + column * (self.cell + GAP), y, self.cell, self.text_font)
        return page


def caption_font(cell: int, name: str) -> ImageFont.FreeTypeFont:
    """The named font, or DejaVu Sans, which comes with matplotlib, in a size that suits a picture's width."""
    if name and not find_path(name):
        raise UserError(f"--font {name}: no such file; give a .ttf or .otf file")
    path = find_path(name) or Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    try:
        return ImageFont.truetype(str(path), max(12, cell // 20))
    except OSError as e:
        raise UserError(f"--font {name}: cannot be read as a font; give a .ttf or .otf file") from e


def draw_caption(
    page: Image.Image, text: str, x: int, y: int, cell: int, font: ImageFont.FreeTypeFont, most: int = 3
) -> None:
    """Write text in up to `most` lines of the cell's width, centred, cut with an ellipsis."""
    words = "".join(c if c.isprintable() else " " for c in text[:600]).split()
    lines = [""]
    for piece in (word[k : k + 20] for word in words for k in range(0, len(word), 20)):
        joined = f"{lines[-1]} {piece}".strip()
        if font.getlength(joined) <= cell:
            lines[-1] = joined
        else:
            lines.append(piece)
    lines = [line for line in lines if line]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    draw = ImageDraw.Draw(page)
    for k, line in enumerate(lines):
        while font.getlength(line) > cell:
            line = line[:-2].rstrip(" …") + "…"
        draw.text((x + cell / 2, y + font.size * (0.5 + 1.25 * k)), line, "black", font, anchor="ma")
