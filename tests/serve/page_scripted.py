"""Checks of the chat page on replies that no model gives on demand; and pictures of it."""

import time

import mock
from page_driver import Chat, hold, streamed


def scripted(browser, page_bytes, options):
    server = mock.Mock(page_bytes)
    chat = Chat(browser, server.url, **options)
    page = chat.page

    chat.start("endless")
    chat.until("grown.some(g => g[1] > 50)")  # the answer has begun
    hold(not chat.last("details").evaluate("d => d.open"), "the thinking is not folded when the answer begins")
    chat.last("summary").click()
    page.get_by_label("Message", exact=True).fill("a draft")
    page.keyboard.press("Enter")
    chat.until("new Set(grown.map(g => g[1] + g[2])).size > 30")
    grown = streamed(chat, 20)
    hold(any(is_open and thought and not answer for _, answer, thought, is_open, *_ in grown), "thinking was not open")
    hold(grown[-1][5] == 1, f"one paragraph is shown as {grown[-1][5]} while it grows")
    page.get_by_role("button", name="Stop").click()
    said = chat.idle()
    hold(said[-1]["end"] == "stopped" and len(said) == 2, f"a draft was sent, or nothing stopped: {said}")
    hold(chat.last("details").evaluate("d => d.open"), "what the user opened was folded again")
    hold(page.get_by_label("Message", exact=True).input_value() == "a draft", "the draft is gone")
    for _ in range(50):
        if server.hung_up:
            break
        time.sleep(0.1)
    hold(server.hung_up == 1, "the server still streams after Stop")
    hold(chat.ask("more")["content"] == "You said: more", "the turn after a stop")
    sent = server.requests[-1]["messages"][1]
    hold(sent["content"] == said[-1]["content"] and sent.get("reasoning_content") == said[-1]["reasoning"],
         f"what was said before the stop isn't sent: {sent}")
    print("ok    scripted: a slow stream, folding, a draft meanwhile, Stop hangs up and keeps what was said")

    stats = chat.ask("slow")["stats"]  # 144 tokens in 106 pieces, 40 ms apart at least
    hold(stats["time"] > 4.2 and 1 < stats["rate"] < 144 / 4.2, f"figures of a stream: {stats}")
    hold("144 tokens (24 thinking) in " in chat.last(".stats").inner_text(), chat.last(".stats").inner_text())
    print("ok    scripted: figures of a stream")

    chat.start("endless again")
    chat.until("grown.at(-1)[1] > 100")
    page.reload()
    page.get_by_text("Interrupted by a reload.").wait_for()
    kept = chat.last(".answer").inner_text()
    hold(len(kept) >= 100, f"of the interrupted reply is left: {kept!r}")
    hold(chat.ask("on")["end"] == "stop", "the turn after a reload")
    print("ok    scripted: a reply that a reload interrupts is kept as far as it came")

    chat.start("endless, until a key stops it")
    chat.until("grown.at(-1)[2] > 10")
    page.keyboard.press("Escape")
    hold(chat.idle()[-1]["end"] == "stopped", "Escape does not stop")
    chat.start("endless, until there is a new chat")
    chat.until("grown.at(-1)[2] > 10")
    page.get_by_role("button", name="New chat").click()
    time.sleep(0.5)
    hold(chat.messages() == [] and page.locator("article").count() == 0, "a reply goes on in the new chat")
    print("ok    scripted: Escape stops; New chat in the middle of a reply")

    long = chat.ask("too long")
    hold(chat.last(".error").inner_text() == "400: the prompt has 9,000 tokens, the context 4,096", f"error: {long}")
    hold(chat.ask("fine")["end"] == "stop", "the turn after an error")
    hold([m["content"] for m in server.requests[-1]["messages"]] == ["fine"], "the refused question is sent again")
    broken = {"break": "The connection ended before the reply did.", "fail": "the device ran out of memory"}
    for what, error in broken.items():
        reply = chat.ask(what)
        hold(chat.last(".error").inner_text() == error and reply["content"], f"{what}: {reply}")
    print("ok    scripted: errors before and in the middle of a reply; what was said stays")

    chat.ask("markdown")
    shown = page.evaluate("""() => {
      const a = document.querySelector('.reply:last-child .answer');
      const text = s => [...a.querySelectorAll(s)].map(e => e.textContent);
      return {h: text('h3'), strong: text('strong'), em: text('em'), ol: text('ol > li').length, ul: text('ol ul > li'),
        code: text('pre code'), inline: text(':not(pre) > code'), cells: text('td'), quote: text('blockquote'),
        links: [...a.querySelectorAll('a')].map(e => e.href), first: text('p')[0]};
    }""")
    expected = {
        "h": ["A heading"], "strong": ["bold", "item"], "em": ["heading", "slanted"], "ol": 3,
        "ul": ["inner item", "another"], "inline": ["code", "a|b"], "cells": ["1", "a|b"], "quote": ["quoted\ntext"],
        "links": ["https://example.org/a_(b)", "https://example.org/c?d=e"],
    }
    for name, value in expected.items():
        hold(shown[name] == value, f"markdown, {name}: {shown[name]}, expected {value}")
    hold(shown["code"][0] == "def f(x):\n    return x * 2  # inside a list", f"code: {shown['code']}")
    plain = "2 * 3 * 4 = 24, 2*3*4, 2**3**4, a_b_c, \\(a_1 * b\\), *kept*.\nA second"
    hold(plain in shown["first"], f"{shown['first']!r}")
    html = lambda: page.evaluate("document.querySelector('.reply:last-child .answer').innerHTML")
    live = html()
    page.reload()
    page.locator("article").first.wait_for()
    hold(html() == live, "another Markdown after a reload")
    page.get_by_role("button", name="Copy code").last.click()
    hold(page.evaluate("navigator.clipboard.readText()").startswith("fn main()"), "the code isn't copied")
    print("ok    scripted: Markdown, powers and LaTeX left alone, code copied")

    chat.ask("hostile")
    time.sleep(0.3)
    page.reload()
    page.locator("article").first.wait_for()
    time.sleep(0.3)
    hold(page.evaluate("window.pwned") is None, f"a reply ran a script: {page.evaluate('window.pwned')}")
    bad = page.evaluate("""() => [...document.querySelectorAll('main *')].filter(e =>
      /^(img|script|svg|iframe|style|object|embed)$/i.test(e.tagName)
      || [...e.attributes].some(a => /^on/i.test(a.name)) || (e.href && !/^https?:/.test(e.href)))
      .map(e => e.outerHTML)""")
    hold(not bad, f"from a reply: {bad}")
    hold("<script>window.pwned=2</script>" in chat.last(".answer").inner_text(), "hostile text isn't shown as text")
    print("ok    scripted: hostile replies are text")

    start = time.monotonic()
    hold(chat.ask("odd")["end"] == "stop", "odd text")
    hold(time.monotonic() - start < 20, f"odd text took {time.monotonic() - start:.0f} s")
    print(f"ok    scripted: odd text, {len(mock.ODD):,} characters in {time.monotonic() - start:.1f} s")

    page.get_by_role("button", name="New chat").click()
    page.set_viewport_size({"width": 360, "height": 640})
    for text in ("wide", "markdown", "hostile", "too long " + "x" * 300):
        chat.ask(text)
        chat.fits(f"360 px, {text[:10]}")
    page.get_by_role("button", name="Edit the last message").click()
    chat.fits("360 px, editing")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").first.click()
    chat.fits("360 px, settings")
    page.keyboard.press("Escape")
    print("ok    scripted: 360 px wide, nothing scrolls sideways")

    page.set_viewport_size({"width": 1000, "height": 700})
    page.reload()
    page.locator("article").first.wait_for()
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 20)"))
    for wanted in ("new", "open-settings", "Copy", "Try again", "Edit", "input"):
        hold(wanted in reached, f"{wanted}: not reached with Tab; reached {sorted(set(reached))}")
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, dialog')].filter(e =>
      !(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.getAttribute('aria-labelledby')))
      .map(e => e.outerHTML)""")
    hold(not unnamed, f"without a name: {unnamed}")
    page.get_by_label("Message", exact=True).fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    chat.until("[...document.querySelectorAll('.said')].at(-1).textContent === 'one\\ntwo'")
    chat.idle()
    hold(page.locator("#status").text_content() == "You said: one\ntwo", "the reply isn't announced")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    hold(page.locator("article form").count() == 0, "Escape does not end an edit")
    print("ok    scripted: keyboard only, every control has a name, replies are announced")
    chat.close()

    locked = mock.Mock(page_bytes, mock.KEY)
    chat = Chat(browser, locked.url, **options)
    chat.page.get_by_text("This server wants an API key.").wait_for()
    chat.settings(API_key="wrong")
    hold(chat.ask("hello")["error"] == "401: Incorrect API key provided.", "a wrong key")
    chat.settings(API_key=mock.KEY)
    chat.page.get_by_role("button", name="Try again").last.click()
    hold(chat.idle()[-1]["content"] == "You said: hello", "the right key")
    chat.close()
    locked.shutdown()
    locked.server_close()
    server.shutdown()
    server.server_close()
    print("ok    scripted: API key")


def shots(browser, page_bytes, folder):
    """Pictures to look at: wide and narrow, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    server = mock.Mock(page_bytes)
    for scheme in ("light", "dark"):
        for name, width, height in (("wide", 1100, 800), ("phone", 360, 740)):
            chat = Chat(browser, server.url, viewport={"width": width, "height": height}, color_scheme=scheme,
                        device_scale_factor=1 if name == "wide" else 2)
            take = lambda what: chat.page.screenshot(path=folder / f"{what}-{name}-{scheme}.png")
            chat.page.get_by_text("scripted").wait_for()
            take("empty")
            chat.start("Please tell me something, slowly,\nin a message of two lines")
            chat.until("grown.at(-1)?.[2] > 60")
            take("thinking")
            chat.idle()
            chat.ask("And now some markdown")
            take("markdown")
            chat.page.evaluate("document.querySelector('main').scrollTop = 260")
            chat.page.wait_for_timeout(100)
            take("scrolled")
            chat.ask("This is too long")
            take("error")
            chat.page.get_by_role("button", name="Edit the last message").click()
            take("edit")
            chat.page.keyboard.press("Escape")
            chat.page.get_by_role("button", name="Settings").first.click()
            take("settings")
            chat.page.keyboard.press("Escape")
            chat.page.get_by_role("button", name="New chat").click()
            take("new")
            chat.close()
    server.shutdown()
    print(f"pictures in {folder}")
