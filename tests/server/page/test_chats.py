"""What becomes of a chat: errors, a full context, answers that end and go on, other words, other chats."""

import contextlib
import json

import pytest

from tests.server.loopback import running
from tests.server.page.acting import answers, ask, press, send, set_field
from tests.server.page.paced import PacedEngine

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def engine(served):
    served.engine.text = "The answer."
    served.engine.requests.clear()
    return served.engine


def prompts(engine):
    """What the model has read, each time."""
    return [engine.lm.tokenizer.decode(request.prompt_ids) for request in engine.requests]


@contextlib.contextmanager
def half_said(page, engine):
    """An answer of which the first nine letters have come, and no more do until this ends."""
    engine.text = "abcdefghi" * 10
    with engine.paced() as may_go_on:
        send(page, "letters")
        may_go_on.release(3)
        page.locator(".assistant > .text", has_text="abcdefghi").wait_for()
        yield


def broken_off(chunks):
    """An answer that ends where it should not."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def test_an_error_stands_above_the_message_which_is_kept(page, engine):
    ask(page, "first")
    send(page, "x" * 5000)
    page.locator("#problem").wait_for()
    assert "maximum context length is 4000 tokens" in page.inner_text("#problem")
    assert page.input_value("#prompt") == "x" * 5000 and page.locator(".turn").count() == 2
    message, error = page.locator("#prompt").bounding_box(), page.locator("#problem").bounding_box()
    assert 0 < message["y"] - (error["y"] + error["height"]) < 20, "it is where one looks"
    assert page.get_attribute("#problem", "role") == "alert"
    ask(page, "second")
    assert page.locator("#problem").is_hidden()
    assert prompts(engine)[-1] == "user: first\nassistant: The answer.\nuser: second\nassistant: "


def test_a_server_that_is_away_costs_no_prompt(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "hello")
    page.locator("#problem", has_text="cannot be reached").wait_for()
    assert page.input_value("#prompt") == "hello"
    page.unroute("**/v1/chat/completions")
    page.press("#prompt", "Enter")
    page.locator(".assistant:not(.running)").wait_for()
    assert answers(page) == ["The answer."]


@pytest.mark.parametrize("last", [[], [{"error": {"message": "a step failed"}}]], ids=["lost", "told"])
def test_an_answer_that_breaks_off_stays_and_can_go_on(page, engine, last):
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "steps": 1, "kappa": 3}
    usage |= {"drafted_tokens": 3, "accepted_tokens": 2, "accepted_per_position": [1, 1, 0]}
    part = {"choices": [{"delta": {"content": "Half "}, "finish_reason": None}], "usage": usage}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=broken_off([part, *last])))
    send(page, "hello")
    page.locator(".end.error").wait_for()
    assert (last[0]["error"]["message"] if last else "connection was lost") in page.inner_text(".end")
    assert answers(page) == ["Half"] and page.locator("#problem").is_hidden()
    page.unroute("**/v1/chat/completions")
    press(page, "Continue")
    page.locator(".end", has_text="Finished").wait_for()
    assert answers(page) == ["Half The answer."] and prompts(engine) == ["user: hello\nassistant: Half "]


def test_a_missing_key_is_asked_for(open_page):
    with running(PacedEngine(), api_keys=["secret"]) as served:
        page = open_page(served.url, viewport={"width": 390, "height": 844})
        page.locator("#problem", has_text="give a key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key", "the settings open for it"
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.locator("#model", has_text="scripted").wait_for()
        assert page.locator("#problem").is_hidden()
        served.engine.text = "Let in."
        ask(page, "hello")
        assert answers(page) == ["Let in."]
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(page, engine):
    engine.text = "y" * 1500
    set_field(page, "#most", "1600")
    ask(page, "one")
    ask(page, "two")
    assert page.locator(".cut").count() == 0 and "turns left out" not in page.inner_text("#context")
    ask(page, "three")
    assert page.locator(".cut").count() == 1 and "2 turns left out" in page.inner_text("#context")
    assert "4000 tokens" in page.inner_text(".cut")
    dropped = page.locator(".dropped").all_inner_texts()
    assert len(dropped) == 2 and dropped[0].startswith("one"), "they are still there to be read"
    below = page.locator(".cut + .turn").inner_text()
    assert below.startswith("two"), "the line stands where the model begins to read"
    assert "one" not in prompts(engine)[-1] and "two" in prompts(engine)[-1]
    used, _, rest = page.inner_text("#context").partition(" of ")
    assert rest.startswith("4000") and int(used) == len(prompts(engine)[-1]) + 1501  # and the end token
    ask(page, "four")
    assert "4 turns left out" in page.inner_text("#context")
    page.reload()
    page.locator(".cut").wait_for()
    assert page.locator(".dropped").count() == 4, "a chat that was kept knows what is left out"


def test_an_answer_that_fills_the_context_says_so(page, engine):
    engine.text = "y" * 5000
    set_field(page, "#most", "6000")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps(route.request.post_data_json | {"max_tokens": 4000 - len("user: one\nassistant: ")})
        ),
    )  # the scripted engine knows no context, as real ones do
    ask(page, "one")
    assert page.inner_text(".end") == "Cut off: the context is full."
    assert page.inner_text("#context") == "4000 of 4000"


def test_why_an_answer_ended_and_going_on(page, engine):
    engine.text = "abcdefghijklmnopqrstuvwxyz"
    set_field(page, "#most", "10")
    ask(page, "letters")
    assert page.inner_text(".end").startswith("Cut off: it has as many tokens as the settings allow")
    assert answers(page) == ["abcdefghij"]
    engine.text = "klm"
    press(page, "Continue")
    page.locator(".end", has_text="Finished").wait_for()
    assert answers(page) == ["abcdefghijklm"] and engine.requests[-1].raw
    assert prompts(engine)[-1] == "user: letters\nassistant: abcdefghij"
    assert "14 tokens in 6 passes" in page.inner_text(".took"), "of both parts, the end token among them"
    assert page.get_by_role("button", name="Continue").count() == 0
    assert page.locator(".drafted:visible", has_text="lm").count() == 1


def test_stopping(page, engine):
    with half_said(page, engine):
        press(page, "Stop")
        page.locator(".end", has_text="Stopped").wait_for()
    assert answers(page) == ["abcdefghi"]
    assert page.get_by_role("button", name="Continue").is_visible()
    with engine.paced():
        send(page, "too soon")
        press(page, "Stop")
        page.locator("#send").wait_for()
    assert page.input_value("#prompt") == "too soon" and page.locator("#problem").is_hidden()


def test_regenerate_and_the_system_prompt(page, engine):
    set_field(page, "#system", "Be brief.")
    ask(page, "hello")
    engine.text = "Another."
    press(page, "Regenerate")
    page.locator(".assistant > .text", has_text="Another.").wait_for()
    assert prompts(engine) == ["system: Be brief.\nuser: hello\nassistant: "] * 2
    assert answers(page) == ["Another."]
    page.route("**/v1/chat/completions", lambda route: route.abort())
    press(page, "Regenerate")
    page.locator("#problem").wait_for()
    assert answers(page) == ["Another."], "an answer goes only when another comes"


def test_edit(page, engine):
    ask(page, "first")
    ask(page, "second")
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    assert page.input_value("#prompt") == "first" and page.locator(".edited").count() == 4
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.press("#prompt", "Escape")
    assert page.locator(".edited").count() == 0 and page.input_value("#prompt") == ""
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.fill("#prompt", "other")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.press("#prompt", "Enter")
    page.locator("#problem").wait_for()
    assert page.locator(".edited").count() == 4 and page.input_value("#prompt") == "other", "nothing was lost"
    page.unroute("**/v1/chat/completions")
    page.press("#prompt", "Enter")
    page.locator(".user > .text", has_text="other").wait_for()
    page.locator(".assistant:not(.running)").wait_for()
    assert page.locator(".turn").count() == 2 and prompts(engine)[-1] == "user: other\nassistant: "


def test_chats_are_kept_in_the_browser(page, engine):
    set_field(page, "#system", "Be brief.")
    ask(page, "about cats")
    press(page, "New chat")
    assert page.locator(".turn").count() == 0
    set_field(page, "#system", "Be long.")
    ask(page, "about dogs")
    page.reload()
    page.locator(".user", has_text="about dogs").wait_for()
    assert page.locator("#chats .name").all_inner_texts() == ["about dogs", "about cats"]
    page.locator("#chats .name", has_text="cats").click()
    page.locator(".user", has_text="about cats").wait_for()
    assert answers(page) == ["The answer."] and page.locator(".assistant .drafted").count() > 0
    assert page.input_value("#system") == "Be brief.", "each chat has its own"
    ask(page, "and more")
    assert prompts(engine)[-1].startswith("system: Be brief.\nuser: about cats\nassistant: The answer.\nuser: and more")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the chat “about cats”").click()
    assert page.locator("#chats .name").all_inner_texts() == ["about dogs"] and page.locator(".turn").count() == 0
    page.reload()
    page.locator(".user", has_text="about dogs").wait_for()
    assert page.locator("#chats li").count() == 1


def test_a_chat_that_is_deleted_while_it_is_answered_stays_away(page, engine):
    ask(page, "first")
    engine.text = "abcdefghi" * 10
    page.once("dialog", lambda dialog: dialog.accept())
    with engine.paced() as may_go_on:
        send(page, "second")
        may_go_on.release(3)
        page.locator(".assistant > .text", has_text="abcdefghi").wait_for()
        page.get_by_role("button", name="Delete the chat “first”").click()
    page.locator(".hint").wait_for()
    page.reload()
    page.locator(".hint").wait_for()
    assert page.locator("#chats li").count() == 0


def test_leaving_in_the_middle_keeps_what_came(page, engine):
    with half_said(page, engine):
        page.reload()
        page.locator(".end", has_text="Stopped").wait_for()
    assert answers(page) == ["abcdefghi"]


def test_a_browser_without_room_says_so(page):
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    ask(page, "hello")
    page.locator("#problem", has_text="not kept").wait_for()
    assert answers(page) == ["The answer."]


def test_it_works_behind_a_prefix(open_page, served):
    """As a proxy has it that takes the prefix off."""

    def pass_on(route):
        route.fulfill(response=route.fetch(url=route.request.url.replace("/deep/er/", "/")))

    page = open_page()
    page.context.route("**/deep/er/**", pass_on)
    page.goto(f"{served.url}/deep/er/")
    ask(page, "hello")
    assert answers(page) == ["The answer."]
    page.goto(served.url)
    page.locator("#model", has_text="scripted").wait_for()
    assert page.locator(".turn").count() == 0, "another prefix may be another server"
