"""Checks of the chat page on a running server, with its model."""

import json
import time
import urllib.request

from page_driver import Chat, hold, streamed


def real(browser, url, key, page_bytes, options):
    def served(path, body=None):
        request = urllib.request.Request(url + path, data=body and json.dumps(body).encode(), headers={
            "Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    chat = Chat(browser, url, page_bytes, **options)
    page = chat.page
    model = served("v1/models")["data"][0]["id"]

    if key:
        page.get_by_text("This server wants an API key.").wait_for()
        chat.settings(API_key="not " + key)
        reply = chat.ask("Hello")
        hold(reply["end"] == "failed" and chat.last(".error").inner_text().startswith("401"), f"wrong key: {reply}")
        chat.settings(API_key=key)
        page.get_by_role("button", name="New chat").click()
        print("ok    a wrong API key is said to be wrong, the right one works")

    chat.until("m => document.getElementById('model').textContent === m", model)
    print("ok    the model's name stands above")

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
    print(f"ok    streams ({len(grown)} changes), and says what the unstreamed reply says: {said['content'].strip()!r}")
    if first["reasoning"]:
        hold(any(busy and is_open and thought and not answer for _, answer, thought, is_open, busy, _ in grown),
             "the thinking was not open while it went on")
        hold(not chat.last("details").evaluate("d => d.open"), "the thinking is not folded after the answer")
        chat.last("summary").click()
        hold(chat.last(".thought").is_visible(), "the thinking can't be opened again")
        print("ok    thinking is open while it goes on, then folded")

    second = chat.ask("And 7 more?")
    history = chat.sent[-1]["messages"]
    hold([m["role"] for m in history] == ["user", "assistant", "user"], f"history: {history}")
    hold(history[1].get("reasoning_content", "") == first["reasoning"] and history[1]["content"] == first["content"],
         "the history is not what was said")
    hold(second["stats"]["cached"] > 0, f"the second turn found nothing in the cache: {second['stats']}")
    print(f"ok    second turn: {chat.last('.stats').inner_text()}")

    before = page.locator("#log").inner_text()
    page.reload()
    page.locator("article").nth(3).wait_for()
    after = page.locator("#log").inner_text()
    fold = lambda text: text.replace(first["reasoning"].strip(), "").split()
    hold(fold(before) == fold(after), f"after a reload:\n{after}\nbefore:\n{before}")
    print("ok    the conversation is there after a reload")

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
    print("ok    regenerate and edit")

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
    print(f"ok    stopped after {len(stopped['reasoning'] + stopped['content'])} characters; the next turn works")

    page.get_by_role("button", name="New chat").click()
    hold(page.locator("article").count() == 0 and chat.messages() == [], "New chat leaves something")
    page.get_by_role("button", name="Undo").click()
    hold(page.locator("article").count() > 4, "Undo does not bring the conversation back")
    page.get_by_role("button", name="New chat").click()
    print("ok    new chat, and its undo")

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
    print(f"ok    settings are kept, sent and followed (no thinking; thinking of {budget['stats']['thinking']} tokens)")

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
    print(f"ok    errors are shown: {line}")

    page.set_viewport_size({"width": 360, "height": 640})
    chat.fits("360 px")
    page.get_by_role("button", name="Settings").first.click()
    chat.fits("360 px, settings")
    chat.close()
    print("ok    360 px wide, nothing scrolls sideways; no complaint of the browser")
