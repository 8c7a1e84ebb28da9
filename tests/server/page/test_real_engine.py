"""The page before a real engine with a tiny model: an answer streams in, and kappa moves."""

import pytest

from tests.server.loopback import running
from tests.server.page.acting import ask, send, set_field

pytestmark = pytest.mark.slow

# Notes the length of the answer and the kappa shown at every change of the page.
WATCH = """() => {
  window.seen = [];
  const note = () => {
    const answers = [...document.querySelectorAll('.assistant > .text')].map((answer) => answer.textContent.length);
    window.seen.push([answers.at(-1) ?? 0, document.getElementById('kappa').textContent]);
  };
  new MutationObserver(note).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def served(engine):
    with running(engine) as served:
        yield served


def test_a_chat(page):
    set_field(page, "#temperature", "0")
    set_field(page, "#most", "60")
    page.evaluate(WATCH)
    assert page.inner_text("#kappa") == "–"
    page.select_option("#speculative", "3")
    ask(page, "w17")  # whose greedy answer is long, and has accepted drafts even with a random head
    seen = page.evaluate("window.seen")
    lengths = [length for length, _ in seen]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2, "the answer came in parts"
    assert len({kappa for _, kappa in seen}) > 3 and float(page.inner_text("#kappa")) > 1
    drafted = page.locator(".assistant .drafted").count()
    assert drafted > 0 and "60 tokens in" in page.inner_text(".took") and "have" not in page.inner_text("#problem")
    # What was said before is part of the next question; without drafts kappa is 1.
    page.select_option("#speculative", "off")
    ask(page, "w7")
    assert page.inner_text("#kappa") == "1.00" and page.locator(".turn").count() == 4
    assert page.locator(".assistant .drafted").count() == drafted


def test_what_was_cut_goes_on(page):
    for name, value in {"#temperature": "0", "#most": "20"}.items():
        set_field(page, name, value)
    ask(page, "w17")
    part = page.inner_text(".assistant > .text")
    assert "Cut off" in page.inner_text(".end") and "20 tokens in" in page.inner_text(".took")
    page.get_by_role("button", name="Continue").click()
    page.locator(".took", has_not_text="20 tokens in").wait_for()
    whole = page.inner_text(".assistant > .text")
    assert whole.startswith(part + " w") and all(word.startswith("w") for word in whole.split())


def test_a_question_that_is_too_long_comes_back(page):
    set_field(page, "#most", "60")
    send(page, "w5 " * 200)
    page.locator("#problem").wait_for()
    assert "maximum context length is 192 tokens" in page.inner_text("#problem")
    assert page.input_value("#prompt") == "w5 " * 200
    ask(page, "w5")  # the question that failed is not sent again
    assert page.locator(".turn").count() == 2
