"""The pages, parsed and in a browser: nothing runs or is fetched, nothing is cut, all is named.

Without a browser the tests that need one are skipped; `apt-get install chromium` is enough.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.html_page import LOADING, Page
from helpers.reports import AFTER, Tried, looked, run
from helpers.results import PIXELS, diagnosis, suspicion
from nnprune_backdoor import CleanData, Purified
from nnprune_backdoor.core.answers import Answers
from nnprune_backdoor.core.measures import SuspectLabel
from nnprune_backdoor.fleets.table import Row
from nnprune_backdoor.fleets.table import to_html as fleet_page
from nnprune_backdoor.reports import Report, scan_to_html
from nnprune_backdoor.reports.pages import to_html
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.triggers import RecoveredPerturbation
from nnprune_backdoor.utils.statistics import Rate

A4 = 718  # pixels of CSS, between margins of a centimetre
PHONE = 320
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
SUSPECT = RecoveredPerturbation(
    3, 0.4 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)), PIXELS, 0.95, 20
)


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[test]'")
    with playwright.sync_playwright() as engine:
        if path is None and not Path(engine.chromium.executable_path).exists():
            pytest.skip("no browser here: apt-get install chromium, or playwright install chromium")
        started = engine.chromium.launch(executable_path=path, args=[*QUIET])
        yield started
        started.close()


# ---- pages --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def purified(_trained: nn.Module, clean: CleanData) -> Purified:
    """With a curve, triggers, evidence and labels."""
    found = looked(run(_trained, clean, Tried()), True, AFTER)
    return replace(found, source={"classes": ["a rather long name of a class"] * 10})


@pytest.fixture(scope="module")
def plainest(_trained: nn.Module, clean: CleanData) -> Purified:
    """Without labels, nothing silenced, nothing removed, no trigger."""
    found = run(_trained, [clean.images], LowestCount(0), removal="none")
    return replace(found, triggers=(), answers=replace(stamped(found), stamped=()))


@pytest.fixture(scope="module")
def distilled(purified: Purified) -> Purified:
    """As the default call leaves it: suspect labels, and no trigger of criterion or selector."""
    rate = Rate(20, 20), Rate(3, 20)
    answers = stamped(purified)
    first = replace(answers.stamped[0], trigger=SUSPECT)
    return replace(
        purified,
        triggers=(),
        suspects=(SuspectLabel(3, *rate),),
        answers=replace(answers, stamped=(first, answers.stamped[0])),
    )


@pytest.fixture(scope="module")
def crowded(purified: Purified) -> Purified:
    """A thousand classes."""
    drawn = torch.randint(1000, (2, 300), generator=torch.Generator().manual_seed(0))
    answers = replace(stamped(purified), labels=drawn[0], before=drawn[0], after=drawn[1])
    return replace(purified, answers=answers, given=replace(purified.given, classes=1000))


def stamped(purified: Purified) -> Answers:
    assert purified.answers is not None
    return purified.answers


def of_a_fleet() -> str:
    facts = {"target": 3, "suspect labels": "1 5", "accuracy before": 0.91234, "cautions": 2}
    rows = [
        Row("a", "a" * 64 + ".json", says="evidence of a backdoor", evidence=0.97, facts=facts),
        Row("models/of/the/shop/resnet-with-a-long-name.safetensors", says="no result yet"),
        Row("b", "b" * 64 + ".json", failed=True, says="models/b.pth: no such file; check it"),
    ]
    return fleet_page(rows, "manifest.csv")


# name -> from "purified", "plainest", "distilled", "crowded" to a page
PAGES: dict[str, Callable[[dict[str, Purified]], str]] = {
    "purified": lambda given: given["purified"].to_html(),
    "no labels, nothing silenced, no trigger": lambda given: given["plainest"].to_html(),
    "suspect labels": lambda given: given["distilled"].to_html(),
    "a thousand classes": lambda given: given["crowded"].to_html(),
    "from the folder": lambda given: to_html(Report.of(given["purified"]), {}, "No pictures."),
    "scan, evidence": lambda _: scan_to_html(diagnosis(True)),
    "scan, no evidence": lambda _: scan_to_html(diagnosis(False)),
    "scan, cannot tell": lambda _: scan_to_html(
        diagnosis(
            False,
            cannot_tell="too few images",
            suspicions=(suspicion(False, 2, universal=0.1, size=1.0),),
            triggers=(),
            perturbations=(),
        )
    ),
    "many models": lambda _: of_a_fleet(),
}


@pytest.fixture(scope="module")
def files(
    purified: Purified,
    plainest: Purified,
    distilled: Purified,
    crowded: Purified,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Name -> the page as a file."""
    folder = tmp_path_factory.mktemp("pages")
    given = {
        "purified": purified, "plainest": plainest, "distilled": distilled, "crowded": crowded,
    }  # fmt: skip
    found = {}
    for name, make in PAGES.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(make(given), encoding="utf-8")
    return found


@pytest.fixture(params=list(PAGES))
def file(request: pytest.FixtureRequest, files: dict[str, Path]) -> Path:
    return files[request.param]


def shown(browser: Any, file: Path, width: int = 1000, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(file.as_uri())
    return page


# ---- parsed -------------------------------------------------------------------------------------


def test_the_source_holds_no_script_and_no_address(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [], "every tag is closed"
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for value in (attributes[name] or "" for name in LOADING & attributes.keys()):
            assert value.startswith("data:image/png;base64,"), tag
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(text) < 1_000_000


def test_pictures_headings_and_tables_are_named(file: Path) -> None:
    page = Page(file.read_text(encoding="utf-8"))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(attributes.get("alt") for attributes in pictures)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tables = "".join(f"<{tag}>" for tag, _ in page.tags).split("<table>")[1:]
    assert tables and all("<th>" in table for table in tables)


def test_clean_images_can_be_left_out(purified: Purified) -> None:
    without = purified.to_html(examples=False)
    assert "Before and after on a few images" in purified.to_html()
    assert "Before and after on a few images" not in without
    assert "The triggers alone" in without
    count = [page.count("<img") for page in (purified.to_html(), without)]
    assert count[0] - count[1] == 3 * 4
    found = diagnosis(True)
    assert "a clean image" in scan_to_html(found)
    assert "a clean image" not in scan_to_html(found, examples=False)
    assert scan_to_html(found, examples=False).count('alt="the recovered') == 2


# ---- in a browser -------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_runs_and_nothing_is_fetched(browser: Any, file: Path) -> None:
    page = browser.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert complaints == [], "of the content security policy, for example"
    assert page.evaluate("document.scripts.length") == 0
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_checker_of_accessibility_finds_nothing_serious(
    browser: Any, file: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = shown(browser, file, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.run(page, options={"resultTypes": ["violations", "passes"]}).response
    serious = {
        rule["id"]: [node["html"][:200] for node in rule["nodes"]]
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    }
    assert serious == {}
    looked_at = {rule["id"]: len(rule["nodes"]) for rule in found["passes"]}
    assert looked_at["color-contrast"] > 20
    page.close()


@pytest.mark.slow
def test_dark_pages_are_dark(browser: Any, file: Path) -> None:
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).map(Number)"
    for scheme, dark in (("light", False), ("dark", True)):
        page = shown(browser, file, scheme=scheme)
        ground, text = (
            sum(page.evaluate(colour.format(name))[:3]) for name in ("backgroundColor", "color")
        )
        assert (ground < text) is dark
        page.close()


@pytest.mark.slow
def test_a_phone_scrolls_down_alone(browser: Any, file: Path) -> None:
    page = shown(browser, file, PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert too_wide(page) == [], "outside what scrolls itself"
    page.close()


def too_wide(page: Any) -> list[str]:
    """Elements that reach beyond the right edge, and do not stand in a box that scrolls itself."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll('body *')]
            .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .filter(e => {
                const box = e.closest('.scroll');
                return !box || getComputedStyle(box).overflowX == 'visible';
            })
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    return found


@pytest.mark.slow
def test_on_paper_nothing_is_cut_or_folded(browser: Any, file: Path) -> None:
    page = shown(browser, file, A4)
    page.emulate_media(media="print")
    assert too_wide(page) == []
    hidden = """[...document.querySelectorAll('details td, details th, img')]
        .filter(e => !e.checkVisibility({contentVisibilityAuto: true}) || !e.offsetHeight)
        .map(e => e.outerHTML.slice(0, 200))"""
    assert page.evaluate(hidden) == []
    paper = page.pdf(format="A4", margin=dict.fromkeys(("left", "right", "top", "bottom"), "1cm"))
    assert paper.startswith(b"%PDF")
    assert len(paper) > 20_000
    page.close()


@pytest.mark.slow
def test_small_pictures_are_shown_large(browser: Any, files: dict[str, Path]) -> None:
    for name in ("suspect labels", "scan, evidence"):
        page = shown(browser, files[name])
        sizes = page.evaluate(
            """[...document.querySelectorAll('.shelf img')]
                .map(i => [i.naturalWidth, i.width, getComputedStyle(i).imageRendering])"""
        )
        assert len(sizes) >= 3
        assert {tuple(size) for size in sizes} == {(32, 128, "pixelated")}
        page.close()
