"""The picture of a report in README: a real purification of a network of the zoo, in a browser.

    python -m benchmarks.networks.zoo --models DIR
    python -m benchmarks.report_screenshot --young DIR --page report.html

The page is made first, which takes minutes, and taken from the file if it is there. Needs chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import torch
from PIL import Image

from benchmarks.efficacy.plain_call import young
from nnprune_backdoor import purify

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
NETWORK = "resnet-badnets-short-0"
WIDTH, HEIGHT = 900, 640  # of each half
SECTIONS = ("", "Before and after on a few images")  # the upper half begins with the page itself


def page_of(folder: Path, network: str) -> str:
    torch.set_num_threads(1)
    _, case = next(young(folder, 500, 0, [network]))
    return purify(case.model, case.clean, "rnp").to_html()


def halves(page: Path) -> list[Image.Image]:
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        shown = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        shown.goto(page.absolute().as_uri())
        for title in SECTIONS:
            if title:
                section = shown.locator("section", has=shown.get_by_role("heading", name=title))
                section.evaluate("section => window.scrollTo(0, section.offsetTop - 8)")
            found.append(Image.open(io.BytesIO(shown.screenshot())))
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--young", type=Path, required=True, help="folder of the zoo's weights")
    parser.add_argument("--page", type=Path, required=True, help="the page, or where it is to go")
    parser.add_argument("--network", default=NETWORK)
    options = parser.parse_args()
    if not options.page.exists():
        options.page.write_text(page_of(options.young, options.network), encoding="utf-8")
    whole = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    for number, half in enumerate(halves(options.page)):
        whole.paste(half.convert("RGB"), (number * WIDTH, 0))
    PICTURE.parent.mkdir(exist_ok=True)
    whole.quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
