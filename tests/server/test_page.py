"""The built-in page in a real browser: a message goes out, the answer streams in, kappa moves."""

import shutil

import pytest

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Notes the length of the answer and the kappa shown at every change of the page.
WATCH = """() => {
  window.seen = [];
  const note = () => {
    const answers = [...document.querySelectorAll('.assistant')].map((answer) => answer.textContent.length);
    window.seen.push([answers.at(-1) ?? 0, document.getElementById('kappa').textContent]);
  };
  new MutationObserver(note).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


@pytest.fixture
def page(served):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test-serve")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        trouble = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith(served.url) or trouble.append(request.url))
        page.goto(served.url)
        yield page
        browser.close()
    assert not trouble, "scripts run without an error, and nothing comes from elsewhere"


def ask(page, message):
    answers = page.locator(".took").count()
    page.fill("#prompt", message)
    page.press("#prompt", "Enter")
    page.locator(".took").nth(answers).wait_for()


def test_a_chat(page, served):
    page.fill("#temperature", "0")
    page.fill("#most", "60")
    page.evaluate(WATCH)
    assert page.inner_text("#kappa") == "–"
    page.select_option("#speculative", "3")
    ask(page, "w17")  # whose greedy answer is long, and has accepted drafts even with a random head
    seen = page.evaluate("window.seen")
    lengths = [length for length, _ in seen]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5, "the answer came in parts"
    assert len({kappa for _, kappa in seen}) > 3 and float(page.inner_text("#kappa")) > 1
    drafted = page.locator(".assistant .drafted").count()
    assert drafted > 0 and "60 tokens in" in page.inner_text(".took")
    # What was said before is part of the next question; without drafts kappa is 1.
    page.select_option("#speculative", "off")
    ask(page, "w7")
    assert page.inner_text("#kappa") == "1.00" and page.locator(".message").count() == 4
    assert page.locator(".assistant .drafted").count() == drafted


def test_errors_are_shown(page, served):
    page.fill("#most", "60")
    page.fill("#prompt", "w5 " * 200)
    page.click("#send")
    page.locator(".error").wait_for()
    assert "maximum context length is 192 tokens" in page.inner_text(".error")
    ask(page, "w5")  # the question that failed is not sent again
