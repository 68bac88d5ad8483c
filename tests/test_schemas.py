"""dipo/schemas.py: data sets in their own layouts, the winner of each pair by the colour of its picture, exact resuming."""

import io
import itertools
import json
import pickle
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from dipo.cli import UserError
from dipo.pairs import check_usable, read_pair
from dipo.schemas import SCHEMAS, open_dataset, pairs_of

TEXT, NUMBER, BYTES, PICTURE = (*map(datasets.Value, ("string", "float64", "binary")), datasets.Image())
# A rank's colour: the brighter, the better.
SHADES = {0: 250, 1: 200, 2: 150, 3: 100, 4: 50}


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


GOOD, BAD = png(SHADES[0]), png(SHADES[1])


def parquet(folder, rows, name="train.parquet", **features):
    """Rows in groups of ten."""
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / name, batch_size=10)
    return folder


def pickapic(labels, **more) -> list[dict]:
    """Rows of Pick-a-Pic in which jpg_0 is the bright picture."""
    return [{"jpg_0": GOOD, "jpg_1": BAD, "label_0": x, "caption": f"{i}"} | more for i, x in enumerate(labels)]


def pickapic_parquet(folder, labels, label=NUMBER, **more):
    kinds = {k: datasets.Value("bool") if isinstance(v, bool) else TEXT for k, v in more.items()}
    return parquet(folder, pickapic(labels, **more), jpg_0=BYTES, jpg_1=BYTES, label_0=label, caption=TEXT, **kinds)


def pictures(folder, *names):
    """Files whose shade is that of the digit at the end of their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(SHADES[int(path.stem[-1])]))


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path.parent


def write_tar(folder, labels, name="00000.tar"):
    """As sayakpaul/pickapic_v2_webdataset was written, by webdataset's TarWriter."""
    with tarfile.open(folder / name, "w") as tar:
        for i, label in enumerate(labels):
            files = {"original_prompt.txt": f"{i}".encode(), "jpg_0.jpg": GOOD, "jpg_1.jpg": BAD}
            for key, data in (files | {"label_0.txt": f"{label}".encode(), "label_1.txt": b"0"}).items():
                member = tarfile.TarInfo(f"{i}.{key}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def read(name, split="train", ranked_pairs="all"):
    """All pairs of a data set as (caption, winner's shade, loser's shade), and how many ties it has."""
    rows = open_dataset(str(name), split)
    # The function goes to other processes.
    find = pickle.loads(pickle.dumps(pairs_of(rows, str(name), split, ranked_pairs)))
    check_usable(rows, find, str(name))
    found, ties = [], 0
    for row in rows:
        pairs, n = find(row)
        for pair in pairs:
            assert pair.keys() == {"winner", "loser", "caption"}
            item = read_pair(pair, 8)
            assert item["pixels"].shape == (2, 8, 8, 3)
            found.append((item["caption"], *item["pixels"][:, 4, 4, 0].tolist()))
        ties += n
    return found, ties


def shades(*ranks):
    return tuple(SHADES[r] for r in ranks)


# --------------------------------------------------------------------------------------------------------- what is known

FIRST, SECOND = shades(0, 1), shades(1, 0)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([1.0, 0.0, 0.5, None, 1.0], NUMBER),
        ([1, 0, 2, None, 1], datasets.Value("int8")),
        (["1", "0", "0.5", "both", " 1.0"], TEXT),
        (["True", "false", "", None, "true"], TEXT),
        ([True, False, None, None, True], datasets.Value("bool")),
    ],
)
def test_pickapics_labels(tmp_path, labels, kind):
    assert read(pickapic_parquet(tmp_path, labels, kind)) == ([("0", *FIRST), ("1", *SECOND), ("4", *FIRST)], 2)


def test_pickapic_v1_has_rows_without_a_label(tmp_path):
    """With the columns of its card that matter, as Image features."""
    rows = [x | {"has_label": i != 1} for i, x in enumerate(pickapic([1.0, 1.0, 0.0], best_image_uid="a", model_0="m"))]
    rows = [row | {k: {"bytes": row[k], "path": None} for k in ("jpg_0", "jpg_1")} for row in rows]
    more = {"has_label": datasets.Value("bool"), "best_image_uid": TEXT, "model_0": TEXT}
    parquet(tmp_path, rows, jpg_0=PICTURE, jpg_1=PICTURE, label_0=NUMBER, caption=TEXT, **more)
    assert read(tmp_path) == ([("0", *FIRST), ("2", *SECOND)], 1)
    assert set(next(iter(open_dataset(str(tmp_path))))) == {*SCHEMAS[0].columns, "has_label"}


def test_webdataset_of_pickapic(tmp_path):
    write_tar(tmp_path, [1.0, 0.0, 0.5])
    write_tar(tmp_path, [1.0], "00001.tar")
    assert read(tmp_path) == ([("0", *FIRST), ("1", *SECOND), ("0", *FIRST)], 1)
    assert read(tmp_path / "00001.tar") == ([("0", *FIRST)], 0)


def trl(n=3, **more):
    one = {"chosen": {"bytes": GOOD, "path": None}, "rejected": {"bytes": BAD, "path": None}}
    return [{"prompt": f"{i}"} | one | more for i in range(n)]


def test_prompt_chosen_rejected(tmp_path):
    parquet(tmp_path, trl(), prompt=TEXT, chosen=PICTURE, rejected=PICTURE)
    assert read(tmp_path) == ([(f"{i}", *FIRST) for i in range(3)], 0)


def test_a_folder_that_datasets_saved(tmp_path):
    """save_to_disk's arrow files, also of several splits, without what datasets has cached among them."""
    pictures(tmp_path, "a0.png", "a1.png")
    rows = [{"prompt": "p", "chosen": str(tmp_path / "a0.png"), "rejected": str(tmp_path / "a1.png")}]
    features = datasets.Features(prompt=TEXT, chosen=PICTURE, rejected=PICTURE)
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "one")
    other = datasets.Dataset.from_list(trl(2), features=features)
    datasets.DatasetDict({"train": saved, "validation": other}).save_to_disk(tmp_path / "two")
    (tmp_path / "one/cache-0123456789abcdef.arrow").write_bytes((tmp_path / "one/data-00000-of-00001.arrow").read_bytes())
    assert read(tmp_path / "one") == read(tmp_path / "two") == ([("p", *FIRST)], 0)
    assert read(tmp_path / "two", "validation") == ([("0", *FIRST), ("1", *FIRST)], 0)
    assert read(tmp_path / "one/data-00000-of-00001.arrow") == ([("p", *FIRST)], 0)


def test_pictures_in_all_their_forms(tmp_path):
    """Bytes, with a path or without, and the path alone, as streams of the hub's folders of pictures have it."""
    pictures(tmp_path, "a0.png")
    path = str(tmp_path / "a0.png")
    for form in (GOOD, {"bytes": GOOD, "path": None}, {"bytes": None, "path": path}, path):
        pixels = read_pair({"winner": form, "loser": BAD, "caption": ""}, 8)["pixels"]
        assert tuple(pixels[:, 0, 0, 0].tolist()) == FIRST
    for form in (None, {"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}, "gone.png", b"", b"x"):
        assert read_pair({"winner": form, "loser": BAD, "caption": ""}, 8) is None


@pytest.mark.parametrize("keys", [("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")])
def test_a_folder_of_pictures_with_metadata(tmp_path, keys):
    pictures(tmp_path, "good/a0.png", "bad/b1.png")
    row = {"prompt": "p", **dict(zip(keys, ("good/a0.png", "./bad/../bad/b1.png"), strict=True))}
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for _ in range(2)))
    assert read(tmp_path) == ([("p", *FIRST)] * 2, 0)


def test_hpdv2(tmp_path):
    """train.json with 1 for the better picture, under either name of its column; test.json with ranks; the pictures in
    folders of the splits' names."""
    pictures(tmp_path, "train/a0.png", "train/b1.png", *(f"test/x{i}.png" for i in range(1, 5)))
    group = {"prompt": "p", "human_preference": [0, 1], "image_path": ["b1.png", "a0.png"], "user_hash": "u"}
    write_json(tmp_path / "train.json", [group, group | {"human_preference": [1, 1]}])
    ranked = {"prompt": "q", "image_path": ["x3.png", "x1.png", "x4.png", "x2.png"], "rank": [3, 1, 3, 2]}
    write_json(tmp_path / "test.json", [ranked | {"raw_annotations": [{"rank": [1, 2, 3, 4], "user_hash": "u"}]}])
    (tmp_path / "benchmark").mkdir()
    write_json(tmp_path / "benchmark/anime.json", ["a prompt"])
    assert read(tmp_path) == ([("p", *FIRST)], 1)
    expected = [("q", *shades(a, b)) for a, b in ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4))]
    found, ties = read(tmp_path, "test")
    assert sorted(found) == sorted(expected) and ties == 1
    assert read(tmp_path, "test", "best-worst") == ([("q", *shades(1, 4))], 0)
    write_json(tmp_path / "train.json", [{"file_path" if k == "image_path" else k: v for k, v in group.items()}])
    assert read(tmp_path / "train.json") == ([("p", *FIRST)], 0)


def test_hpdv3(tmp_path):
    """path1 is the better one; what is null in some rows and a number in others is not needed."""
    pictures(tmp_path, "images/a0.png", "images/b1.png")
    row = {"prompt": "p", "path1": "images/a0.png", "path2": "images/b1.png", "model1": "flux", "model2": "infinity"}
    rows = [row | {"choice_dist": None, "confidence": None}, row | {"choice_dist": [12, 7], "confidence": 0.99}]
    write_json(tmp_path / "train.json", rows)
    write_json(tmp_path / "test.json", [row | {"prompt": "test"}])
    assert read(tmp_path) == ([("p", *FIRST)] * 2, 0)
    assert read(tmp_path, "test") == ([("test", *FIRST)], 0)


def rank_rows(ranks: dict[str, list[int]]) -> list[dict]:
    """ImageRewardDB's metadata: a row for each picture of a prompt, whose name ends with its rank."""
    more = {"classification": "People", "image_amount_in_total": 9, "overall_rating": 6, "fidelity_rating": 5}
    return [
        {"image_path": f"images/train/train_1/{k}-{j}{r}.png", "prompt_id": k, "prompt": f"prompt {k}", "rank": r} | more
        for k, group in ranks.items()
        for j, r in enumerate(group)
    ]


def test_imagereward(tmp_path):
    """ImageRewardDB as it is on the hub, unpacked; and the JSON of ImageReward's own repository. Rank 1 is best."""
    rows = rank_rows({"b": [2, 1, 2], "a": [4, 3]})
    pictures(tmp_path, *(row["image_path"] for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "metadata-train.parquet")
    datasets.Dataset.from_list(rows[:2]).to_parquet(tmp_path / "metadata-test.parquet")
    write_json(tmp_path / "images/train/train_1/train_1.json", rows)
    expected = [("prompt b", *shades(1, 2)), ("prompt b", *shades(1, 2)), ("prompt a", *shades(3, 4))]
    assert read(tmp_path) == (expected, 1)
    assert read(tmp_path, ranked_pairs="best-worst") == (expected[1:], 0)
    assert read(tmp_path, "test") == ([("prompt b", *shades(1, 2))], 0)
    pictures(tmp_path, "own/g1.png", "own/g2.png")
    group = {"id": "1", "prompt": "p", "generations": ["g2.png", "g1.png"], "ranking": [2, 1]}
    write_json(tmp_path / "own/test.json", [group, group | {"generations": ["g1.png"], "ranking": [1]}])
    assert read(tmp_path / "own/test.json") == ([("p", *shades(1, 2))], 1)


def test_files_are_chosen_by_the_split(tmp_path):
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00001", "data/test_unique-00000-of-00001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet(tmp_path, trl(1, prompt=name[5:]), f"{name}.parquet", prompt=TEXT, chosen=PICTURE, rejected=PICTURE)
    for split in ("train", "test", "test_unique"):
        assert [p[0] for p in read(tmp_path, split)[0]] == [f"{split}-00000-of-00001"]
    (tmp_path / "data/train-00000-of-00001.parquet").unlink()
    assert len(read(tmp_path)[0]) == 2
    with pytest.raises(UserError, match=r"no file is named like --dataset-split dev, as test-00000"):
        open_dataset(str(tmp_path), "dev")


# ------------------------------------------------------------------------------------------------------------- resuming


def many(folder, kind):
    """35 numbered pairs of a kind, in two files where it has several."""
    labels = [float(i % 3 == 0) for i in range(35)]
    if kind == "parquet":
        parquet(folder, pickapic(labels)[:22], jpg_0=BYTES, jpg_1=BYTES, label_0=NUMBER, caption=TEXT)
        more = [row | {"caption": f"{22 + i}"} for i, row in enumerate(pickapic(labels[22:]))]
        return parquet(folder, more, "train-1.parquet", jpg_0=BYTES, jpg_1=BYTES, label_0=NUMBER, caption=TEXT)
    if kind == "arrow":
        features = datasets.Features(prompt=TEXT, chosen=PICTURE, rejected=PICTURE)
        datasets.Dataset.from_list(trl(35), features=features).save_to_disk(folder / "saved", num_shards=2)
        return folder / "saved"
    if kind == "tar":
        write_tar(folder, labels[:22])
        return write_tar(folder, labels[22:], "00001.tar")
    pictures(folder, "a0.png", "b1.png")
    rows = [{"prompt": f"{i}", "chosen": "a0.png", "rejected": "b1.png"} for i in range(35)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        write_json(folder / "train.json", rows)
    else:
        rows = rank_rows({f"{i}": [1, 2] for i in range(35)})
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata-train.parquet", batch_size=10)
        pictures(folder, rows[0]["image_path"])
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar", "jsonl", "json", "imagereward"])
@pytest.mark.parametrize("shard", [None, 1])
def test_every_source_goes_on_exactly_where_it_was(tmp_path, kind, shard):
    """Four times in a row, each time in the middle of a row group, by streams of their own; whole or one of two parts."""
    path = many(tmp_path, kind)

    def rows():
        whole = open_dataset(str(path))
        assert whole.num_shards == (2 if kind in ("parquet", "arrow", "tar") else 1)
        return whole.shard(2, shard) if shard is not None and whole.num_shards == 2 else whole

    whole, got, state = list(rows()), [], None
    assert len(whole) == 35 or (shard and 0 < len(whole) < 35)
    for stop in (3, 2, 1, 4, 100):
        stream = rows()
        if state:
            stream.load_state_dict(state)
        got += itertools.islice(stream, stop)
        state = json.loads(json.dumps(stream.state_dict()))
    assert got == whole


# --------------------------------------------------------------------------------------------------------------- errors


def bad(folder, kind):
    if kind == "columns":
        return parquet(folder, [{"text": "a", "url": "b"}], text=TEXT, url=TEXT)
    if kind == "empty":
        return folder
    if kind == "no rows":
        table = datasets.Dataset.from_list(pickapic([1.0])).select([])
        table.to_parquet(folder / "train.parquet")
        return folder
    if kind in ("damaged", "cut"):
        pickapic_parquet(folder, [1.0] * 40)
        whole = (folder / "train.parquet").read_bytes()
        (folder / ("train.parquet" if kind == "damaged" else "train-2.parquet")).write_bytes(whole[: len(whole) // 2])
    if kind == "other columns":
        pickapic_parquet(folder, [1.0])
        parquet(
            folder,
            [{"prompt": "", "chosen": GOOD, "rejected": BAD}],
            "train-2.parquet",
            prompt=TEXT,
            chosen=BYTES,
            rejected=BYTES,
        )
    if kind == "1 or 2":
        return pickapic_parquet(folder, [1.0, 2.0] * 20)
    if kind == "not there":
        return write_json(folder / "train.json", [{"prompt": "", "chosen": "img/a0.png", "rejected": "img/b1.png"}])
    if kind == "csv":
        (folder / "pairs.csv").write_text("prompt,chosen,rejected\n")
        return folder / "pairs.csv"
    if kind == "ties":
        return pickapic_parquet(folder, ["left", "right", "tie"] * 400, TEXT)
    if kind == "few ties":
        return pickapic_parquet(folder, [0.5] * 40)
    if kind == "ranks":
        pictures(folder, "a0.png", "b1.png")
        return write_json(
            folder / "train.json", [{"prompt": "", "generations": ["a0.png", "b1.png"], "ranking": [1, 1]}] * 60
        )
    if kind in ("outside", "absolute"):
        pictures(folder, "a0.png", "in/b1.png")
        name = "../a0.png" if kind == "outside" else str(folder / "a0.png")
        row = {"prompt": "p", "chosen": name, "rejected": "b1.png"}
        (folder / "in/metadata.jsonl").write_text(json.dumps(row))
        return folder / "in"
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("columns", r"its columns \(text, url\) are none of those known: jpg_0, jpg_1, label_0, caption; .*path1, path2, "),
        ("empty", "no .parquet, .arrow, .tar, .jsonl, .json file in it"),
        ("no rows", "has no rows"),
        ("damaged", r"train.parquet: is no whole parquet file \(.*fetch it again"),
        ("cut", r"train-2.parquet: is no whole parquet file \(.*fetch it again"),
        ("other columns", r"train.parquet: has not the columns of train-2.parquet beside it"),
        ("1 or 2", "label_0 is 1 or 2; write 1 where the first is better, and else 0"),
        ("not there", "no usable pair in it; all are ties or unreadable, one for .*No such file.*a0.png"),
        ("csv", "not one of .parquet, .arrow, .tar, .jsonl, .json, nor a folder of them"),
        (
            "ties",
            "1000 of the first 1000 rows are ties .* known; label_0 is left, right, tie, left, right ...",
        ),
        ("few ties", "no usable pair in it"),
        ("ranks", r"60 of the first 60 rows are ties or have no label that is known; ranking is \[1, 1\], "),
        ("outside", r"row 0 names a picture outside .*in; put it inside"),
        ("absolute", r"row 0 names a picture outside .*in; put it inside"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, kind, said):
    with pytest.raises(UserError, match=said) as e:
        read(bad(tmp_path, kind))
    assert "\n" not in str(e.value) and str(e.value).startswith("--dataset ")


def test_rows_that_say_less_cost_themselves_only(tmp_path):
    """A null where the first picture should be, lists of two lengths, a caption that is a number or none."""
    pictures(tmp_path, "a0.png", "b1.png")
    pair = {"chosen": "a0.png", "rejected": "b1.png"}
    rows = [{"prompt": "x", "chosen": None, "rejected": None}, {"prompt": 0} | pair, {"prompt": None} | pair]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_dataset(str(tmp_path))
    find = pairs_of(found, str(tmp_path))
    items = [read_pair(x, 8) for row in found for x in find(row)[0]]
    assert items[0] is None and [x["caption"] for x in items[1:]] == ["0", ""]
    ranked = [{"prompt": "", "generations": ["a0.png", "b1.png"], "ranking": r} for r in ([1], [1, 2], [2, 1, 3])]
    (tmp_path / "metadata.jsonl").unlink()
    write_json(tmp_path / "train.json", ranked)
    assert read(tmp_path) == ([("", *FIRST)], 2)


def test_names_in_columns_of_pictures_and_absolute_ones_are_found_inside_the_folder_only(tmp_path):
    pictures(tmp_path, "secret0.png", "in/a0.png", "in/b1.png")
    folder, kind = tmp_path / "in", {"bytes": datasets.Value("binary"), "path": TEXT}
    for good, there in (("a0.png", True), (str(folder / "a0.png"), True), (str(tmp_path / "secret0.png"), False)):
        rows = [{"prompt": "", "chosen": {"bytes": None, "path": good}, "rejected": {"bytes": BAD, "path": "b1.png"}}]
        parquet(folder, rows, prompt=TEXT, chosen=kind, rejected=kind)
        if there:
            assert read(folder) == ([("", *FIRST)], 0)
        else:
            with pytest.raises(UserError, match="row 0 names a picture outside"):
                read(folder)


def test_a_name_behind_pictures_that_are_stored_is_never_opened(tmp_path, monkeypatch):
    """Though there is such a picture in the current folder."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, "secret0.png")
    kind = {"bytes": datasets.Value("binary"), "path": TEXT}
    rows = trl(20) + trl(1, chosen={"bytes": None, "path": "secret0.png"})
    rows += trl(1, chosen={"bytes": None, "path": str(tmp_path / "secret0.png")})
    parquet(tmp_path, rows, prompt=TEXT, chosen=kind, rejected=kind)
    found = open_dataset(str(tmp_path))
    find = pairs_of(found, str(tmp_path))
    items = [read_pair(pair, 8) for row in found for pair in find(row)[0]]
    assert [x is not None for x in items] == [True] * 20 + [False] * 2


def test_empty_files_hidden_folders_and_large_letters(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.parquet").write_text("not for us")
    datasets.Dataset.from_list(pickapic([1.0])).select([]).to_parquet(tmp_path / "empty.PARQUET")
    pickapic_parquet(tmp_path, [1.0])
    (tmp_path / "train.parquet").rename(tmp_path / "one.PARQUET")
    rows = open_dataset(str(tmp_path))
    assert len(list(rows)) == 1


def test_one_decided_row_in_a_hundred_is_enough(tmp_path):
    """And the look ends early where pairs are plenty: the rows behind may be what they like."""
    labels = [0.5] * 1000
    labels[::100] = [1.0] * 10
    assert read(pickapic_parquet(tmp_path, labels))[1] == 990
    labels[0] = 0.5
    with pytest.raises(UserError, match="991 of the first 1000 rows"):
        read(pickapic_parquet(tmp_path, labels))


def test_a_name_that_leads_out_is_never_opened(tmp_path, monkeypatch):
    """Behind the first look it counts as unreadable. A link inside of the folder is the user's own, and followed."""
    pictures(tmp_path, "a0.png", "in/b1.png")
    (tmp_path / "in/link").symlink_to(tmp_path)
    rows = [{"prompt": "p", "chosen": "link/a0.png", "rejected": "b1.png"}] * 20 + [
        {"prompt": "q", "chosen": "b1.png", "rejected": name}
        for name in ("../a0.png", "x/../../a0.png", "/etc/hostname", "..")
    ]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = str(tmp_path / "in")
    stream = open_dataset(name)
    find = pairs_of(stream, name)
    found = [read_pair(pair, 8) for row in stream for pair in find(row)[0]]
    assert [x is not None for x in found] == [True] * 20 + [False] * 4
    assert np.array_equal(found[0]["pixels"][:, 0, 0, 0], FIRST)
    assert all(pair["loser"] is None for row in rows[20:] for pair in find(row)[0])
