"""How an answer is shown: Markdown, code, what was drafted; and that nothing a model says can do harm."""

import pytest

from tests.server.page.acting import ask, set_field

pytestmark = pytest.mark.slow

ANSWER = """\
# Title

Some **bold**, *slanted*, ~~gone~~ and `code &amp; more` &amp; [a link](https://example.com/a), a\\*b.

1. one
2. two
   - inner

```python
def f(x):
    return "<b>"
```

| a | b |
|:-:|--:|
| 1 | 2 |

> said

- [x] done

---
the end"""

HOSTILE = [
    "<script>window.harm = 1</script>",
    "<img src=x onerror='window.harm = 1'>",
    "<svg/onload=window.harm=1>",
    "<iframe srcdoc='<script>parent.harm = 1</script>'></iframe>",
    "<style>body { display: none }</style>",
    "<form action='https://example.com'><input name=q></form>",
    "[click](javascript:window.harm=1)",
    "[click](JaVaScRiPt&colon;window.harm=1)",
    "[click]( java\tscript:window.harm=1)",
    "[click](data:text/html,<script>window.harm=1</script>)",
    "[click](vbscript:x) [click](file:///etc/passwd) [click](/v1/models) [click](//example.com)",
    "[click][r]\n\n[r]: javascript:window.harm=1",
    "<javascript:window.harm=1>",
    "![secret](https://example.com/leak?x=secret)",
    '![x](x"onerror="window.harm=1)',
    '[x](https://example.com/"onmouseover="window.harm=1)',
    '```html" onload="window.harm=1\n<script>window.harm = 1</script>\n```',
    "`<script>window.harm = 1</script>`",
    "| <script>window.harm = 1</script> |\n|--|\n| <img src=x onerror=window.harm=1> |",
    "[" * 3000 + "x",
    ">" * 3000 + " x",
    "*a_" * 1000,
    "|" + "**_" * 600 + "x" + "_**" * 600 + "|\n|-|\n",
    "- " * 600 + "x",
]

HARMFUL = "script, img, svg, iframe, style, form, object, embed, link, base, meta"
ATTRIBUTES = """root => [...root.querySelectorAll('*')].flatMap(
  (node) => [...node.attributes].map(({ name, value }) => name + '=' + value))"""


@pytest.fixture
def engine(served):
    return served.engine


def test_markdown(page, engine):
    engine.text = ANSWER
    ask(page, "show")
    text = page.locator(".assistant > .text")
    assert text.locator("h2").inner_text() == "Title"
    assert text.locator("strong").inner_text() == "bold" and text.locator("em").inner_text() == "slanted"
    assert text.locator("del").inner_text() == "gone"
    assert text.locator("p code").inner_text() == "code &amp; more" and "more & a link, a*b." in text.inner_text()
    assert text.locator("ol > li").count() == 2 and text.locator("ol ul > li").inner_text() == "inner"
    assert text.locator("th").all_inner_texts() == ["a", "b"] and text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("td.right").evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    assert text.locator("blockquote").inner_text() == "said" and text.locator("hr").count() == 1
    assert text.locator(".task input").is_checked() and text.locator(".task input").is_disabled()
    assert text.locator("pre").inner_text() == 'def f(x):\n    return "<b>"'
    assert text.locator(".bar span").inner_text() == "python"
    link = text.locator("a")
    assert link.get_attribute("href") == "https://example.com/a" and "noopener" in link.get_attribute("rel")


def test_copying(open_page, engine):
    engine.text = ANSWER
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "show\nthis")
    copied = "navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy code").click()
    page.locator("button", has_text="Copied").wait_for()
    assert page.evaluate(copied) == 'def f(x):\n    return "<b>"'
    page.get_by_role("button", name="Copy answer").click()
    page.get_by_role("button", name="Copy answer", exact=True).filter(has_text="Copied").wait_for()
    assert page.evaluate(copied) == ANSWER, "as it was written"
    page.get_by_role("button", name="Copy message").click()
    page.get_by_role("button", name="Copy message", exact=True).filter(has_text="Copied").wait_for()
    assert page.evaluate(copied) == "show\nthis"


def test_copying_where_there_is_no_clipboard(open_page, engine):
    """As on plain HTTP from another machine."""
    engine.text = "text"
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.clipboard.writeText = undefined")
    ask(page, "show")
    page.get_by_role("button", name="Copy answer").click()
    page.locator("button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "text"


def test_the_colours_of_drafts_stand_on_what_was_drafted_and_can_be_turned_off(page, engine):
    # Each letter is a token and stands there once; of three tokens the first is the target's own.
    engine.text = "## A *bcd* E\n\n- fgh\n  1. [ijk](http://x)\n\n```\nlmn\n  opq\n```\n\n|r|s|\n|-|-|\n|t**u**|`vw`|"
    ask(page, "show")
    drafted = "".join(page.locator(".assistant .drafted").all_text_contents())
    letters = [letter for letter in "AbcdEfghijklmnopqrstuvw"]
    places = {letter: engine.text.index(letter) for letter in letters}
    assert [x for x in drafted if x.strip()] == [x for x in letters if places[x] % 3 > 0]
    mark = page.locator(".assistant .drafted").first
    background = "mark => getComputedStyle(mark).backgroundColor"
    assert mark.evaluate(background) != "rgba(0, 0, 0, 0)"
    set_field(page, "#colours", False)
    assert mark.evaluate(background) == "rgba(0, 0, 0, 0)"
    page.reload()
    assert not page.is_checked("#colours") and page.locator(".drafted").first.is_visible(), "the choice is kept"
    assert mark.evaluate(background) == "rgba(0, 0, 0, 0)"


def test_what_a_model_says_can_do_no_harm(page, engine):
    set_field(page, "#most", "3500")
    for hostile in HOSTILE:
        page.get_by_role("button", name="New chat").click()
        engine.text = hostile.replace("\t", " ")
        ask(page, "<img src=x onerror='window.harm = 1'>")
        answer = page.locator(".assistant > .text")
        assert page.evaluate("window.harm") is None, hostile
        assert answer.locator(HARMFUL).count() == 0, hostile
        attributes = answer.evaluate(ATTRIBUTES)
        assert not [a for a in attributes if a.startswith("on") or a.startswith(("src=", "style=", "id="))], hostile
        links = [a.removeprefix("href=") for a in attributes if a.startswith("href=")]
        assert all(link.startswith(("http://", "https://", "mailto:")) for link in links), hostile
    # Its title is in the list of chats, and in a dialog's words.
    assert page.locator("#chats img").count() == 0
    page.reload()
    assert page.evaluate("window.harm") is None and page.locator("#log img").count() == 0


def test_a_script_that_comes_through_all_the_same_does_not_run(browser, served):
    """The policy alone holds it back."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(served.url)
    page.evaluate(
        """() => {
          const script = document.createElement('script');
          try { script.textContent = 'window.harm = 1'; document.body.append(script); } catch { }
          const image = document.createElement('img');
          try { image.setAttribute('onerror', 'window.harm = 2'); } catch { }
          image.src = 'x';
          document.body.append(image);
          try { document.body.innerHTML = '<b>parsed</b>'; } catch { window.refused = true; }
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("[window.harm, window.refused]") == [None, True]
    context.close()


def test_thoughts_are_folded_beside_the_answer(page, engine):
    engine.text = "<think>\nhmm, let me see\n</think>\n\nabcdef"
    ask(page, "think")
    assert page.locator(".assistant > .text").inner_text() == "abcdef"
    assert "hmm" in page.locator(".thought").text_content() and page.locator(".thought").is_hidden()
    page.get_by_text("Thoughts").click()
    assert page.locator(".thought").is_visible()
    begin = engine.text.index("abcdef")
    drafted = "".join(page.locator(".assistant > .text .drafted").all_text_contents())
    assert drafted == "".join(x for i, x in enumerate("abcdef", begin) if i % 3 > 0)
