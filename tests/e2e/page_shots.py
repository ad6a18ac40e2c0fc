"""Draws the pictures of the page in docs/images, with an answer written here: `python -m tests.e2e.page_shots DIR`."""

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.e2e.scripted_page import Reply, receipt, scripted_server

CHROMIUM = "/usr/bin/chromium"
PICTURE = Path(__file__).parents[2] / "examples/nano/pictures/shapes.png"
QUESTION = "Which shapes are there, and where?"
ANSWER = (
    "There are three shapes: a <ref>red star</ref><box>[[66, 92, 284, 330]]</box> on the left, a "
    "<ref>blue disc</ref><box>[[716, 90, 932, 374]]</box> on the right, and a "
    "<ref>green heart</ref><box>[[384, 636, 616, 920]]</box> below them."
)
VIEWS: dict[str, dict[str, Any]] = {
    "page": {"viewport": {"width": 1000, "height": 720}},
    "page-dark": {"viewport": {"width": 1000, "height": 720}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
}


def main(directory: Path) -> None:
    with scripted_server() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        server.model = "example-model"
        for name, view in VIEWS.items():
            server.replies.append(Reply((ANSWER,), (receipt(3, 2),)))
            page = browser.new_context(**view).new_page()
            page.goto(server.url)
            page.set_input_files("#files", PICTURE)
            page.fill("#question", QUESTION)
            page.press("#question", "Enter")
            page.wait_for_selector(".account")
            page.screenshot(path=directory / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
