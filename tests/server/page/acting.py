"""What a person does on the page."""

PHONE = {"viewport": {"width": 390, "height": 844}}


def send(page, message):
    page.fill("#prompt", message)
    page.press("#prompt", "Enter")


def ask(page, message):
    """Sends a message and waits for the end of its answer."""
    ended = page.locator(".assistant:not(.running)").count()
    send(page, message)
    page.locator(".assistant:not(.running)").nth(ended).wait_for()


def press(page, name, within="body"):
    """Presses the last button of that name."""
    page.locator(within).get_by_role("button", name=name, exact=True).last.click()


def set_field(page, name, value):
    """Sets a setting, unfolding the settings where they are folded away."""
    if not page.locator("#settings").evaluate("part => part.open"):
        page.click("#settings summary")
    if page.locator(name).evaluate("field => field.type") == "checkbox":
        page.set_checked(name, value)
    else:
        page.fill(name, value)


def answers(page):
    return page.locator(".assistant > .text").all_inner_texts()
