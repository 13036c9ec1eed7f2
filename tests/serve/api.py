"""Checks a running server as its users use it: with the official `openai` package, and by plain requests.

python api.py --url http://127.0.0.1:8000 [--key KEY] [--model NAME] [--only WORD ...]

A line for each check; exit status 1 if any fails. Written for examples/m1-nano, which thinks first and does sums.
"""

import argparse
import sys

import harness

# In the order in which they run.
import chat_checks  # noqa: F401
import sampling_checks  # noqa: F401
import form_checks  # noqa: F401
import text_checks  # noqa: F401
import error_checks  # noqa: F401
import many_checks  # noqa: F401


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", help="API key that the server asks for")
    parser.add_argument("--model", help="name of the model [default: what /v1/models says]")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name holds one of these")
    args = parser.parse_args()
    failed = harness.run(harness.Server(args.url, args.key, args.model), args.only)
    if failed:
        print(f"{failed} failed", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
