"""The chat page as a person uses it, and a record of how a reply grows on it."""

import json
import time

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

    def __init__(self, browser, url, page_bytes=None, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT)
        self.context.add_init_script(WATCH)
        self.page = self.context.new_page()
        self.sent, self.complaints = [], []
        self.page.on("request", self.note)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("console", self.console)
        if page_bytes is not None:
            kind = "text/html; charset=utf-8"
            self.context.route(url, lambda route: route.fulfill(body=page_bytes, content_type=kind))
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
