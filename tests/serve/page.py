#!/usr/bin/env python3
"""The chat page in headless Chromium.

    m1 serve --model examples/m1-nano --port 8000 &
    pip install -r requirements-page.txt
    python page.py --url http://127.0.0.1:8000/ [--key KEY] [--mine] [--shots DIR]

With --url it first talks to that server and its model. --key: the server was started with this key, and wrong ones are
tried too. --mine: with the page of this checkout rather than the server's, to work on it without a build. Then, with or
without --url, the page is shown replies by mock.py that no model gives on demand. A line per check; exit status 0
only if all of them held.
"""

import argparse
import os
import sys
import traceback
import urllib.request
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

from page_checks import real
from page_driver import Failed
from page_scripted import scripted, shots

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running m1 serve, http://127.0.0.1:8000/")
    parser.add_argument("--key", help="the API key that it was started with")
    parser.add_argument("--mine", action="store_true", help="this checkout's page, not the server's")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="take pictures instead")
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    args = parser.parse_args()
    url = args.url and args.url.rstrip("/") + "/"
    if url and not args.mine:
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
                real(browser, url, args.key, page_bytes if args.mine else None, options)
            scripted(browser, page_bytes, options)
        except Failed as e:
            print(f"FAILED  {e}", file=sys.stderr)
            return 1
        except Error as e:  # what should be on the page never came
            frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).parent == HERE]
            where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
            print(f"FAILED  {e.message} ({where})", file=sys.stderr)
            return 1
        finally:
            browser.close()
    print("the page does what it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
