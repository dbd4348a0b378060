"""A headless Chromium, for tests of pages as a reader sees them."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

PHONE, DESKTOP = 390, 1280  # pixels
SMALLEST_TEXT = 12  # pixels, of a table
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of Playwright; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser of the names {', '.join(_NAMES)}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that was opened.

    Args:
        page: of Playwright.
        faults: what the console said, errors of scripts, and requests that failed.
        requests: addresses that were asked for, without `data:`.
    """

    def __init__(self, page: Any):
        self.page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self.faults.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url[:200]}"))
        page.on("request", lambda request: request.url.startswith("data:") or self.requests.append(request.url))

    def origins(self) -> set[str]:
        """Schemes and hosts that were asked."""
        return {"{0.scheme}://{0.netloc}".format(urlsplit(url)) for url in self.requests}

    def check_width(self) -> None:
        """The page is as wide as the screen, and what is wider scrolls by itself."""
        root, screen = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert root <= screen
        wider = """all => all.filter(each => each.getBoundingClientRect().right > window.innerWidth + 0.5
            && !each.closest(".wide")).map(each => each.outerHTML.slice(0, 200))"""
        assert self.page.eval_on_selector_all("body *", wider) == []

    def check_pictures(self) -> int:
        """Every picture was drawn, with a size; returns how many there are."""
        sizes = self.page.eval_on_selector_all(
            "img", "all => all.map(each => [each.complete, each.naturalWidth, each.clientWidth, each.clientHeight])"
        )
        assert all(complete and min(numbers) > 50 for complete, *numbers in sizes)
        return len(sizes)

    def check_text(self, selector: str) -> int:
        """What is chosen can be read: letters are large enough, and differ from what is behind them."""
        found = self.page.eval_on_selector_all(selector, _LOOKS)
        assert all(size >= SMALLEST_TEXT for size, _, _ in found)
        assert all(_contrast(front, behind) >= 4.5 for _, front, behind in found)  # WCAG 2.2, 1.4.3
        return len(found)


_LOOKS = """all => all.map(each => {
    const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
    let behind = each;
    while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const style = getComputedStyle(each);
    const paper = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    return [parseFloat(style.fontSize), numbers(style.color).slice(0, 3), numbers(paper).slice(0, 3)];
})"""


def _contrast(front: list[float], behind: list[float]) -> float:
    """Contrast of two colours, 1 to 21, as WCAG 2.2 defines it."""
    low, high = sorted((_luminance(front), _luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: list[float]) -> float:
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@contextlib.contextmanager
def visit(browser: Any, address: str, width: int, offline: bool = False) -> Iterator[Visit]:
    """A page, opened in a window of its own and closed at the end."""
    window = browser.new_context(viewport={"width": width, "height": 844}, offline=offline)
    try:
        found = Visit(window.new_page())
        found.page.goto(address)
        found.page.wait_for_load_state("networkidle")
        yield found
    finally:
        window.close()
