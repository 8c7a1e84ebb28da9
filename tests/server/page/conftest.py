"""The page in a headless Chromium, before a server whose answers the test writes."""

import shutil

import pytest

from tests.server.loopback import running
from tests.server.page.paced import PacedEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What only asks Google for something, at every start.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
AT_ONCE = "--disable-smooth-scrolling"  # a scroll that a test has seen begin has ended


@pytest.fixture(scope="module")
def served():
    with running(PacedEngine()) as served:
        yield served


@pytest.fixture(scope="module")  # no longer: while Playwright runs, no other test can use asyncio
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test-serve")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", AT_ONCE, *QUIET])
        yield browser
        browser.close()


def is_error(line):
    """Answers that are errors are written down there, too."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


@pytest.fixture
def open_page(browser, served):
    """Opens the page in a browser of its own, as wide and as dark as asked for, and looks that nothing goes wrong."""
    trouble, contexts = [], []

    def open_page(url=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda line: trouble.append(line.text) if is_error(line) else None)
        origin = url or served.url
        page.on("request", lambda request: request.url.startswith(origin) or trouble.append(request.url))
        page.goto(origin)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not trouble, "scripts run without an error, and nothing comes from elsewhere"


@pytest.fixture
def page(open_page):
    return open_page()
