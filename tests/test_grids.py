"""Grids: every picture in its place, captions inside their cells, at most 25 megapixels a page."""

import numpy as np
import pytest
from PIL import Image

from dipo import grids


def teal(folder, size=(64, 64)):
    Image.new("RGB", size, "teal").save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.parametrize(("size", "n"), [((64, 64), 1), ((1024, 1024), 40), ((1024, 768), 7)])
def test_grids_stay_below_25_megapixels(tmp_path, size, n):
    """Large pictures are scaled down before a second page is begun."""
    paths = grids.save_grids(tmp_path, "grid", {"": [teal(tmp_path, size)] * n}, ["a prompt " * 30] * n, columns=4)
    with Image.open(paths[0]) as page:
        assert paths == [tmp_path / "grid.png"] and page.width * page.height <= grids.MAX_GRID_PIXELS
        assert page.width >= min(n, 4) * 192


def test_what_finds_no_room_goes_on_on_other_pages(tmp_path):
    paths = grids.save_grids(tmp_path, "grid", {"": [teal(tmp_path)] * 1632}, ["x"] * 1632, columns=40)
    assert [p.name for p in paths] == ["grid-1.png", "grid-2.png", "grid-3.png", "grid-4.png"]
    for path in paths:
        with Image.open(path) as page:
            assert page.width * page.height <= grids.MAX_GRID_PIXELS and page.width >= 40 * 192


@pytest.mark.parametrize("text", ["", "\n\t\x00", "word " * 500, "x" * 10_000, "日本 🎨 עברית", "=cmd|' /C calc'!A0"])
def test_any_caption_can_be_drawn(tmp_path, text):
    (path,) = grids.save_grids(tmp_path, "grid", {"": [teal(tmp_path)]}, [text])
    with Image.open(path) as page:
        drawn = np.asarray(page)[200:]
    # Captions stay inside their cell.
    assert (drawn[:, :4] == 255).all() and (drawn[:, -4:] == 255).all() and (drawn[-3:] == 255).all()


def test_grids_have_rows_bands_and_pages(tmp_path, monkeypatch):
    """Every picture stands where its row and column say, on as many pages as MAX_GRID_PIXELS asks for."""
    rows, colours = {"first": [], "second": []}, {}
    for k, label in enumerate(rows):
        for i in range(20):
            colours[label, i] = (10 * i, 255 * k, 255 - 10 * i)
            rows[label].append(tmp_path / f"{label}-{i}.png")
            Image.new("RGB", (64, 64), colours[label, i]).save(rows[label][-1])
    captions = [f"prompt {i}" for i in range(20)]
    paths = grids.save_grids(tmp_path, "grid", rows, captions, "all alike")
    assert [p.name for p in paths] == ["grid.png"]
    page = Image.open(paths[0]).convert("RGB")
    for i in range(20):
        columns = [page.getpixel((138 + i % 8 * 196 + 96, y)) for y in range(page.height)]
        assert all(colours[label, i] in columns for label in rows)
        assert columns.index(colours["first", i]) < columns.index(colours["second", i])
    # No label, no title: more room.
    (bare,) = grids.save_grids(tmp_path, "bare", {"": rows["first"]}, captions)
    assert Image.open(bare).width == 8 * 196 + 8 and Image.open(bare).width < page.width
    monkeypatch.setattr(grids, "MAX_GRID_PIXELS", 900_000)
    paths = grids.save_grids(tmp_path, "grid", rows, captions, "all alike")
    assert [p.name for p in paths] == ["grid-1.png", "grid-2.png", "grid-3.png"]
    assert all(Image.open(p).width * Image.open(p).height <= 900_000 for p in paths)
    assert grids.save_grids(tmp_path, "none", {"": []}, []) == []
    # What an earlier run left goes, other people's pictures stay.
    Image.new("RGB", (8, 8)).save(tmp_path / "grid-mine.png")
    grids.remove_grids(tmp_path)
    assert [p.name for p in tmp_path.glob("grid*.png")] == ["grid-mine.png"]
