"""A server whose replies are scripted, for what no model says on demand: hostile text, a slow stream, a connection that
breaks in the middle. The page comes from the file or from a real server. It proves the page, not the server."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sesame"

MARKDOWN = """\
## A *heading*

Plain **bold**, *slanted*, `code` and 2 * 3 * 4 = 24, 2*3*4, 2**3**4, a_b_c, \\(a_1 * b\\), \\*kept\\*.
A second line; [a page](https://example.org/a_(b)) and https://example.org/c?d=e.

1. one
2. two
   - inner **item**
   - another

   ```python
   def f(x):
       return x * 2  # inside a list
   ```
3. three

> quoted
> text

| left | right |
|:-----|------:|
| 1    | `a\\|b` |

```rust
fn main() { println!("a line that is long enough to need scrolling on a phone: {}", "x".repeat(100)); }
```

- last
"""

HOSTILE = """\
<img src=x onerror="window.pwned=1"><script>window.pwned=2</script> <svg onload="window.pwned=3">

[a](javascript:window.pwned=4) [b](data:text/html,<script>window.pwned=5</script>) [c](https://example.org/"onclick="x)
![d](https://example.org/track.png) [<img src=x onerror=window.pwned=6>](https://example.org)

```<img src=x onerror=window.pwned=7>
</code></pre><img src=x onerror="window.pwned=8">
```

| <img src=x onerror=window.pwned=9> | b |
|---|---|
| <iframe src="javascript:window.pwned=10"></iframe> | <b>c</b> |

# <style>body{display:none}</style>
"""

# Texts on which a careless pattern needs minutes.
ODD = "\n\n".join(["**a " * 4000, "`" * 5000, "[" * 5000, "\\(" * 4000, "_a " * 4000, "*" * 5000, "> " * 2000 + "x",
                   "- " * 2000 + "x", "https://" * 1500, "~~a " * 3000, "# " + " #" * 3000, "|" + "-|" * 3000])


def script(text):
    """(thinking, answer, pieces, seconds between pieces) for a user's text."""
    if "markdown" in text:
        return "A short thought.\nIn two lines.", MARKDOWN, 40, 0.005
    if "hostile" in text:
        return "<img src=x onerror='window.pwned=11'>", HOSTILE, 30, 0.005
    if "odd" in text:
        return "", ODD, 200, 0.002
    if "wide" in text:
        return "w" * 400, "w" * 400 + "\n\n# " + "v" * 200 + "\n\n`" + "u" * 200 + "`", 10, 0.005
    if "slow" in text:
        return "I think, slowly. " * 8, "This is said word by word. " * 20, 60, 0.04
    return "A thought.", f"You said: {text}", 8, 0.01


class Mock(ThreadingHTTPServer):
    """Serves on a free port of loopback. `requests` holds what was asked, `hung_up` counts readers that went away."""

    daemon_threads = True

    def __init__(self, page, key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.page, self.key, self.requests, self.hung_up = page, key, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a reader that went away between requests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def whole(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, status, value):
        self.whole(status, "application/json", json.dumps(value).encode())

    def refused(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.json(401, {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error"}})
            return True
        return False

    def do_GET(self):
        if self.path == "/":
            self.whole(200, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/v1/models" and not self.refused():
            self.json(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.requests.append(body)
        text = body["messages"][-1]["content"]
        if "too long" in text:
            self.json(400, {"error": {"message": "the prompt has 9,000 tokens,\nthe context 4,096"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.stream(body, text)
        except OSError:
            self.server.hung_up += 1

    def stream(self, body, text):
        thinking, answer, pieces, pause = script(text)
        if body.get("thinking", {}).get("type") == "disabled":
            thinking = ""
        deltas = [{"role": "assistant", "content": ""}]
        for name, whole in (("reasoning_content", thinking), ("content", answer)):
            size = max(1, -(-len(whole) // pieces))
            deltas += [{name: whole[i : i + size]} for i in range(0, len(whole), size)]
        if "break" in text or "fail" in text:
            deltas = deltas[: len(deltas) - 3]
        for delta in deltas:
            self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(pause)
        if "break" in text:
            return
        if "fail" in text:
            self.event({"error": {"message": "the device ran out of memory"}})
            return
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        thought = len(thinking.split())
        self.event({"choices": [], "usage": {
            "prompt_tokens": 1234, "completion_tokens": thought + len(answer.split()),
            "prompt_tokens_details": {"cached_tokens": 1200},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value):
        """One event in two writes, cut within a line and, where there is one, within a character."""
        data = f"data: {json.dumps(value, ensure_ascii=False)}\r\n\r\n".encode()
        middle = next((i + 1 for i, byte in enumerate(data) if byte >= 0xC0), len(data) // 2)
        for part in (data[:middle], data[middle:]):
            self.wfile.write(part)
            self.wfile.flush()
