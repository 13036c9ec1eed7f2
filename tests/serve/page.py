#!/usr/bin/env python3
"""The chat page in headless Chromium.

    m1 serve --model examples/m1-nano --port 8000 &
    pip install -r requirements-page.txt
    python page.py --url http://127.0.0.1:8000/ [--key KEY] [--shots DIR]

With --url it first talks to that server and its model; --key: the server was started with this key, and wrong ones are
tried too. Then, with or without --url, the page (the server's, or the file of this checkout) is shown replies by
mock.py that no model gives on demand. Prints a line per check; exit status 0 only if all of them held.
"""

import argparse
import json
import os
import sys
import time
import traceback
import urllib.request
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

import mock

HERE = Path(__file__).resolve().parent
WAIT = 60_000

# Runs before the page's own script: records how the last reply grows, as [ms, characters of the answer, and of the
# thinking, whether the thinking is open, whether the reply goes on, blocks of the answer].
WATCH = """
window.grown = [];
addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
  const reply = document.querySelector('#log .reply:last-child');
  if (!reply) return;
  const answer = reply.querySelector('.answer'), details = reply.querySelector('details');
  const thought = reply.querySelector('.thought').textContent.length;
  grown.push([performance.now(), answer.textContent.length, thought, details.open, !!document.querySelector('.busy'),
    answer.childElementCount]);
  if (window.stopAt && thought + answer.textContent.length >= window.stopAt) {
    window.stopAt = 0;
    document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
  }
}).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true, attributes: true}));
"""


class Failed(Exception):
    pass


def hold(condition, what):
    if not condition:
        raise Failed(what)


class Chat:
    """The page as a person uses it."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT)
        self.context.add_init_script(WATCH)
        self.page = self.context.new_page()
        self.sent, self.complaints = [], []
        self.page.on("request", self.note)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("console", self.console)
        self.page.goto(url)

    def note(self, request):
        if request.url.endswith("/v1/chat/completions"):
            self.sent.append(json.loads(request.post_data))

    def console(self, message):
        # A refused or failed request is also a message of the browser; whether it was meant is for the checks to say.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def close(self):
        self.context.close()
        hold(not self.complaints, f"the browser complained: {self.complaints[:3]}")

    def until(self, expression, arg=None):
        """Waits for an expression to hold. (Playwright's own wait would need eval, which the page's policy forbids.)"""
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(expression, arg):
            hold(time.monotonic() < end, f"in {WAIT // 1000} s never true: {expression}")
            time.sleep(0.02)

    def start(self, text):
        """Sends with the keyboard; does not wait."""
        self.page.evaluate("grown.length = 0")
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#log.busy", state="attached")

    def idle(self):
        self.until("document.querySelector('article') && !document.querySelector('.busy')")
        return self.messages()

    def ask(self, text):
        """Sends and returns the whole reply as kept. (A quick reply may be over before `busy` could be seen.)"""
        count = self.page.locator("article").count()
        self.page.evaluate("grown.length = 0")
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        self.until("n => document.querySelectorAll('article').length === n", count + 2)
        return self.idle()[-1]

    def messages(self):
        return self.page.evaluate("JSON.parse(localStorage.getItem('m1.chat'))")

    def last(self, part):
        return self.page.locator(f".reply:last-child {part}")

    def settings(self, **values):
        self.page.get_by_role("button", name="Settings").first.click()
        for label, value in values.items():
            field = self.page.get_by_label(label.replace("_", " "), exact=True)
            field.set_checked(value) if isinstance(value, bool) else field.fill(str(value))
        self.page.get_by_role("button", name="Save").click()
        hold(not self.page.locator("#settings").is_visible(), "the settings stay open after Save")

    def reset(self):
        self.page.get_by_role("button", name="Settings").first.click()
        self.page.get_by_role("button", name="Reset").click()
        self.page.get_by_role("button", name="Save").click()

    def fits(self, where):
        wide = self.page.evaluate("""() => [document.documentElement, document.querySelector('main'),
          document.getElementById('settings')].map(e => e.scrollWidth - e.clientWidth)""")
        hold(max(wide) <= 0, f"{where}: wider than the window by {max(wide)} px")


def streamed(chat, at_least):
    """The reply came bit by bit: the text grew at several times, and what was there stayed."""
    grown = chat.page.evaluate("grown")
    sizes = [(time, answer + thought) for time, answer, thought, *_ in grown]
    times = {round(now) for (_, before), (now, size) in zip(sizes, sizes[1:]) if size > before}
    hold(len(times) >= at_least, f"the text grew at {len(times)} times only, expected {at_least}")
    return grown


# ---- With a real server and its model.


def real(browser, url, key, options):
    def served(path, body=None):
        request = urllib.request.Request(url + path, data=body and json.dumps(body).encode(), headers={
            "Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    chat = Chat(browser, url, **options)
    page = chat.page
    model = served("v1/models")["data"][0]["id"]

    if key:
        page.get_by_text("This server wants an API key.").wait_for()
        chat.settings(API_key="not " + key)
        reply = chat.ask("Hello")
        hold(reply["end"] == "failed" and chat.last(".error").inner_text().startswith("401"), f"wrong key: {reply}")
        chat.settings(API_key=key)
        page.get_by_role("button", name="New chat").click()
        print("ok  a wrong API key is said to be wrong, the right one works")

    chat.until("m => document.getElementById('model').textContent === m", model)
    print("ok  the model's name stands above")

    question = "What is 23 + 45?"
    chat.settings(Temperature=0, API_key=key or "")
    first = chat.ask(question)
    grown = streamed(chat, 3)
    hold(first["end"] == "stop" and first["content"].strip(), f"no whole answer: {first}")
    whole = served("v1/chat/completions", {"model": model, "temperature": 0,
                                           "messages": [{"role": "user", "content": question}]})
    said = whole["choices"][0]["message"]
    hold(first["content"] == said["content"], f"streamed {first['content']!r}, at once {said['content']!r}")
    hold(first["reasoning"] == (said.get("reasoning_content") or ""), "the thinking differs from the unstreamed one")
    print(f"ok  streams ({len(grown)} changes), and says what the unstreamed reply says: {said['content'].strip()!r}")
    if first["reasoning"]:
        hold(any(busy and is_open and thought and not answer for _, answer, thought, is_open, busy, _ in grown),
             "the thinking was not open while it went on")
        hold(not chat.last("details").evaluate("d => d.open"), "the thinking is not folded after the answer")
        chat.last("summary").click()
        hold(chat.last(".thought").is_visible(), "the thinking can't be opened again")
        print("ok  thinking is open while it goes on, then folded")

    second = chat.ask("And 7 more?")
    history = chat.sent[-1]["messages"]
    hold([m["role"] for m in history] == ["user", "assistant", "user"], f"history: {history}")
    hold(history[1].get("reasoning_content", "") == first["reasoning"] and history[1]["content"] == first["content"],
         "the history is not what was said")
    hold(second["stats"]["cached"] > 0, f"the second turn found nothing in the cache: {second['stats']}")
    print(f"ok  second turn: {chat.last('.stats').inner_text()}")

    before = page.locator("#log").inner_text()
    page.reload()
    page.locator("article").nth(3).wait_for()
    after = page.locator("#log").inner_text()
    fold = lambda text: text.replace(first["reasoning"].strip(), "").split()
    hold(fold(before) == fold(after), f"after a reload:\n{after}\nbefore:\n{before}")
    print("ok  the conversation is there after a reload")

    page.get_by_role("button", name="Regenerate").last.click()
    again = chat.idle()
    hold(len(again) == 4 and again[-1]["content"] == second["content"], f"greedy, regenerated: {again[-1]}")
    page.get_by_role("button", name="Edit the last message").click()
    page.keyboard.press("Control+a")
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    chat.until("q => document.querySelectorAll('.said')[1]?.textContent === q", question)
    edited = chat.idle()
    hold(len(edited) == 4 and edited[2]["content"] == question and edited[3]["end"] == "stop", f"edited: {edited}")
    print("ok  regenerate and edit")

    for attempt in range(8):  # a small model may be done before anybody can stop it
        page.evaluate("stopAt = 12")
        stopped = chat.ask(question)
        if stopped["end"] == "stopped":
            break
    hold(stopped["end"] == "stopped", f"never stopped: {stopped}")
    text = chat.last("").inner_text()
    time.sleep(1)
    hold(chat.last("").inner_text() == text, "a stopped reply changes")
    hold(len(stopped["reasoning"] + stopped["content"]) >= 12, f"what was said is gone: {stopped}")
    following = chat.ask(question)
    hold(following["end"] == "stop" and following["content"].strip(), f"after a stop: {following}")
    print(f"ok  stopped after {len(stopped['reasoning'] + stopped['content'])} characters; the next turn works")

    page.get_by_role("button", name="New chat").click()
    hold(page.locator("article").count() == 0 and chat.messages() == [], "New chat leaves something")
    page.get_by_role("button", name="Undo").click()
    hold(page.locator("article").count() > 4, "Undo does not bring the conversation back")
    page.get_by_role("button", name="New chat").click()
    print("ok  new chat, and its undo")

    chat.settings(System_prompt="Be brief.", Temperature=0.5, Top_p=0.9, Max_tokens_per_reply=5,
                  Think_before_answering=False)
    page.reload()
    short = chat.ask("Count the letters in banana.")
    body = chat.sent[-1]
    hold(body["messages"][0] == {"role": "system", "content": "Be brief."}, f"sent: {body}")
    hold((body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 5), f"sent: {body}")
    hold(body["thinking"] == {"type": "disabled"} and not short["reasoning"], f"thinking is off: {short}")
    hold(short["stats"]["tokens"] <= 5, f"at most 5 tokens: {short}")
    chat.settings(Max_tokens_per_reply="", Think_before_answering=True, Max_thinking_tokens=4)
    budget = chat.ask(question)
    hold(chat.sent[-1]["thinking"] == {"type": "enabled", "budget_tokens": 4}, f"sent: {chat.sent[-1]}")
    hold(budget["stats"]["thinking"] <= 6, f"thought longer than 4 tokens: {budget}")
    print(f"ok  settings are kept, sent and followed (no thinking; thinking of {budget['stats']['thinking']} tokens)")

    page.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data=json.dumps({**json.loads(route.request.post_data), "temperature": -3})))
    wrong = chat.ask("Hello")
    page.unroute("**/v1/chat/completions")
    hold(wrong["end"] == "failed" and "400" in chat.last(".error").inner_text(), f"a refusal isn't shown: {wrong}")
    line = chat.last(".error").inner_text()
    chat.context.set_offline(True)
    gone = chat.ask("Hello")
    hold("can't be reached" in chat.last(".error").inner_text(), f"a dead server isn't shown: {gone}")
    chat.context.set_offline(False)
    page.get_by_role("button", name="Try again").last.click()
    hold(chat.idle()[-1]["end"] == "stop", "no reply once the server is back")
    print(f"ok  errors are shown: {line}")

    page.set_viewport_size({"width": 360, "height": 640})
    chat.fits("360 px")
    page.get_by_role("button", name="Settings").first.click()
    chat.fits("360 px, settings")
    chat.close()
    print("ok  360 px wide, nothing scrolls sideways; no complaint of the browser")


# ---- With scripted replies.


def scripted(browser, page_bytes, options):
    server = mock.Mock(page_bytes)
    chat = Chat(browser, server.url, **options)
    page = chat.page

    chat.start("slow")
    chat.until("grown.some(g => g[1] > 50)")  # the answer has begun
    hold(not chat.last("details").evaluate("d => d.open"), "the thinking is not folded when the answer begins")
    chat.last("summary").click()
    page.get_by_label("Message", exact=True).fill("a draft")
    page.keyboard.press("Enter")
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
    print("ok  scripted: a slow stream, folding, a draft meanwhile, Stop hangs up and keeps what was said")

    chat.start("slow again")
    chat.until("grown.at(-1)[1] > 100")
    page.reload()
    page.get_by_text("Interrupted by a reload.").wait_for()
    kept = chat.last(".answer").inner_text()
    hold(len(kept) >= 100, f"of the interrupted reply is left: {kept!r}")
    hold(chat.ask("on")["end"] == "stop", "the turn after a reload")
    print("ok  scripted: a reply that a reload interrupts is kept as far as it came")

    chat.start("slow stop by key")
    chat.until("grown.at(-1)[2] > 10")
    page.keyboard.press("Escape")
    hold(chat.idle()[-1]["end"] == "stopped", "Escape does not stop")
    chat.start("slow new chat")
    chat.until("grown.at(-1)[2] > 10")
    page.get_by_role("button", name="New chat").click()
    time.sleep(0.5)
    hold(chat.messages() == [] and page.locator("article").count() == 0, "a reply goes on in the new chat")
    print("ok  scripted: Escape stops; New chat in the middle of a reply")

    long = chat.ask("too long")
    hold(chat.last(".error").inner_text() == "400: the prompt has 9,000 tokens, the context 4,096", f"error: {long}")
    hold(chat.ask("fine")["end"] == "stop", "the turn after an error")
    hold([m["content"] for m in server.requests[-1]["messages"]] == ["fine"], "the refused question is sent again")
    broken = {"break": "The connection ended before the reply did.", "fail": "the device ran out of memory"}
    for what, error in broken.items():
        reply = chat.ask(what)
        hold(chat.last(".error").inner_text() == error and reply["content"], f"{what}: {reply}")
    print("ok  scripted: errors before and in the middle of a reply; what was said stays")

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
    print("ok  scripted: Markdown, powers and LaTeX left alone, code copied")

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
    print("ok  scripted: hostile replies are text")

    start = time.monotonic()
    hold(chat.ask("odd")["end"] == "stop", "odd text")
    hold(time.monotonic() - start < 20, f"odd text took {time.monotonic() - start:.0f} s")
    print(f"ok  scripted: odd text, {len(mock.ODD):,} characters in {time.monotonic() - start:.1f} s")

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
    print("ok  scripted: 360 px wide, nothing scrolls sideways")

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
    print("ok  scripted: keyboard only, every control has a name, replies are announced")
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
    print("ok  scripted: API key")


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running m1 serve, http://127.0.0.1:8000/")
    parser.add_argument("--key", help="the API key that it was started with")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="take pictures instead")
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    args = parser.parse_args()
    url = args.url and args.url.rstrip("/") + "/"
    if url:
        page_bytes = urllib.request.urlopen(url, timeout=60).read()
    else:
        page_bytes = (HERE / "../../infer/src/server/page.html").read_bytes()
    options = {"permissions": ["clipboard-read", "clipboard-write"]}
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=args.chromium, args=flags)
        try:
            if args.shots:
                shots(browser, page_bytes, args.shots)
                return 0
            if url:
                real(browser, url, args.key, options)
            scripted(browser, page_bytes, options)
        except Failed as e:
            print(f"FAILED  {e}", file=sys.stderr)
            return 1
        except Error as e:  # what should be on the page never came
            here = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == __file__]
            print(f"FAILED  {e.message} (lines {here})", file=sys.stderr)
            return 1
        finally:
            browser.close()
    print("the page does what it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
