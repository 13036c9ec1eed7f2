"""How tokens are drawn and how texts end: seeds, n, limits, stops, penalties, biases, log-probabilities."""

import math
import re

import openai

from harness import Streamed, check, reasoning, refused, said, same, streamed

SUM = "What is 23 + 45?"
# Harder than what the model was taught: what it says has many ways to go on.
OPEN = "What is 999 + 888 - 77?"
# Text without the template: what it says is all there is.
PROMPT = "The words are apple, banana"
NO_THINKING = {"thinking": {"type": "disabled"}}


@check
def the_same_seed_gives_the_same_answer(server):
    ask = lambda seed: said(server.chat(OPEN, temperature=1.5, top_p=1, seed=seed, max_tokens=80))
    first = {seed: ask(seed) for seed in range(6)}
    for seed, wanted in first.items():
        same(ask(seed), wanted, f"seed {seed}")
    assert len({str(answer) for answer in first.values()}) > 2, "seeds make no difference"
    # Without a seed answers vary.
    free = {str(said(server.chat(OPEN, temperature=1.5, top_p=1, max_tokens=80))) for _ in range(8)}
    assert len(free) > 2, free


@check
def n_answers_are_reproducible_and_differ(server):
    options = {"temperature": 1.4, "top_p": 1, "seed": 5, "max_tokens": 60, "n": 4}
    one, two = server.chat(OPEN, **options), server.chat(OPEN, **options)
    same(said(one), said(two))
    same(sorted(c.index for c in one.choices), [0, 1, 2, 3])
    assert len({str(answer) for answer in said(one)}) > 1, "four times the same"
    same(streamed(server.chat(OPEN, stream=True, **options)), said(one))
    # The first has the seed, and each further one the next number.
    for i, answer in enumerate(said(one)):
        same(said(server.chat(OPEN, **{**options, "n": 1, "seed": 5 + i})), [answer], f"choice {i} alone")
    # All answers count, the prompt once.
    alone = server.chat(OPEN, temperature=0, max_tokens=1).usage.prompt_tokens
    same(one.usage.prompt_tokens, alone)
    assert one.usage.completion_tokens > 60, one.usage


@check
def limits_end_an_answer_by_length(server):
    for key in ("max_tokens", "max_completion_tokens"):
        for limit in (1, 7):
            cut = server.chat(SUM, temperature=0, **{key: limit})
            same((cut.choices[0].finish_reason, cut.usage.completion_tokens), ("length", limit))
    cut = server.complete(PROMPT, temperature=0, max_tokens=9, logit_bias=ends(server))
    same((cut.choices[0].finish_reason, cut.usage.completion_tokens), ("length", 9))
    # 16, as OpenAI's completions have it.
    same(server.complete(PROMPT, temperature=0, logit_bias=ends(server)).usage.completion_tokens, 16)


def ends(server):
    """Keeps a text from ending by itself."""
    [end] = server.post("/tokenize", {"prompt": "<end_of_sentence>"})["tokens"]
    return {str(end): -100}


@check
def stop_strings_end_a_text_before_they_show(server):
    whole = server.complete(PROMPT, temperature=0, max_tokens=40, logit_bias=ends(server)).choices[0].text
    assert len(whole) > 20, whole
    # Three characters, most likely over a token's boundary; and the earliest of several counts.
    stop = whole[9:12]
    wanted = whole[: whole.index(stop)]
    for given in (stop, [stop], ["never there", stop], [whole[15:19], stop]):
        options = {"temperature": 0, "max_tokens": 40, "stop": given, "logit_bias": ends(server)}
        earliest = min(whole.index(s) for s in ([given] if isinstance(given, str) else given) if s in whole)
        cut = server.complete(PROMPT, **options).choices[0]
        same((cut.text, cut.finish_reason), (whole[:earliest], "stop"), f"stop={given!r}")
        parts = [c for chunk in server.complete(PROMPT, stream=True, **options) for c in chunk.choices]
        same("".join(c.text for c in parts), whole[:earliest], "streamed")
        same([c.finish_reason for c in parts if c.finish_reason], ["stop"])
    assert wanted == whole[: whole.index(stop)]
    # In a chat the answer is stopped, whatever was thought before.
    full = server.chat(SUM, temperature=0).choices[0].message
    answer = server.chat(SUM, temperature=0, stop=[full.content.strip()[1:]]).choices[0]
    assert answer.finish_reason == "stop", answer
    assert full.content.strip()[1:] not in (answer.message.content or ""), answer


@check
def narrow_sampling_is_greedy(server):
    wanted = said(server.chat(SUM, temperature=0))
    for options in (
        {"top_p": 1e-6},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"min_p": 1.0}},
    ):
        for seed in (1, 2):
            same(said(server.chat(SUM, temperature=1.5, seed=seed, **options)), wanted, str(options))


@check
def biases_force_and_forbid(server):
    tokens = server.post("/tokenize", {"prompt": "7"})["tokens"]
    seven = tokens[-1]
    forced = server.complete(PROMPT, temperature=1, max_tokens=8, logit_bias={str(seven): 100}).choices[0]
    same(forced.text, server.post("/detokenize", {"tokens": [seven] * 8})["prompt"])
    free = server.complete(PROMPT, temperature=0, max_tokens=12, logprobs=1).choices[0]
    first = server.post("/tokenize", {"prompt": PROMPT + free.text})["tokens"]
    length = len(server.post("/tokenize", {"prompt": PROMPT})["tokens"])
    banned = first[length]
    other = server.complete(PROMPT, temperature=0, max_tokens=12, logprobs=1, logit_bias={str(banned): -100}).choices[0]
    assert other.logprobs.tokens[0] != free.logprobs.tokens[0], "the banned token was drawn"
    for value in (100.5, -101):
        refused(
            lambda: server.complete(PROMPT, logit_bias={"5": value}), openai.BadRequestError, text="logit_bias"
        )
    refused(lambda: server.complete(PROMPT, logit_bias={"99999999": 1}), openai.BadRequestError, text="logit_bias")


@check
def penalties_count_what_was_said(server):
    def most(**options):
        drawn = server.complete("1 1 1 1 1 1", temperature=0, max_tokens=60, logprobs=0, logit_bias=ends(server), **options)
        tokens = drawn.choices[0].logprobs.tokens
        same(len(tokens), 60)
        return max(tokens.count(t) for t in tokens), len(set(tokens))

    plain = most()
    repeated, distinct = most(frequency_penalty=2)
    insistent, _ = most(frequency_penalty=-2)
    assert repeated < insistent, (repeated, insistent)
    assert most(presence_penalty=2)[1] > most(presence_penalty=-2)[1]
    assert most(extra_body={"repetition_penalty": 1.8})[1] >= plain[1]
    for name in ("frequency_penalty", "presence_penalty"):
        refused(lambda: server.chat(SUM, **{name: 2.1}), openai.BadRequestError, param=name)


@check
def log_probabilities_are_those_of_the_text(server):
    whole = server.chat(SUM, temperature=0, logprobs=True, top_logprobs=5)
    [choice] = whole.choices
    entries = choice.logprobs.content
    for entry in entries:
        assert entry.logprob <= 1e-6 and len(entry.top_logprobs) == 5, entry
        top = [t.logprob for t in entry.top_logprobs]
        same(top, sorted(top, reverse=True))
        same((entry.token, entry.bytes), (entry.top_logprobs[0].token, entry.top_logprobs[0].bytes), "greedy")
        assert abs(entry.logprob - top[0]) < 1e-6 and sum(map(math.exp, top)) <= 1 + 1e-4, entry
        assert entry.bytes is None or bytes(entry.bytes).decode(errors="replace") == entry.token, entry
    text = b"".join(bytes(entry.bytes or []) for entry in entries).decode()
    assert choice.message.content in text, (choice.message.content, text)
    # What was thought has its own list beside.
    thought = b"".join(bytes(entry["bytes"]) for entry in choice.logprobs.model_extra["reasoning_content"]).decode()
    same(thought.strip(), reasoning(choice.message).strip(), "the tokens of thinking")
    same(re.sub("</?think>", "", text).strip(), choice.message.content.strip(), "the tokens of the answer")
    # A stream has the same ones, in order.
    again = Streamed(server.chat(SUM, temperature=0, logprobs=True, top_logprobs=5, stream=True)).entries[0]
    same([(e.token, e.bytes) for e in again], [(e.token, e.bytes) for e in entries])
    for a, b in zip(again, entries):
        assert abs(a.logprob - b.logprob) < 1e-4, (a.logprob, b.logprob)
    # Without thinking nothing but the answer is there.
    short = server.chat("Hello!", temperature=0, logprobs=True, extra_body=NO_THINKING, max_tokens=60)
    [choice] = short.choices
    text = b"".join(bytes(e.bytes or []) for e in choice.logprobs.content).decode()
    assert text.startswith(choice.message.content), (text, choice.message.content)
    same([e.top_logprobs for e in choice.logprobs.content if e.top_logprobs], [], "top_logprobs without asking")
    same(server.chat(SUM, temperature=0).choices[0].logprobs, None)
    refused(lambda: server.chat(SUM, top_logprobs=2), openai.BadRequestError, text="logprobs")
    refused(lambda: server.chat(SUM, logprobs=True, top_logprobs=21), openai.BadRequestError, param="top_logprobs")
