from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from counts_by_hand import COUNTS, costing

from leaderboard.energy import ARITHMETIC, read_models
from leaderboard.files import canonical_sha256
from leaderboard.pictures import grid, save_png
from leaderboard.protocols import STANDARD_V1
from leaderboard.record.entries import read_records
from leaderboard.record.records import Artefact, Cost, Dataset, MetricValue, Record, write_record
from leaderboard.reports.energies import band_cell
from leaderboard.reports.page import render_page
from leaderboard.reports.published import Published, PublishedResult, Source, read_published

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")

Make = Callable[..., Record]
HOSTILE = """<script>window.broken=1</script><img src=x onerror="window.broken=1">'"`${window.broken=1}"""
LONG = "a-variant-" + "x" * 200
ROWS = 21
"""Rows of measured results; one of them has three seeds."""
CHROMIUM = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync"""


def write_records(make: Make, root: Path) -> None:
    """Records of every kind in two runs, each with its sample grid."""
    cost = make().cost

    def costing(energy: float) -> Cost:
        return replace(cost, sops=0.0, acs=0.0, macs=energy / 4.6e-9, energy_strict_mj=energy)

    records = [make(fd=10.0 - i, variant=f"variant {i}", cost=costing(2.0**i)) for i in range(10)]
    fast = replace(costing(0.5), firing_rate=None, firing_rates={}, images_per_second=None)
    config = {"config": {HOSTILE: HOSTILE}, "config_sha256": canonical_sha256({HOSTILE: HOSTILE})}
    records += [
        make(fd=12.0, method="DDPM", variant="no neurons", cost=fast),
        make(fd=0.1, variant="few images", draft=True),
        make(fd=5.5, method=HOSTILE, variant=HOSTILE, solver=HOSTILE, hardware=HOSTILE, **config),
        make(fd=5.6, variant=LONG, extractor=Artefact("digits", "b" * 64)),
    ]
    records += [make(fd=20.0 + k, method="Seeded", variant="three seeds", seeds={"training": k}) for k in range(3)]
    names = ("SDDPM", "FSDDIM", "SDiT")
    for i, (name, data) in enumerate((n, d) for n in names for d in ("mnist", "cifar10")):
        metrics = {
            "fid": MetricValue(9.5 * 3**i, 0.21, 50_000, "singular covariance: few images" if i == 0 else ""),
            "kid_mean": MetricValue(0.01 * 2**i, 0.0004, 10_000),
            "is_mean": MetricValue(8.0 - i, 0.1, 50_000),
        }
        fields = {"protocol": STANDARD_V1, "metrics": metrics, "cost": costing(300.0 / (i + 1))}
        records.append(make(method=name, dataset=Dataset(data, HOSTILE, HOSTILE), **fields))
    images = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    for record in records:
        path = write_record(record, root / record.dataset.name / "records")
        save_png(grid(images, columns=8, scale=8), path.parent.parent / "samples" / f"{path.stem}.png")


@pytest.fixture(scope="module", autouse=True)
def any_name() -> Iterator[None]:
    """Records refuse names with markup; the page must be safe even if one gets through."""
    with patch("leaderboard.record.records.check_name"):
        yield


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published()


@pytest.fixture(scope="module")
def folder(make_record: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with records and samples."""
    folder = tmp_path_factory.mktemp("runs")
    write_records(make_record, folder)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path, published: Published) -> str:
    return render_page(read_records([folder])[0], published)


def test_page_is_self_contained(html: str) -> None:
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "<title>Spiking diffusion benchmark: leaderboard</title>" in html
    assert "default-src 'none'" in unescape(html)
    addresses = [value for tag, name, value in attributes(html) if name == "src" or (tag == "link" and name == "href")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in html
    assert "@import" not in html


def attributes(html: str) -> list[tuple[str, str, str]]:
    """Returns every attribute of the page as `(tag, name, value)`."""
    found: list[tuple[str, str, str]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.extend((tag, k, v or "") for k, v in attrs)  # type: ignore
    parser.feed(html)
    return found


def assert_harmless(html: str) -> None:
    assert html.count("<script>") == 1
    assert "&lt;script&gt;window.broken=1&lt;/script&gt;" in html
    found = attributes(html)
    assert len(found) > 100
    assert not [name for _, name, _ in found if name.startswith("on")]
    assert all(value.startswith("data:") for tag, name, value in found if (tag, name) == ("img", "src"))


def test_hostile_names_are_escaped(html: str) -> None:
    assert_harmless(html)


def test_hostile_published_numbers_are_escaped(published: Published) -> None:
    result = PublishedResult(HOSTILE, "SNN", HOSTILE, {HOSTILE: 1.0}, "s", HOSTILE, HOSTILE, "no", caveats=(HOSTILE,))
    hostile = Published({"s": Source(HOSTILE, HOSTILE)}, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, (result,))
    assert_harmless(render_page([], hostile))


def test_plain_page_shows_all_without_javascript(html: str, published: Published) -> None:
    body = html.split("<script>")[0]
    assert body.count('<tbody class="entry') == ROWS + len(published.results)
    assert body.count('<pre class="json"') == ROWS + 2 + len(published.results)
    assert 'class="controls" role="search" hidden' in body  # the controls need JavaScript, which shows them


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium with a fresh profile; skips the test if it is not installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=CHROMIUM.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(html: str, tmp_path: Path, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page from its file; checks afterwards for network requests, console errors and injected scripts."""
    file = tmp_path / "index.html"
    file.write_text(html)
    seen: list[str] = []
    pages: list[Any] = []

    def opened(width: int = 1280, fragment: str = "", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("dialog", lambda dialog: seen.append(f"dialog: {dialog.message}"))
        page.on("request", lambda r: seen.append(f"request: {r.url[:80]}") if not _is_local(r.url, file) else None)
        page.goto(file.as_uri() + fragment)
        pages.append(page)
        return page

    yield opened
    assert not any(page.evaluate("window.broken") for page in pages)
    for page in pages:
        page.context.close()
    assert seen == []


def _is_local(url: str, file: Path) -> bool:
    return url.split("#")[0] == file.as_uri() or url.startswith(("data:", "blob:"))


def board(page: Any, title: str) -> Any:
    return page.locator("article.board", has=page.locator("h3", has_text=title))


def column(table: Any, name: str) -> list[str]:
    """Returns the texts of a column in the order shown."""
    heads, *rows = table.locator("table.results").evaluate(
        "t => [...t.rows].filter(r => r.className !== 'detail').map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    place = next(i for i, text in enumerate(heads) if text.split("\u202f")[0] == name)
    return [row[place] for row in rows]


def sort(table: Any, name: str) -> Any:
    header = table.locator("thead th").filter(has_text=re.compile(rf"^\s*{re.escape(name)}")).first
    header.locator("button").click()
    return header


def numbers(texts: list[str]) -> list[float | None]:
    return [None if text in ("-", "\u2013") else float(re.split("[-\\s]", text.replace(",", ""))[0]) for text in texts]


def test_numbers_sort_as_numbers_and_missing_ones_come_last(open_page: Callable[..., Any]) -> None:
    table = board(open_page(), "digits, offline-v1")
    for name in ("fd_digits", "45 nm arithmetic, mJ", "Images/s", "T", "#"):
        header = sort(table, name)
        for direction in ("ascending", "descending"):
            assert header.get_attribute("aria-sort") == direction
            *ranked, draft = numbers(column(table, name))
            there = [value for value in ranked if value is not None]
            assert there == sorted(there, reverse=direction == "descending")
            assert ranked == there + [None] * (len(ranked) - len(there))
            assert column(table, "Variant")[-1] == "few images"  # a draft, whatever its value
            header.locator("button").click()
        assert header.get_attribute("aria-sort") == "none"
        assert column(table, "#") == ["1-14"] * 14 + ["\u2013"]  # single seeds cannot be told apart
        assert column(table, "Variant")[-2:] == ["three seeds", "few images"]
    assert draft is None


def test_text_sorts_as_text_by_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page()
    table = board(page, "digits, offline-v1")
    button = table.locator("thead th", has_text="Variant").locator("button")
    button.focus()
    page.keyboard.press("Enter")
    variants = column(table, "Variant")
    assert variants.index("variant 2") < variants.index("variant 9")
    assert variants.index("no neurons") < variants.index("variant 0")
    page.keyboard.press("Space")
    variants = column(table, "Variant")
    assert variants.index("variant 9") < variants.index("variant 2")
    assert table.locator("[aria-sort=descending]").count() == 1
    assert sort(table, "Method").get_attribute("aria-sort") == "ascending"
    assert table.locator("[aria-sort=descending]").count() == 0


def test_published_numbers_sort_too(open_page: Callable[..., Any]) -> None:
    table = board(open_page(), "cifar10, paper-sddpm").filter(has_text="SDPM-Solver")
    sort(table, "FID")
    values = numbers(column(table, "FID"))
    assert len(values) == 44
    assert (values[0], values[-1]) == (12.13, 58.38)
    assert values == sorted(values, key=float)
    sort(table, "IS")
    scores = numbers(column(table, "IS"))
    assert scores[0] == 5.484
    assert scores[-1] is None


def test_filter_by_text_method_and_source(open_page: Callable[..., Any]) -> None:
    page = open_page()
    visible, status = page.locator("tr.main:visible"), page.locator("#status")
    total = visible.count()
    assert status.inner_text() == f"{total} of {total} results"
    page.get_by_label("Search").fill("cifar10 TSM dpm-solver")
    assert visible.count() == 6
    assert status.inner_text() == f"6 of {total} results"
    assert page.locator("article:visible").count() == 1
    assert page.locator("nav li:visible").all_inner_texts() == ["cifar10"]
    page.get_by_label("Search").fill("")
    page.get_by_label("Method").select_option("FSDDIM")
    assert set(page.locator("tr.main:visible .name").all_inner_texts()) == {"FSDDIM"}
    assert {"measured", "published"} <= set(page.locator("tr.main:visible .badge").all_inner_texts())
    page.get_by_label("published", exact=True).check()
    assert set(page.locator("tr.main:visible .badge").all_inner_texts()) == {"published"}
    assert visible.count() == 7
    page.get_by_label("measured", exact=True).check()
    assert set(page.locator("tr.main:visible .badge").all_inner_texts()) == {"measured"}
    page.get_by_label("Search").fill("no such thing")
    assert visible.count() == 0
    assert status.inner_text().startswith("No result matches")


def test_row_expands_and_offers_its_record(open_page: Callable[..., Any], folder: Path) -> None:
    page = open_page(accept_downloads=True)
    row = page.locator("tbody.entry", has_text="variant 3").first
    button, detail = row.locator(".open"), row.locator("tr.detail")
    assert not detail.is_visible()
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert detail.is_visible()
    for part in ("a" * 64, "torch 2.8", "mJ by arithmetic-45nm"):
        assert part in detail.inner_text()
    with page.expect_download() as download:
        detail.get_by_role("button", name="Download").click()
    (stored,) = (path for path in (folder / "digits" / "records").glob("*.json") if "variant 3" in path.read_text())
    assert download.value.suggested_filename == stored.name
    assert download.value.path().read_text() == stored.read_text()
    detail.get_by_role("button", name="Copy").click()
    detail.get_by_role("button", name=re.compile("Copied|Selected")).wait_for()
    button.click()
    assert button.get_attribute("aria-expanded") == "false"
    assert not detail.is_visible()


def test_published_row_expands_with_its_caveats(open_page: Callable[..., Any]) -> None:
    row = open_page().locator("tbody.published", has_text="retrained by a user")
    row.locator(".open").click()
    detail = row.locator("tr.detail")
    assert "SDDPM repository" in detail.inner_text()
    assert json.loads(detail.locator("pre.json").inner_text())["metrics"] == {"fid": 46.21, "is_mean": 5.74}


def test_samples_enlarge_and_close(open_page: Callable[..., Any]) -> None:
    page = open_page()
    thumbnail = page.get_by_role("button", name="Enlarge the samples of SDDPM, variant 4")
    thumbnail.scroll_into_view_if_needed()
    small = thumbnail.locator("img").bounding_box()
    assert small is not None
    assert page.locator(".picture:visible").count() == 0
    thumbnail.click()
    picture = page.locator(".picture:visible")
    large = picture.locator("img").bounding_box()
    assert large is not None
    assert large["height"] > 8 * small["height"]
    assert picture.locator("img").evaluate("image => image.complete && image.naturalWidth") > 500
    page.keyboard.press("Escape")
    assert page.locator(".picture:visible").count() == 0
    thumbnail.click()
    picture.get_by_role("button", name="Close").click()
    assert page.locator(".picture:visible").count() == 0


def test_point_of_the_plot_leads_to_its_row(open_page: Callable[..., Any]) -> None:
    page = open_page()
    figure = board(page, "digits, offline-v1").locator("figure:visible svg.wide")
    assert figure.locator("a.mark").count() == 15
    assert figure.locator("a.unranked").count() == 1
    assert figure.locator("path.front").first.get_attribute("d")
    point = figure.locator("a.mark[aria-label='SDDPM, variant 2']")
    point.focus()
    page.keyboard.press("Enter")
    row = page.locator("tbody.entry:target")
    assert "variant 2" in row.locator("tr.main").inner_text()
    assert row.locator("tr.detail").is_visible()


def test_seeds_open_from_their_row(open_page: Callable[..., Any]) -> None:
    page = open_page()
    row = page.locator("tbody.entry", has_text="three seeds")
    assert row.locator("tr.main").inner_text().split("\t")[5].strip() == "21.0 ±2.5"
    assert row.locator(".seeds").is_hidden()
    row.locator(".open").click()
    assert [text.split()[:2] for text in row.locator(".seeds tbody tr").all_inner_texts()] == [
        ["seed", "0"],
        ["seed", "1"],
        ["seed", "2"],
    ]
    assert "20.000 (±0.024)" in row.locator(".seeds").inner_text()
    assert row.locator("pre.json:visible").count() == 0
    row.get_by_text("Record of seed 1").click()
    assert json.loads(row.locator("pre.json:visible").inner_text())["seeds"] == {"training": 1}
    anchor = row.locator("details.record").nth(2).get_attribute("id")
    linked = open_page(fragment=f"#{anchor}").locator(f"#{anchor} pre.json")
    assert json.loads(linked.inner_text())["seeds"] == {"training": 2}


def test_a_phone_shows_distances_and_a_plot_of_its_own(open_page: Callable[..., Any]) -> None:
    page = open_page(390)
    table = board(page, "digits, offline-v1")
    assert table.locator("svg.narrow:visible").count() == 1
    assert table.locator("svg.wide:visible").count() == 0
    row = table.locator("tr.main", has_text="three seeds")
    distance = row.locator("td.number").nth(1).bounding_box()
    assert distance is not None
    assert distance["x"] + distance["width"] <= 390
    assert row.locator(".under").inner_text() == "three seeds"
    assert row.locator(".badge").is_hidden()
    text = table.locator("svg.narrow:visible text").first.evaluate("e => e.getBoundingClientRect().height")
    assert text > 9  # readable without zooming


def test_plot_is_above_its_table(open_page: Callable[..., Any]) -> None:
    table = board(open_page(), "digits, offline-v1")
    plot, rows = table.locator("svg.wide:visible").bounding_box(), table.locator("table.results").bounding_box()
    assert plot is not None
    assert rows is not None
    assert plot["y"] + plot["height"] < rows["y"]
    assert plot["width"] > 800


@pytest.fixture
def counted(make_record: Make, tmp_path: Path, published: Published) -> Path:
    """A page of two methods with operations by layer, one without, and a table of another dataset without."""
    cost = costing()
    records = [
        make_record(fd=1.0, variant="a", cost=cost),
        make_record(fd=2.0, variant="b", cost=costing(replace(COUNTS, neurons={}))),
        make_record(fd=3.0, variant="older"),
        *(make_record(fd=i, variant=f"{i}", dataset=Dataset("mnist", "f" * 64, "hub")) for i in (4.0, 5.0)),
    ]
    path = tmp_path / "counted.html"
    path.write_text(render_page([(Path(f"{i}.json"), record) for i, record in enumerate(records)], published))
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_model_of_energy_changes_column_header_and_axis(browser: Any, counted: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(counted.as_uri())
    digits, mnist = (board(page, f"{name}, offline-v1") for name in ("digits", "mnist"))
    assert page.locator("#energy").input_value() == "all models"
    for name, header, points in (
        ("all models", "45 nm arithmetic, mJ", 3),
        ("memory-45nm", "45 nm memory, mJ", 2),
        ("arithmetic-45nm", "45 nm arithmetic, mJ", 3),
        ("neurobench-45nm", "45 nm effective, mJ", 2),
    ):
        page.select_option("#energy", name)
        assert digits.locator("svg:visible >> a.mark").count() == points
        assert digits.locator("svg:visible text.title").first.text_content().count(name.split("-")[0]) == 1
        cells = column(digits, header)
        model = read_models()[ARITHMETIC if name == "all models" else name]
        band = band_cell(model.energy(costing()))
        assert cells[0] == str(band)
        assert float(digits.locator("td.energy").first.get_attribute("data-value")) == pytest.approx(band.value)
        assert (cells[2] == "-") == (points == 2)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert "No plot" in mnist.locator("p.missing:visible").inner_text()
    page.close()


def test_published_figures_say_whether_they_are_reproduced(open_page: Callable[..., Any]) -> None:
    table = board(open_page(), "kmnist, paper-spiking-diffusion")
    assert set(column(table, "Reproduced")) == {"not tried"}


def test_link_to_a_hidden_row_shows_it(open_page: Callable[..., Any]) -> None:
    page = open_page()
    anchor = page.locator("tbody.entry", has_text="variant 5").first.get_attribute("id")
    page.get_by_label("published", exact=True).check()
    page.evaluate("anchor => { location.hash = anchor }", anchor)
    page.locator(f"#{anchor} tr.detail").wait_for()
    assert open_page(fragment=f"#{anchor}").locator(f"#{anchor} tr.detail").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_page_never_scrolls_sideways(open_page: Callable[..., Any], width: int, scheme: str) -> None:
    page = open_page(width, color_scheme=scheme)
    for button in page.locator(".open").all()[:20]:
        button.evaluate("button => button.click()")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = board(page, "digits, offline-v1").locator(".scroll").first
    assert wide.evaluate("element => element.scrollWidth > element.clientWidth")  # the table scrolls by itself
    inside = page.locator(".detail .inner:visible").first.bounding_box()
    assert inside is not None
    assert inside["width"] <= width


def test_hostile_names_show_as_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    row = page.locator("tbody.entry", has=page.locator("tr.main", has_text="window.broken"))
    assert row.locator(".name").inner_text() == HOSTILE
    row.locator(".open").click()
    assert HOSTILE in row.locator("tr.detail dl").inner_text()
    page.get_by_label("Method").select_option(label=HOSTILE)
    assert page.locator("tr.main:visible").count() == 1
    assert page.evaluate("window.broken") is None


def test_policy_blocks_injected_scripts(html: str, tmp_path: Path, browser: Any) -> None:
    file = tmp_path / "index.html"
    file.write_text(html.replace("<main>", "<main><img src=x onerror='window.ran=1'><script>window.ran=1</script>"))
    page = browser.new_page()
    reported: list[str] = []
    page.on("console", lambda message: reported.append(message.text))
    page.goto(file.as_uri())
    assert page.evaluate("window.ran") is None
    assert len([text for text in reported if "Content Security Policy" in text]) >= 2
    page.close()


def test_page_is_readable_without_javascript(open_page: Callable[..., Any], published: Published) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("tr.main:visible").count() == ROWS + len(published.results)
    assert not page.locator(".controls").is_visible()
    assert page.locator("tr.detail summary:visible").count() >= 20
    page.locator("tr.detail summary").first.click()
    assert page.locator("tr.detail dl:visible").count() == 1
    page.locator(".thumbnail").first.click()
    assert page.locator(".picture:visible").count() == 1
