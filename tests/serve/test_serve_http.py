"""The HTTP interface with real tiny models, through the official client and, where it matters, byte by byte."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

CHAT = [{"role": "user", "content": "Convert 45 kilometers to meters."}]


def test_the_models_are_listed_and_found_one_by_one(client):
    assert [model.id for model in client.models.list()] == ["tiny", "base", "stories"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_health_is_reported(url):
    answer = httpx.get(f"{url}/healthz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "models": ["tiny", "base", "stories"]}


def test_a_greedy_completion_is_what_generate_gives(client, tiny_model_folder, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    prompt = tiny_tokenizer("What is the capital")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    answer = client.completions.create(model="tiny", prompt="What is the capital", temperature=0, max_tokens=20)
    assert answer.choices[0].text == tiny_tokenizer.decode(out, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(out)
    assert answer.usage.total_tokens == len(prompt) + len(out)


def test_token_ids_are_a_prompt_too(client, tiny_tokenizer):
    text = "Name three colours"
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    from_ids = client.completions.create(prompt=tiny_tokenizer(text)["input_ids"], **options)
    assert from_ids.choices[0].text == client.completions.create(prompt=text, **options).choices[0].text


def test_the_real_stories_model_tells_a_story(client):
    answer = client.completions.create(model="stories", prompt="Once upon a time", temperature=0, max_tokens=40)
    assert answer.choices[0].text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park."
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_completion_is_16_tokens_where_nothing_is_said(client):
    assert client.completions.create(model="stories", prompt="Once", temperature=0).usage.completion_tokens == 16


def test_a_chat_answer_goes_through_the_models_template(client, tiny_tokenizer):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 10}
    chat = client.chat.completions.create(messages=CHAT, **options)
    prompt = tiny_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == client.completions.create(prompt=ids, **options).choices[0].text
    assert chat.usage.prompt_tokens == len(ids)


def test_a_chat_answer_has_the_configured_length_where_nothing_is_said(client, limits):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, seed=2, temperature=0.1)
    assert answer.usage.completion_tokens <= limits["default_max_tokens"]
    longer = client.chat.completions.create(
        model="tiny", messages=CHAT, seed=2, temperature=0.1, max_completion_tokens=30
    )
    assert longer.usage.completion_tokens > answer.usage.completion_tokens or answer.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_the_whole_answer_in_pieces(client):
    options = {"model": "stories", "prompt": "One day, Tim", "temperature": 0.8, "seed": 5, "max_tokens": 60}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 20
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_fast_tokens_share_an_event_but_the_first_comes_alone(start_http_server, post):
    data = {
        "models": [{"name": "stories", "model": "sample:models/stories260K"}],
        "limits": {"stream_interval_s": 60.0},
    }
    body = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20, "logprobs": 0}
    with start_http_server(data) as (url, _):
        whole = post(url, body).json()["choices"][0]
        lines = post(url, body | {"stream": True}).text.split("\n\n")
    first, rest = (json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:2])
    assert lines[2:] == ["data: [DONE]", ""]
    assert first["text"] == ","
    assert first["text"] + rest["text"] == whole["text"]
    assert first["logprobs"]["tokens"] + rest["logprobs"]["tokens"] == whole["logprobs"]["tokens"]
    assert rest["finish_reason"] == "length"


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason(client):
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == client.chat.completions.create(**options).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_is_server_sent_events_that_end_with_done(url, post):
    body = {"model": "stories", "prompt": "Once", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = post(url, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(client, stream):
    options = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**options).choices[0].text
    stop = text[text.index("outside") - 2 : text.index("outside") + 5]  # "y outsi": from the middle of a word
    answer = client.completions.create(**options, stop=[stop, "never comes"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_another_changes_it(client):
    def text(seed):
        options = {"model": "stories", "prompt": "Once", "max_tokens": 40, "seed": seed}
        return client.completions.create(**options).choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_without_a_seed_answers_differ(client):
    texts = [
        client.completions.create(model="stories", prompt="Once", max_tokens=40).choices[0].text for _ in range(2)
    ]
    assert texts[0] != texts[1]


def test_top_p_near_zero_is_greedy(client):
    options = {"model": "stories", "prompt": "Once", "max_tokens": 30}
    greedy = client.completions.create(**options, temperature=0).choices[0].text
    assert client.completions.create(**options, top_p=1e-6, seed=3).choices[0].text == greedy
    assert client.completions.create(**options, seed=3).choices[0].text != greedy


def test_completion_log_probabilities_cover_the_text(client):
    options = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20, "logprobs": 2}
    choice = client.completions.create(**options).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert [
        choice.text[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens, strict=True)
    ]
    assert all(len(top) == 2 for top in found.top_logprobs)
    # Greedy: the chosen token is the best one.
    assert all(max(top.values()) == own for top, own in zip(found.top_logprobs, found.token_logprobs, strict=True))


def test_streamed_log_probabilities_are_those_of_the_whole_answer_up_to_the_stop_string(client):
    options = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20, "logprobs": 0}
    whole = client.completions.create(**options, stop=" named").choices[0].logprobs
    chunks = list(client.completions.create(**options, stop=" named", stream=True))
    assert "".join(whole.tokens) == ", there was a little girl"
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == whole.tokens


def test_chat_log_probabilities_have_the_chat_form(client):
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 6}
    plain = client.chat.completions.create(**options, logprobs=True).choices[0].logprobs.content
    top = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in plain] == [[]] * len(plain)
    assert all(len(entry.top_logprobs) == 3 for entry in top)
    assert all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in top)
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in top)


def test_answers_of_many_clients_are_batched_and_right(client, engines, monkeypatch):
    options = {"model": "stories", "temperature": 0, "max_tokens": 50}
    openings = ["Once upon a time", "One day", "The cat", "Lily"]
    alone = [client.completions.create(prompt=opening, **options).choices[0].text for opening in openings]
    engine, all_there, there = engines["stories"], threading.Event(), []
    submit, prepare = engine._submit, engine._sampler.prepare_tensor_args

    def submit_and_count(*arguments):
        submit(*arguments)
        there.append(arguments)
        if len(there) == len(openings):
            all_there.set()

    def prepare_when_all_are_there(requests):
        assert all_there.wait(120)
        return prepare(requests)

    monkeypatch.setattr(engine, "_submit", submit_and_count)
    monkeypatch.setattr(engine._sampler, "prepare_tensor_args", prepare_when_all_are_there)
    engine.statistics.largest_batch = 0
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda opening: client.completions.create(prompt=opening, **options), openings))
    assert [answer.choices[0].text for answer in answers] == alone
    assert engine.statistics.largest_batch == 4


def test_a_client_that_hangs_up_in_mid_stream_ends_its_generation(url, engines, wait_until):
    engine = engines["stories"]
    before = engine.statistics.tokens
    ended = engine.statistics.ended_early
    body = {"model": "stories", "prompt": "Once", "max_tokens": 500, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for count, _ in enumerate(answer.iter_lines(), start=1):
            if count == 3:
                break
    wait_until(lambda: engine.statistics.ended_early == ended + 1)
    assert engine.admission.num_running == 0
    assert engine.statistics.tokens - before < 500


def test_a_client_that_hangs_up_while_it_waits_for_a_whole_answer_ends_its_generation(
    url, engines, hang_up, wait_until
):
    engine = engines["stories"]
    ended = engine.statistics.ended_early
    body = {"model": "stories", "prompt": "Once", "max_tokens": 500}
    assert hang_up(url, body, lambda: engine.admission.num_running == 1)
    wait_until(lambda: engine.statistics.ended_early == ended + 1)
    assert engine.admission.num_running == 0


def test_the_context_is_the_models_where_nothing_is_said(server):
    assert {name: model.max_context for name, model in server[1].models.items()} == {
        "tiny": 256,
        "base": 64,
        "stories": 512,
    }


def test_asking_in_one_line_gives_the_answer_or_the_servers_reason(url, client):
    from tenfold.platform.errors import TenfoldError
    from tenfold.serve.launch import ask

    expected = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=9)
    assert ask(url, "tiny", CHAT[0]["content"], max_tokens=9) == expected.choices[0].message.content
    with pytest.raises(TenfoldError, match="404: no model 'none'"):
        ask(url, "none", "Hello")
    with pytest.raises(TenfoldError, match="no answer"):
        ask("http://127.0.0.1:9", "tiny", "Hello")
