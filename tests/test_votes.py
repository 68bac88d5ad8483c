"""vote.html in a real browser, and the tables of the CSVs that it leaves."""

import itertools
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import annotator
import numpy as np
import pandas as pd
import pytest
import voter
import world
from conftest import ROOT
from helpers import start
from PIL import Image
from statsmodels.stats.proportion import proportion_confint

from dipo import votes
from dipo.cli import UserError
from dipo.judges import HPSv2, PickScore

ROWS = ("tuned-dipo-50", "base-dipo-50")
JUDGES = [PickScore, HPSv2]
MARKUP = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 1"> & \u2028 "quoted", =1+1'
LONG = "a very long prompt of many words " * 30 + "and its end"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def settings(*files, vote=None):
    return SimpleNamespace(votes=tuple(map(str, files)), vote=vote)


def images_of(folder, n, prompts=None, pictures=True, size=(96, 96), rows=ROWS):
    """What Study.results says of n pairs: PickScore likes the first row's pictures, HPSv2 every second one of them."""
    prompts, lines = prompts or [f"prompt {i}" for i in range(n)], []
    for k, (row, i) in enumerate(itertools.product(rows, range(n))):
        path = folder / row / f"{i:05d}.png"
        if pictures:
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", size, ((70 * i) % 255, 120, 200 if row == rows[0] else 60)).save(path)
        about = {"variant": row, "path": path, "prompt": prompts[i], "seed": i, "category": ("red", "blue")[i % 2]}
        scores = {"pickscore": 20.0 + (row == rows[0]), "hpsv2": 0.3 + (row == rows[i % 2])}
        lines.append(about | {"image": f"{k:012x}"} | scores)
    return pd.DataFrame(lines)


def make_page(folder, n, *more, **options):
    images = images_of(folder, n, *more, **options)
    (page,) = votes.ask(settings(), folder, images, JUDGES, ROWS)
    return page, images


# --------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright's Python client (requirements-dev.txt)")
    if not CHROMIUM:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as client:
        browser = client.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """open_page(path or address, **options of a browser context) gives a page; every context is another browser."""
    contexts = []

    def call(page, **options):
        contexts.append(chromium.new_context(**options))
        tab = contexts[-1].new_page()
        tab.goto(Path(page).as_uri() if isinstance(page, Path) else page)
        return tab

    yield call
    for context in contexts:
        context.close()


def begin(tab, name=None):
    if name:
        tab.fill("#voter", name)
    tab.focus("#voter")
    tab.keyboard.press("Enter")


def shown(tab):
    """The pair that is on the screen: prompt, row on the left, row on the right."""
    tab.wait_for_selector("#pictures:not(.waiting)", state="attached")
    left, right = (x.get_attribute("src") for x in tab.query_selector_all("#pictures img"))
    return tab.text_content("#prompt"), left.split("/")[-2], right.split("/")[-2]


def vote(tab, winner_of, most=10**6):
    """Vote by keys for the row that winner_of(prompt) names, None for a tie; what was shown."""
    seen = []
    while len(seen) < most and tab.is_visible("#voting"):
        prompt, left, right = shown(tab)
        winner = winner_of(prompt)
        tab.keyboard.press({left: "ArrowLeft", right: "ArrowRight", None: "ArrowDown"}[winner])
        seen.append((prompt, left, right))
    return seen


def saved(tab, folder, button=".save:visible"):
    with tab.expect_download() as download:
        tab.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def three_kinds(prompt):
    """Of four pairs two for the tuned row, one for the base row, one tie."""
    return (ROWS[0], ROWS[0], ROWS[1], None)[int(prompt.split()[-1]) % 4]


def test_a_study_voted_by_keys_gives_the_table_that_the_votes_say(open_page, tmp_path, capsys):
    page, images = make_page(tmp_path, 12)
    tab = open_page(page)
    begin(tab, "Anna")
    seen = vote(tab, three_kinds, 5)
    # Undo shows the last pair again.
    tab.keyboard.press("z")
    assert shown(tab) == seen.pop() and tab.text_content("#place") == "5 of 13"
    for key in ("z", "ArrowDown", "z"):
        shown(tab)
        tab.keyboard.press(key)
    assert shown(tab) == seen.pop()
    # What is there at any time is saved.
    assert len(pd.read_csv(saved(tab, tmp_path))) == 3
    # A reload, and a closed tab, go on at the same place.
    tab.reload()
    assert tab.input_value("#voter") == "Anna"
    begin(tab)
    assert tab.text_content("#place") == "4 of 13"
    tab = tab.context.new_page()
    tab.goto(page.as_uri())
    begin(tab)
    seen += vote(tab, three_kinds)
    assert len(seen) == 13 and {p for p, *_ in seen} == {*images["prompt"]}
    path = saved(tab, tmp_path)
    assert path.name == "votes-Anna.csv" and pd.read_csv(path).columns.tolist() == votes.COLUMNS

    files = votes.ask(settings(path), tmp_path, images, JUDGES, ROWS, {ROWS: 0.599})
    assert [f.name for f in files] == ["vote.html", "people.csv", "agreement.csv"]
    out, err = capsys.readouterr()
    assert "tuned-dipo-50 over base-dipo-50" in out and "59.9 %" in out and not err
    table = pd.read_csv(tmp_path / "people.csv").set_index(["by", "name"])
    whole = table.loc["all"].iloc[0]
    assert (whole[["n", "wins", "losses", "ties", "paper"]] == [12, 6, 3, 3, 0.599]).all()
    assert whole[["low", "high"]].tolist() == pytest.approx(proportion_confint(6, 12, method="wilson"))
    assert whole["p"] == pytest.approx(2 * sum([1, 9, 36, 84]) / 2**9)
    # Pairs 0, 4, 8 and 2, 6, 10 are red, 1, 5, 9 and 3, 7, 11 blue.
    assert table.loc[("category", "red"), ["wins", "losses", "ties"]].tolist() == [3, 3, 0]
    assert table.loc[("category", "blue"), ["wins", "losses", "ties"]].tolist() == [3, 0, 3]
    assert table.loc[("voter", "Anna"), "n"] == 12 and table["paper"].count() == 1
    agreement = pd.read_csv(tmp_path / "agreement.csv").set_index("name")
    assert agreement.loc["Anna", ["n", "agreement"]].tolist() == [1, 1]
    # Of the nine votes for a side PickScore is with the six; HPSv2 likes red's tuned and blue's base pictures.
    assert agreement.loc["PickScore", ["n", "agreement"]].tolist() == pytest.approx([9, 6 / 9])
    assert agreement.loc["HPSv2", ["n", "agreement"]].tolist() == pytest.approx([9, 3 / 9])


def test_two_voters_see_other_sides_and_orders_and_their_agreement_is_krippendorffs(open_page, tmp_path):
    page, images = make_page(tmp_path, 10)
    winners = {"Anna": three_kinds, "Ben B.": lambda prompt: ROWS[int(prompt.split()[-1]) % 3 == 0]}
    seen, files = {}, []
    tab = open_page(page)
    for name, winner_of in winners.items():
        begin(tab, name)
        seen[name] = vote(tab, winner_of)
        files.append(saved(tab, tmp_path))
        tab.click("#other")
    assert [f.name for f in files] == ["votes-Anna.csv", "votes-Ben-B-.csv"]
    a, b = seen.values()
    assert [p for p, *_ in a] != [p for p, *_ in b]
    assert 0 < sum({p: left for p, left, _ in a}[p] != left for p, left, _ in b) < 11
    # The same voter sees the same, in another browser too.
    again = open_page(page)
    begin(again, "Anna")
    assert vote(again, three_kinds) == a
    votes.ask(settings(*files), tmp_path, images, JUDGES, ROWS)
    table = pd.read_csv(tmp_path / "agreement.csv").set_index("name")
    first, second = ([str(w(f"prompt {i}")) for i in range(10)] for w in winners.values())
    observed = np.mean([x != y for x, y in zip(first, second, strict=True)])
    counts = pd.Series(first + second).value_counts()
    expected = 1 - (counts * (counts - 1)).sum() / (20 * 19)
    assert table.loc["voters", ["n", "agreement"]].tolist() == pytest.approx([10, 1 - observed / expected])


def test_one_pair_in_ten_comes_again_with_sides_swapped_and_never_at_once(open_page, tmp_path):
    for n, again in ((1, 0), (2, 1), (3, 1), (47, 5)):
        page, _ = make_page(tmp_path, n, pictures=False)
        tab, left, orders = open_page(page), 0, set()
        for k in range(30):
            plan = tab.evaluate(f"planOf('{k}').map(x => [x.pair.pair, x.showing, x.swapped])")
            places = {(pair, showing): i for i, (pair, showing, _) in enumerate(plan)}
            assert len(plan) == len(places) == n + again and sum(showing == 1 for _, showing, _ in plan) == n
            for pair, showing in places:
                if showing == 2:
                    i, j = places[pair, 1], places[pair, 2]
                    assert j > i + 1 and plan[i][2] != plan[j][2]
                    assert j > i + 10 or n < 20 or j >= n
            left += sum(swapped for _, showing, swapped in plan if showing == 1)
            orders.add(tuple(pair for pair, *_ in plan))
        assert n < 40 or len(orders) == 30
        # Within five standard deviations of one half.
        assert abs(left / (30 * n) - 0.5) < 2.5 / (30 * n) ** 0.5


def test_buttons_clicks_and_taps_vote_once(open_page, tmp_path):
    page, _ = make_page(tmp_path, 12)
    tab = open_page(page, has_touch=True)
    tab.fill("#voter", "Ann")
    tab.click("#start")
    for act in (
        lambda: tab.get_by_role("button", name="Left picture is better").dblclick(),
        lambda: tab.get_by_role("button", name="Right picture is better").tap(),
        lambda: tab.get_by_role("button", name="Tie").click(),
    ):
        shown(tab)
        act()
    shown(tab)
    lines = pd.read_csv(saved(tab, tmp_path))
    assert lines["choice"].tolist() == ["left", "right", "tie"] and (lines["milliseconds"] >= 0).all()
    tab.get_by_role("button", name="Undo").click()
    assert shown(tab) and tab.text_content("#place") == "3 of 13"
    # Control and an arrow is the browser's; the second click of two is no choice, though its pictures are there.
    tab.keyboard.press("Control+ArrowRight")
    tab.mouse.move(600, 300)
    tab.mouse.down(click_count=2)
    tab.mouse.up(click_count=2)
    assert tab.text_content("#place") == "3 of 13"
    # Nor is a key before they are.
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}))"
    tab.evaluate(f"{press}; {press}")
    assert shown(tab) and tab.text_content("#place") == "4 of 13"


@pytest.mark.parametrize("prompt", [MARKUP, LONG], ids=["markup", "long"])
def test_prompts_are_text_and_leave_the_pictures_room(open_page, tmp_path, prompt):
    page, _ = make_page(tmp_path, 3, [prompt, f"{prompt} 2", f"{prompt} 3"])
    for width, height in ((1280, 800), (390, 844)):
        tab = open_page(page, viewport={"width": width, "height": height})
        begin(tab, '<b>"A"|x')
        assert shown(tab)[0].startswith(prompt) and not tab.evaluate("window.hit")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boxes = [x.bounding_box() for x in tab.query_selector_all("#pictures img")]
        assert all(box["height"] > 0.22 * height and box["y"] + box["height"] < height for box in boxes)


@pytest.mark.parametrize(
    ("viewport", "size", "stacked"),
    [((390, 844), (96, 96), True), ((844, 390), (96, 96), False), ((390, 844), (32, 96), False)],
)
def test_pictures_lie_as_they_come_out_larger(open_page, tmp_path, viewport, size, stacked):
    page, _ = make_page(tmp_path, 2, size=size)
    tab = open_page(page, viewport=dict(zip(("width", "height"), viewport, strict=True)), is_mobile=True, has_touch=True)
    begin(tab, "Ann")
    shown(tab)
    one, two = (x.bounding_box() for x in tab.query_selector_all("#pictures img"))
    assert (one["x"] == two["x"]) == stacked and (one["y"] == two["y"]) != stacked
    assert tab.get_by_role("button", name=("Upper" if stacked else "Left") + " picture is better").count() == 1
    root = "document.documentElement"
    assert tab.evaluate(f"{root}.scrollWidth <= innerWidth && {root}.scrollHeight <= innerHeight")
    for button in tab.query_selector_all("#choices button"):
        box = button.bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["y"] + box["height"] <= viewport[1]


NO_STORAGE = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"


def test_without_storage_the_page_says_so_and_goes_on(open_page, tmp_path):
    page, images = make_page(tmp_path, 3)
    tab = open_page("about:blank")
    tab.context.add_init_script(NO_STORAGE)
    tab.goto(page.as_uri())
    assert tab.is_visible("#unkept")
    begin(tab, "Ann")
    vote(tab, three_kinds)
    assert len(votes.read_votes((saved(tab, tmp_path),), images)) == 4
    tab = open_page(page)
    assert not tab.is_visible("#unkept")


def test_in_a_notebooks_sandbox_the_votes_can_be_copied(open_page, tmp_path):
    """Jupyter serves files under "Content-Security-Policy: sandbox allow-scripts": no storage, no forms, no downloads."""
    make_page(tmp_path, 3)
    tab = open_page("about:blank")

    def serve(route):
        path = tmp_path / route.request.url.removeprefix("http://notebook.test/files/")
        route.fulfill(path=path, headers={"Content-Security-Policy": "sandbox allow-scripts"})

    tab.route("http://notebook.test/**", serve)
    tab.goto("http://notebook.test/files/vote.html")
    begin(tab, "Ann")
    shown(tab)
    assert tab.is_visible("summary")
    vote(tab, three_kinds)
    assert tab.is_visible("#end") and tab.is_visible("#unkept")
    tab.click("summary")
    tab.wait_for_function("document.querySelector('textarea').value")
    lines = tab.input_value("textarea").splitlines()
    assert len(lines) == 5 and lines[0] == ",".join(votes.COLUMNS)


def test_two_thousand_pairs_open_at_once_and_load_one_pair_ahead(open_page, tmp_path):
    page, _ = make_page(tmp_path, 2000, [LONG + str(i) for i in range(2000)], pictures=False)
    for row in ROWS:
        (tmp_path / row).mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "any.png")
    tab, wanted = open_page("about:blank"), []

    def serve(route):
        is_page = route.request.url.endswith("vote.html")
        wanted.extend([] if is_page else [route.request.url])
        route.fulfill(path=page if is_page else tmp_path / "any.png")

    tab.route("http://study.test/**", serve)
    begun = time.perf_counter()
    tab.goto("http://study.test/vote.html")
    begin(tab, "Ann")
    shown(tab)
    assert time.perf_counter() - begun < 5 and tab.text_content("#place") == "1 of 2200"
    tab.wait_for_load_state("networkidle")
    assert len(wanted) == 4
    vote(tab, lambda _: None, 1)
    shown(tab)
    tab.wait_for_load_state("networkidle")
    assert len(wanted) == 6 == len({*wanted})


def test_what_is_shown_tells_no_row_and_a_lost_picture_counts_for_nobody(open_page, tmp_path):
    page, images = make_page(tmp_path, 12)
    images["path"].iloc[15].unlink()
    tab = open_page(page)
    begin(tab, "Ann")
    told, lost = [], 0
    while tab.is_visible("#voting"):
        shown(tab)
        lost += tab.is_visible("#broken")
        assert not tab.is_visible("#copy")
        names = "x => [x.alt, x.title, x.getAttribute('aria-label'), x.getAttribute('aria-description')]"
        told.append(tab.inner_text("body") + str(tab.evaluate(f"[...document.querySelectorAll('*')].map({names})")))
        tab.keyboard.press("ArrowLeft")
    assert len(told) == 13 and not any(x in text for text in told for x in (*ROWS, ".png", "00003", "tuned", "base"))
    read = votes.read_votes((saved(tab, tmp_path),), images)
    assert lost in (1, 2) and len(read) == 13 - lost and "00003.png" not in set(read["pair"])


CONTRAST = """() => [...document.querySelectorAll("p, h1, label, button, summary, span, kbd, b, input, textarea")]
    .filter(x => x.checkVisibility() && (x.textContent.trim() || x.value)).map(x => {
        let back = x;
        while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
        return [x.outerHTML.slice(0, 60), getComputedStyle(x).color, getComputedStyle(back).backgroundColor];
    })"""


def luminance(colour):
    """WCAG 2's relative luminance of "rgb(r, g, b)"."""
    x = np.array([int(c) for c in colour[4:-1].split(",")]) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_focus_and_contrast(open_page, tmp_path, scheme):
    page, _ = make_page(tmp_path, 2)
    tab, pairs = open_page(page, color_scheme=scheme), []
    tab.evaluate("document.getElementById('unkept').hidden = document.getElementById('broken').hidden = false")
    assert tab.get_by_role("textbox", name="Your name").count() == 1
    pairs += tab.evaluate(CONTRAST)
    begin(tab, "Ann")
    shown(tab)
    assert tab.get_by_role("progressbar", name="Progress").count() == 1
    pairs += tab.evaluate(CONTRAST)
    # By the tab key to a picture, where the focus is seen and Enter chooses.
    while "picture is better" not in (tab.evaluate("document.activeElement.getAttribute('aria-label')") or ""):
        tab.keyboard.press("Tab")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    tab.keyboard.press("Enter")
    assert tab.text_content("#place") == "2 of 3"
    vote(tab, lambda _: None)
    tab.click("summary")
    assert tab.get_by_role("textbox", name="Your votes as CSV").count() == 1
    pairs += tab.evaluate(CONTRAST)
    backs = {back for *_, back in pairs}
    assert len(pairs) > 20 and ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 22)") in backs
    for element, *colours in pairs:
        low, high = sorted(map(luminance, colours))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (element, colours)


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", 'Ann "A", B;C', "<b>|x", "Zoë  李", "-2"])
def test_names_of_voters_are_data(open_page, tmp_path, name, capsys):
    page, images = make_page(tmp_path, 2)
    tab = open_page(page)
    begin(tab, name)
    vote(tab, lambda _: ROWS[0])
    path = saved(tab, tmp_path)
    assert path.parent == tmp_path and not set(path.name) & set('<>:"/\\|?*= ')
    assert not path.read_text(encoding="utf-8").splitlines()[1].startswith(tuple("=+-@"))
    votes.ask(settings(path), tmp_path, images, JUDGES, ROWS)
    said = capsys.readouterr().out
    assert "<b>" not in said.replace("\\<b>", "") and len({line.count("|") for line in said.splitlines()[2:10]}) <= 3
    read = votes.read_votes((path,), images)
    assert set(read["voter"]) == {" ".join(name.split())} and (read["won"] == 1).all()
    people = (tmp_path / "people.csv").read_text(encoding="utf-8").splitlines()
    assert not any(line.split(",")[3].startswith(tuple("=+-@")) for line in people)


# ------------------------------------------------------------------------------------------------------------- the CSVs


def lines(images, voter="Ann", choice="left"):
    """The lines of a voter who saw the first row on the left, as the page writes them."""
    pairs = votes.pairs_of(images, *ROWS)
    return [[voter, x.pair, 1, *ROWS, x.pictures, 900, choice] for x in pairs.itertuples()]


def write(path, rows, separator=",", encoding="utf-8"):
    text = "".join(separator.join(map(str, row)) + "\n" for row in [votes.COLUMNS, *rows])
    path.write_text(text, encoding=encoding)
    return path


def test_what_cannot_count_is_named_counted_and_left_out(tmp_path, capsys):
    images = images_of(tmp_path, 6, pictures=False)
    rows = lines(images)
    whole = write(tmp_path / "whole.csv", rows)
    cut = tmp_path / "cut.csv"
    text = whole.read_text().replace("Ann", "Cut")
    cut.write_text(text[: text.rindex(",le") + 3])
    twice = write(tmp_path / "twice.csv", rows[:2])
    unknown = write(tmp_path / "unknown.csv", [[*rows[0][:1], "00099.png", *rows[0][2:]], [*rows[0][:3], "x", *rows[0][4:]]])
    changed = write(tmp_path / "changed.csv", [["Eve", *rows[0][1:5], "0-1", *rows[0][6:]], ["Eve", *rows[1][1:]]])
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("file,score\na.png,1\nb.png,2\n")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    files = (whole, cut, twice, unknown, changed, foreign, binary)
    read = votes.read_votes(tuple(map(str, files)), images)
    assert read.groupby("voter", sort=False).size().to_dict() == {"Ann": 6, "Cut": 5, "Eve": 1}
    assert capsys.readouterr().err.splitlines() == [
        f"warning: --votes {foreign}: not a CSV of vote.html, lines left out: 2",
        f"warning: --votes {binary}: not a CSV of vote.html, lines left out: 0",
        f"warning: --votes {cut}: lines left out, cut short or no votes: 1",
        f"warning: --votes {twice}: lines left out, voted already by the same voter: 2",
        f"warning: --votes {unknown}: lines left out, on pairs that are not here: 2",
        f"warning: --votes {changed}: lines left out, on pictures that have changed since: 1",
    ]
    assert votes.ask(settings(foreign), tmp_path, images, JUDGES, ROWS) == [tmp_path / "vote.html"]
    assert "no vote counts" in capsys.readouterr().err


@pytest.mark.parametrize(("separator", "encoding"), [(";", "cp1252"), ("\t", "utf-16"), (",", "utf-8-sig")])
def test_csvs_that_a_spreadsheet_saved_again_are_read(tmp_path, separator, encoding):
    images = images_of(tmp_path, 4, pictures=False)
    path = write(tmp_path / "votes.csv", lines(images, "Zoë"), separator, encoding)
    read = votes.read_votes((str(path),), images)
    assert read["voter"].tolist() == ["Zoë"] * 4 and (read["won"] == 1).all()


def test_sides_are_taken_back_and_each_two_rows_have_their_table(tmp_path):
    rows = (*ROWS, "third")
    images = images_of(tmp_path, 4, pictures=False, rows=rows)
    path, table = tmp_path / "votes.csv", []
    for a, b in ((rows[0], rows[1]), (rows[1], rows[2])):
        for k, x in enumerate(votes.pairs_of(images, a, b).itertuples()):
            # a's picture always wins, from either side.
            sides = (a, b, "left") if k % 2 else (b, a, "right")
            table.append(["Ann", x.pair, 1, *sides[:2], x.pictures, 1, sides[2]])
    read = votes.read_votes((str(write(path, table)),), images)
    wins = votes.wins_of(read)
    whole = wins[wins["by"] == "all"]
    assert whole[["a", "b", "wins", "n"]].to_numpy().tolist() == [[*rows[:2], 4, 4], [*rows[1:], 4, 4]]


def test_rows_and_files_that_are_not_there_are_refused(tmp_path, run):
    for vote in (("a", "a"), ("a", "x")):
        with pytest.raises(UserError, match=r"--vote a .: give two of a, b"):
            votes.asked_rows(settings(vote=vote), ["a", "b"])
    assert votes.asked_rows(settings(vote=("b/", "a")), ["a", "b"]) == ("b", "a")
    code, _, err = run("Human_Preference_compare", "--demo", "--votes", "none.csv")
    assert code == 2 and err == "error: --votes none.csv: no such file; give the CSVs that voters sent back\n"
    code, _, err = run("compare_quality", "--demo", "--vote", "dipo-30", "dipo-31")
    assert code == 2 and err.startswith("error: --vote dipo-30 dipo-31: give two of dipo-20, dipo-30,")
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- whole programs


def test_a_demo_study_from_the_run_to_peoples_table(open_page, run, tmp_path):
    """And folders of pictures, asked about and read in the same way."""
    study = ("Human_Preference_compare", "--demo", "--limit", 1, "--output-dir", "s")
    study += ("--dipo-steps", 2, "--baseline-steps", 3)
    code, out, err = run(*study)
    assert code == 0 and "s/vote.html" in out, err
    tab = open_page(tmp_path / "s/vote.html")
    begin(tab, "Ann")
    seen = vote(tab, lambda prompt: "base-dipo-2" if "landscape" in prompt else "tuned-dipo-2")
    assert len(seen) == 4 and not tab.is_visible("#broken")
    path = saved(tab, tmp_path)
    code, out, err = run(*study, "--score-only", "--votes", path)
    assert code == 0 and "| tuned-dipo-2 over base-dipo-2 | all " in out, err
    table = pd.read_csv("s/people.csv").set_index(["by", "name"])
    assert table.loc["all"].iloc[0][["n", "wins", "losses"]].tolist() == [3, 2, 1]
    assert table.loc[("category", "landscape"), "losses"] == 1
    # A picture that is made anew has another fingerprint.
    Path("s/base-dipo-2/00000.png").unlink()
    code, _, err = run(*study, "--votes", path)
    assert code == 0 and f"--votes {path}: " in err and "pictures that have changed since" in err

    folders = ("compare_quality", "--demo", "--folders", "s/tuned-dipo-2/", "s/tuned-diffusion-dpo-3")
    code, out, err = run(*folders)
    assert code == 0 and "s/tuned-dipo-2/vote.html" in out, err
    tab = open_page(tmp_path / "s/tuned-dipo-2/vote.html")
    begin(tab, "Ben")
    while tab.is_visible("#voting"):
        tab.wait_for_selector("#pictures:not(.waiting)", state="attached")
        left = tab.query_selector("#pictures img").get_attribute("src")
        assert not tab.is_visible("#broken")
        tab.keyboard.press("ArrowRight" if left.startswith("../") else "ArrowLeft")
    code, out, err = run(*folders, "--votes", saved(tab, tmp_path))
    assert code == 0 and "s/tuned-dipo-2 over s/tuned-diffusion-dpo-3" in out, err
    assert pd.read_csv("s/tuned-dipo-2/people.csv")["wins"].iloc[0] == 3


def test_an_installed_package_has_the_page(tmp_path):
    for name in ("pyproject.toml", "requirements.txt", "README.md", "dipo"):
        (tmp_path / name).symlink_to(ROOT / name)
    build = "from setuptools import setup; setup()"
    done = start(sys.executable, "-c", build, "-q", "build_py", "--build-lib", "built", cwd=tmp_path)
    assert (tmp_path / "built/dipo/vote.html").exists(), done.stderr


def test_the_table_finds_the_truth_of_the_simulated_voter(tmp_path):
    """Win rate, self-agreement and judges' agreement by the annotator's rewards and Bradley and Terry's rule alone."""
    rng, scenes, n = np.random.default_rng(0), world.sample_scenes("held_out", 150, 0), 150
    images = images_of(tmp_path, n, [world.caption(x) for x in scenes], pictures=False)
    for row, i in itertools.product(range(2), range(n)):
        path = tmp_path / ROWS[row] / f"{i:05d}.png"
        path.parent.mkdir(exist_ok=True)
        picture = world.draw(scenes[i], np.random.default_rng(i))
        Image.blend(picture, Image.new("RGB", picture.size, "grey"), rng.uniform(0, 0.2 + 0.1 * row)).save(path)
    rewards = [annotator.reward(Image.open(x.path), x.prompt) for x in images.itertuples()]
    # One judge is the reward itself, the other guesses.
    images["pickscore"], images["hpsv2"] = rewards, rng.random(2 * n)
    (page,) = votes.ask(settings(), tmp_path, images, JUDGES, ROWS)
    voter.main(voter.Settings(study=str(page.parent), voters=4))
    votes.ask(settings(*sorted(tmp_path.glob("votes-*.csv"))), tmp_path, images, JUDGES, ROWS)

    gap = np.array(rewards[:n]) - np.array(rewards[n:])
    tie = np.abs(gap) < 0.1
    chosen = np.where(tie, 0, 1 / (1 + np.exp(-gap)))
    people = pd.read_csv(tmp_path / "people.csv").set_index("by").loc["all"]
    assert people["n"] == 4 * n and people["ties"] == 4 * tie.sum() > 0
    assert people["low"] < chosen.mean() < people["high"] and 0.5 < chosen.mean() < 0.9
    agreement = pd.read_csv(tmp_path / "agreement.csv").set_index("name")
    again = np.where(tie, 1, chosen**2 + (1 - chosen) ** 2).mean()
    own = agreement[agreement["measure"].str.startswith("same choice again")]
    assert own["n"].tolist() == [15] * 4
    assert all(x.agreement_low < again < x.agreement_high for x in own.itertuples())
    same = {"PickScore": gap > 0, "HPSv2": np.sign(np.subtract(*np.split(images["hpsv2"].to_numpy(), 2))) > 0}
    for judge, likes_a in same.items():
        x = agreement.loc[judge]
        expected = np.where(likes_a, chosen, 1 - chosen)[~tie].mean()
        assert x["n"] == 4 * (~tie).sum() and x["agreement_low"] < expected < x["agreement_high"]
    assert 0 < agreement.loc["voters", "agreement"] < 1 and agreement.loc["voters", "n"] == n


def test_the_annotators_csv_is_the_pages(open_page, tmp_path):
    """The simulated voter writes what the page writes for the same choices, but for order and time."""
    page, _ = make_page(tmp_path, 12)
    data = voter.page_data(page)
    assert data["rows"] == [*ROWS] and data["pairs"][3]["pictures"] == [f"{row}/00003.png" for row in ROWS]
    tab = open_page(page)
    begin(tab, "annotator-0")
    vote(tab, lambda _: ROWS[0])
    theirs = pd.read_csv(saved(tab, tmp_path))
    ours = voter.votes("annotator-0", data, [[99, 0]] * 12, np.random.default_rng(0))
    assert ours.columns.tolist() == theirs.columns.tolist() and len(ours) == len(theirs)
    for table in (ours, theirs):
        again = table[table["pair"].isin(table.loc[table["showing"] == 2, "pair"])]
        assert sorted(again["left"]) == sorted(ROWS) == sorted({*table["left"]})
        first = table[table["showing"] == 1].sort_values("pair")
        assert first["pictures"].tolist() == [x["fingerprint"] for x in data["pairs"]]
        assert (np.where(table["choice"] == "left", table["left"], table["right"]) == ROWS[0]).all()
