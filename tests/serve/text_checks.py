"""Text completions and tokens: echo, log-probabilities, several prompts, prompts of ids."""

import math

import openai

from harness import check, refused, same
from sampling_checks import PROMPT, ends


@check
def a_completion_continues_its_prompt(server):
    whole = server.complete(PROMPT, temperature=0, max_tokens=20, logit_bias=ends(server))
    same((whole.object, whole.model), ("text_completion", server.model))
    [choice] = whole.choices
    same((choice.index, choice.finish_reason, choice.logprobs), (0, "length", None))
    assert choice.text and not choice.text.startswith(PROMPT), choice.text
    same(whole.usage.completion_tokens, 20)
    options = {"temperature": 0, "max_tokens": 20, "logit_bias": ends(server), "stream": True}
    chunks = list(server.complete(PROMPT, stream_options={"include_usage": True}, **options))
    same("".join(c.text for chunk in chunks for c in chunk.choices), choice.text)
    same([c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason], ["length"])
    same((chunks[-1].choices, chunks[-1].usage.total_tokens), ([], whole.usage.total_tokens))
    same({chunk.object for chunk in chunks}, {"text_completion"})


@check
def prompts_come_as_text_ids_and_lists_of_both(server):
    texts = [PROMPT, "Once upon a time"]
    ids = [server.post("/tokenize", {"prompt": text})["tokens"] for text in texts]
    options = {"temperature": 0, "max_tokens": 12}
    alone = [server.complete(text, **options).choices[0].text for text in texts]
    same([server.complete(tokens, **options).choices[0].text for tokens in ids], alone)
    for prompts in (texts, ids):
        both = server.complete(prompts, **options)
        same([(c.index, c.text) for c in both.choices], list(enumerate(alone)))
        same(both.usage.prompt_tokens, sum(map(len, ids)))
    four = server.complete(texts, temperature=1.3, seed=2, n=2, max_tokens=12)
    same([c.index for c in four.choices], [0, 1, 2, 3])
    again = server.complete(texts, temperature=1.3, seed=2, n=2, max_tokens=12, stream=True)
    parts = {}
    for chunk in again:
        for c in chunk.choices:
            parts[c.index] = parts.get(c.index, "") + c.text
    same([parts[i] for i in range(4)], [c.text for c in four.choices])


@check
def echo_shows_the_prompt_before_the_answer(server):
    options = {"temperature": 1.2, "seed": 4, "max_tokens": 10, "n": 2}
    free = server.complete(PROMPT, **options)
    whole = server.complete(PROMPT, echo=True, **options)
    same([c.text for c in whole.choices], [PROMPT + c.text for c in free.choices])
    same(whole.usage.completion_tokens, free.usage.completion_tokens)
    parts = {}
    for chunk in server.complete(PROMPT, echo=True, stream=True, **options):
        for c in chunk.choices:
            parts[c.index] = parts.get(c.index, "") + c.text
    same([parts[0], parts[1]], [c.text for c in whole.choices])
    ids = server.post("/tokenize", {"prompt": PROMPT})["tokens"]
    same(server.complete(ids, echo=True, temperature=0, max_tokens=1).choices[0].text[: len(PROMPT)], PROMPT)
    # What is not done is refused.
    refused(lambda: server.complete(PROMPT, suffix="x"), openai.BadRequestError, param="suffix")
    refused(lambda: server.complete(PROMPT, best_of=2), openai.BadRequestError, param="best_of")


@check
def a_text_is_scored_as_evaluation_harnesses_ask(server):
    """`echo` with `logprobs`: what lm-evaluation-harness sends, whose context's tokens it then leaves out."""
    ids = server.post("/tokenize", {"prompt": PROMPT})["tokens"]
    scored = server.complete([ids, ids[:3]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    for choice, length in zip(scored.choices, (len(ids), 3)):
        lists = choice.logprobs
        same([len(lists.tokens), len(lists.token_logprobs), len(lists.top_logprobs)], [length + 1] * 3)
        same([lists.token_logprobs[0], lists.top_logprobs[0]], [None, None])
        assert all(value <= 0 for value in lists.token_logprobs[1:]), lists.token_logprobs
        for token, value, top in list(zip(lists.tokens, lists.token_logprobs, lists.top_logprobs))[1:]:
            assert top[token] == value and max(top.values()) >= value, (token, value, top)
        same("".join(lists.tokens), choice.text)
    # What comes before does not depend on what comes after.
    same(scored.choices[1].logprobs.token_logprobs[:3], scored.choices[0].logprobs.token_logprobs[:3])


@check
def log_probabilities_of_completions_are_lists(server):
    options = {"temperature": 0, "max_tokens": 8, "logit_bias": ends(server)}
    scores = server.complete(PROMPT, logprobs=4, **options).choices[0].logprobs
    same([len(list_) for list_ in (scores.token_logprobs, scores.top_logprobs, scores.text_offset)], [8] * 3)
    for token, value, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
        assert 4 <= len(top) <= 5 and abs(top[token] - value) < 1e-6, (token, value, top)
        # Greedy: the likeliest that was not forbidden; probabilities are the model's own, before any bias.
        same(max(top.keys() - {"<end_of_sentence>"}, key=top.get), token)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-4
    bare = server.complete(PROMPT, logprobs=0, **options).choices[0].logprobs
    same((bare.tokens, bare.token_logprobs), (scores.tokens, scores.token_logprobs))
    # Each is that of the token after all before it, also where these were read and not drawn.
    ids = server.post("/tokenize", {"prompt": PROMPT})["tokens"]
    drawn = [server.post("/tokenize", {"prompt": token})["tokens"] for token in scores.tokens]
    for i, value in enumerate(scores.token_logprobs):
        again = server.complete(ids, **{**options, "max_tokens": 1}, logprobs=0).choices[0].logprobs
        assert abs(again.token_logprobs[0] - value) < 1e-3, (i, again.token_logprobs, value)
        if len(drawn[i]) != 1:
            break  # a part of a character has no text of its own
        ids = ids + drawn[i]
    assert len(ids) > len(scores.tokens), ids
    parts = [
        value
        for chunk in server.complete(PROMPT, logprobs=4, stream=True, **options)
        for c in chunk.choices
        if c.logprobs
        for value in c.logprobs.token_logprobs
    ]
    assert all(abs(a - b) < 1e-4 for a, b in zip(parts, scores.token_logprobs, strict=True)), parts


@check
def tokens_and_text_are_turned_into_each_other(server):
    for text in ("Hello, world!", "", "1 + 1 = 2\n\n\ttabs", "naïve café — 東京 🙂", "<think>x</think><end_of_sentence>"):
        got = server.post("/tokenize", {"prompt": text})
        same(got["count"], len(got["tokens"]))
        same(server.post("/detokenize", {"tokens": got["tokens"]})["prompt"], text)
    # Of a chat: exactly the prompt that a completion has.
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    got = server.post("/tokenize", {"messages": messages})
    same(got["count"], server.chat(messages, temperature=0, max_tokens=1).usage.prompt_tokens)
    text = server.post("/detokenize", {"tokens": got["tokens"]})["prompt"]
    assert "Be kind." in text and text.count("<beginning_of_sentence>") == 3, text
    for path, body in (("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {})):
        status, _, answer = server.request("POST", path, body)
        same(status, 400, f"{path} {body}: {answer!r}")
