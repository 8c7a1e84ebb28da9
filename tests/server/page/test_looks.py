"""Wide and narrow, dark and light: that it fits, can be read and reached, follows along, and charts what it has."""

import pytest

from tests.server.page.acting import PHONE, ask, send, set_field
from tests.server.page.test_text import ANSWER

pytestmark = pytest.mark.slow

WIDE_LINE = "```\n" + "wide " * 100 + "\n```\n\n" + "|" + "a column|" * 20 + "\n|" + "-|" * 20 + "\n\n" + "x" * 300
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
SIZES = {1280: {}, 390: PHONE}


@pytest.fixture
def engine(served):
    served.engine.text = ANSWER
    return served.engine


@pytest.fixture(
    params=[(width, scheme) for width in SIZES for scheme in ("light", "dark")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def any_page(request, open_page):
    width, scheme = request.param
    return open_page(color_scheme=scheme, **SIZES[width])


def test_it_fits_and_nothing_is_hard_to_read_or_to_reach(any_page, engine):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra test-serve")
    page = any_page
    ask(page, "show")
    engine.text = WIDE_LINE
    set_field(page, "#most", "2000")
    for i in range(4):  # until the context is full
        ask(page, f"wide {i}")
    page.locator(".cut").wait_for()
    send(page, "x" * 5000)  # and an error
    page.locator("#problem").wait_for()
    page.locator(".user").last.get_by_role("button", name="Edit").click()
    for unfolded in (True, False):
        page.locator("#settings").evaluate("(part, open) => (part.open = open)", unfolded)
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(overflow) <= 0, "nothing sticks out at the side"
        assert page.locator("#log").evaluate("log => log.scrollWidth - log.clientWidth") <= 0
        for part in ("#prompt", "#send", "#context", "#problem", *(() if unfolded else ("#kappa", "#speed"))):
            box = page.locator(part).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"], part
        # Contrast, names of fields and buttons, roles, headings.
        found = axe.Axe().run(page, options=AXE).response["violations"]
        assert not [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]


def test_dark_and_light_differ(open_page):
    colours = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        shades = page.locator("body").evaluate("b => [getComputedStyle(b).backgroundColor, getComputedStyle(b).color]")
        colours.append([sum(map(int, shade[4:-1].split(","))) for shade in shades])
    (light, on_light), (dark, on_dark) = colours
    assert light > 600 > 200 > on_light and dark < 200 < 600 < on_dark


def test_settings_are_folded_away_on_phones_alone(open_page, engine):
    wide, phone = open_page(), open_page(**PHONE)
    assert wide.locator("#temperature").is_visible() and phone.locator("#temperature").is_hidden()
    phone.locator("#settings summary").click()
    assert phone.locator("#temperature").is_visible() and phone.locator("#send").is_visible()
    phone.locator("#chats-fold summary").click()
    assert phone.locator("#temperature").is_hidden(), "one at a time"
    ask(phone, "hello")
    phone.locator("#chats .name").click()
    assert phone.locator("#chats .name").is_hidden(), "chosen, the list folds"


def test_one_can_read_back_while_it_streams(page, engine):
    engine.text = "line\n\n" * 150
    set_field(page, "#most", "1000")
    with engine.paced() as may_go_on:
        send(page, "show")
        may_go_on.release(150)
        log, latest = page.locator("#log"), page.locator("#latest")
        rest = "log => log.scrollHeight - log.scrollTop - log.clientHeight"
        page.locator(".assistant p").nth(70).wait_for()
        assert log.evaluate(rest) < 40 and latest.is_hidden(), "it follows"
        log.hover()
        page.mouse.wheel(0, -300)
        latest.wait_for()
        place, length = log.evaluate("log => [log.scrollTop, log.scrollHeight]")
        may_go_on.release(100)
        page.locator(".assistant p").nth(120).wait_for()
        assert log.evaluate("log => log.scrollTop") == place and log.evaluate("log => log.scrollHeight") > length
        latest.click()
        assert log.evaluate(rest) < 40 and latest.is_hidden()
        may_go_on.release(30)
        page.locator(".assistant p").nth(135).wait_for()
        assert log.evaluate(rest) < 40, "it follows again"
    page.locator(".assistant:not(.running)").wait_for()


def test_a_selection_outlives_what_streams_in(page, engine):
    engine.text = "first part\n\n" + "more\n\n" * 40
    with engine.paced() as may_go_on:
        send(page, "show")
        may_go_on.release(10)
        page.locator(".assistant p").nth(1).wait_for()
        page.locator(".assistant p").first.dblclick(position={"x": 5, "y": 10})
        selected = page.evaluate("getSelection().toString()")
        may_go_on.release(60)
        page.locator(".assistant p").nth(20).wait_for()
        assert selected.strip() == "first" and page.evaluate("getSelection().toString()") == selected


def test_kappa_and_tokens_a_second_are_charted_live(page, engine):
    engine.text = "abc" * 200
    lengths = []
    with engine.paced() as may_go_on:
        send(page, "show")
        for _ in range(12):
            may_go_on.release(4)
            page.wait_for_timeout(120)
            path = page.locator("#kappa-chart .line").get_attribute("d") or ""
            lengths.append(path.count("L"))
        assert lengths == sorted(lengths) and len(set(lengths)) > 2, "the line grows while the answer comes"
        drawn = "() => ['kappa', 'speed'].map((of) => document.querySelector(`#${of}-chart .line`).getAttribute('d'))"
        kappa, speed = page.evaluate(drawn)  # both at once: a delta may come between
        assert kappa.count("L") == speed.count("L") >= lengths[-1]
        speed = float(page.inner_text("#speed"))
        assert 3 < speed < 150 and float(page.inner_text("#kappa")) > 2.9 and page.inner_text("#share") == "67 %"
    page.locator(".assistant:not(.running)").wait_for()
    label = page.get_attribute("#kappa-chart", "aria-label")
    assert label == "kappa over time: now 3.0, least 3.0, most 3.0"
    set_field(page, "#most", "30")
    ask(page, "a short one")
    assert page.locator("#kappa-chart .line").get_attribute("d").count("M") == 2, "it goes on beside the one before"


def test_by_keyboard_alone(page, engine):
    page.locator("#prompt:focus").wait_for()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.locator(".assistant:not(.running)").wait_for()
    assert page.locator(".user > .text").inner_text() == "one\ntwo"
    assert page.evaluate("document.activeElement.id") == "prompt", "the next message can be typed"
    page.keyboard.press("Shift+Tab")
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(ring) == "solid", "one sees where one is"
    assert "The answer has" in page.inner_text("#said"), "and hears when it has ended"
    assert page.get_attribute("#log", "aria-busy") == "false"


def test_nothing_moves_for_who_wants_no_motion(open_page, engine):
    names = []
    for motion in ("reduce", "no-preference"):
        page = open_page(reduced_motion=motion)
        with engine.paced():
            send(page, "wait")
            waiting = page.locator(".running .text")
            waiting.wait_for(state="attached")
            names.append(waiting.evaluate("text => getComputedStyle(text, '::before').animationName"))
    assert names == ["none", "waiting"]
