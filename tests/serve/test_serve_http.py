"""The HTTP interface with real tiny models, through the official client and, where it matters, byte by byte."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

CHAT = [{"role": "user", "content": "Convert 45 kilometers to meters."}]
LIMITS = {"max_body_bytes": 4000, "max_messages": 4, "default_max_tokens": 12, "max_running": 4, "max_waiting": 2}


@pytest.fixture(scope="module")
def base_folder(tiny_model_folder, tmp_path_factory):
    """Return the tiny model without its chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def server(start_http_server, tiny_model_folder, base_folder):
    models = [
        {"name": "tiny", "model": str(tiny_model_folder)},
        {"name": "base", "model": str(base_folder), "max_context": 64},
        {"name": "stories", "model": "sample:models/stories260K"},
    ]
    with start_http_server({"models": models, "limits": LIMITS}) as started:
        yield started


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def engines(server):
    return {name: model.engine for name, model in server[1].models.items()}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0) as made:
        yield made


def post(url, body, path="completions"):
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=60)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


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


def test_a_chat_answer_has_the_configured_length_where_nothing_is_said(client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, seed=2, temperature=0.1)
    assert answer.usage.completion_tokens <= LIMITS["default_max_tokens"]
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


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason(client):
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == client.chat.completions.create(**options).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_is_server_sent_events_that_end_with_done(url):
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


def test_answers_of_many_clients_are_batched_and_right(client, engines):
    options = {"model": "stories", "temperature": 0, "max_tokens": 50}
    openings = ["Once upon a time", "One day", "The cat", "Lily"]
    alone = [client.completions.create(prompt=opening, **options).choices[0].text for opening in openings]
    statistics = engines["stories"].statistics
    statistics.largest_batch = 0
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda opening: client.completions.create(prompt=opening, **options), openings))
    assert [answer.choices[0].text for answer in answers] == alone
    assert statistics.largest_batch >= 2


def hang_up(url, body, after_events):
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for count, _ in enumerate(answer.iter_lines(), start=1):
            if count >= after_events:
                break


def test_a_client_that_hangs_up_in_mid_stream_ends_its_generation(url, engines):
    engine = engines["stories"]
    before = engine.statistics.tokens
    ended = engine.statistics.ended_early
    hang_up(url, {"model": "stories", "prompt": "Once", "max_tokens": 500, "stream": True}, after_events=3)
    wait_until(lambda: engine.statistics.ended_early == ended + 1)
    assert engine.admission.num_running == 0
    assert engine.statistics.tokens - before < 250


def test_a_client_that_hangs_up_while_it_waits_for_a_whole_answer_ends_its_generation(url, engines):
    engine = engines["stories"]
    ended = engine.statistics.ended_early
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/completions", json={"model": "stories", "prompt": "Once", "max_tokens": 500}, timeout=0.1
        )
    wait_until(lambda: engine.statistics.ended_early == ended + 1)
    assert engine.admission.num_running == 0


def test_too_many_requests_are_refused_with_when_to_come_back(url, engines):
    body = {"model": "stories", "prompt": "Once", "max_tokens": 480, "temperature": 0}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(url, body))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= LIMITS["max_running"] + LIMITS["max_waiting"]
    assert 429 in statuses
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1


def test_an_unknown_model_is_404_and_names_those_that_exist(client):
    with pytest.raises(openai.NotFoundError, match="did you mean stories") as caught:
        client.completions.create(model="storys", prompt="x")
    assert caught.value.code == "model_not_found"
    assert "tiny, base, stories" in caught.value.message


def test_a_model_without_chat_template_says_so(client):
    with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
        client.chat.completions.create(model="base", messages=CHAT)
    assert caught.value.code == "no_chat_template"


def test_too_long_a_prompt_is_400_and_names_both_numbers(client):
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt has 60 tokens and 5 more .* base holds 64"
    ) as caught:
        client.completions.create(model="base", prompt=[5] * 60, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the prompt has 64 tokens and 1 more"):
        client.completions.create(model="base", prompt=[5] * 64)


def test_a_default_length_gives_way_to_a_long_prompt(client):
    answer = client.completions.create(model="base", prompt=[5] * 60, temperature=0)
    assert answer.usage.completion_tokens <= 4


def test_a_token_that_the_model_does_not_have_is_400_and_harms_nobody(client, url):
    for token in (320, -1):
        with pytest.raises(openai.BadRequestError, match=f"no token {token}; tiny has 0 to 319"):
            client.completions.create(model="tiny", prompt=[5, token])
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_an_empty_prompt_is_400(client):
    with pytest.raises(openai.BadRequestError, match="gives no token"):
        client.completions.create(model="tiny", prompt="")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{not json", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 3000, 400, "invalid_json"),
        (b"[]", 400, None),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_value"),
        (b'{"model": "tiny", "prompt": "' + b"a" * 4000 + b'"}', 413, "request_too_large"),
    ],
)
def test_bad_bodies_get_an_error_in_openais_form(url, content, status, code):
    answer = httpx.post(f"{url}/v1/completions", content=content)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}


def test_a_long_body_of_unknown_length_is_refused_too(url):
    answer = httpx.post(f"{url}/v1/completions", content=iter([b"a" * 3000, b"b" * 3000]))
    assert answer.status_code == 413


def test_too_many_messages_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="messages: 5 of them, this server takes 4"):
        client.chat.completions.create(model="tiny", messages=CHAT * 5)


def test_a_message_the_template_refuses_is_400(start_http_server, tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only one message is allowed') }}")
    with start_http_server({"models": [{"name": "strict", "model": str(folder)}]}) as (url, _):
        answer = post(url, {"model": "strict", "messages": CHAT}, "chat/completions")
    assert answer.status_code == 400
    assert "only one message is allowed" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openais_form(url):
    assert httpx.get(f"{url}/v2").json()["error"]["message"] == "GET /v2: Not Found"
    answer = httpx.get(f"{url}/v1/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_keys_are_wanted_everywhere_under_v1(start_http_server, tiny_model_folder, tmp_path):
    (tmp_path / "keys").write_text("right-key\nother-key\n")
    data = {
        "models": [{"name": "tiny", "model": str(tiny_model_folder)}],
        "api_keys": {"file": str(tmp_path / "keys")},
    }
    body = {"model": "tiny", "prompt": "Name", "max_tokens": 1}
    with start_http_server(data) as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right-key"}):
            for answer in (
                httpx.get(f"{url}/v1/models", headers=headers),
                httpx.get(f"{url}/v1/models/tiny", headers=headers),
                httpx.post(f"{url}/v1/completions", json=body, headers=headers),
                httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("right-key", "other-key"):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            assert client.completions.create(**body).usage.completion_tokens == 1
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_dead_engine_is_503_and_unhealthy(start_http_server, tiny_model_folder, monkeypatch):
    body = {"model": "tiny", "prompt": "Name", "max_tokens": 5}
    with start_http_server({"models": [{"name": "tiny", "model": str(tiny_model_folder)}]}) as (url, service):

        def broken(*_, **__):
            raise RuntimeError("no memory left")

        monkeypatch.setattr(service.models["tiny"].engine._manager.model, "forward", broken)
        for answer in (post(url, body), post(url, body | {"stream": True})):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"
            assert "retry-after" in answer.headers
        health = httpx.get(f"{url}/healthz")
        assert health.status_code == 503
        assert "no memory left" in health.json()["reason"]


def test_an_engine_that_dies_in_mid_stream_is_an_error_event(start_http_server, tiny_model_folder):
    body = {"model": "tiny", "prompt": "Name", "max_tokens": 200, "seed": 1, "temperature": 2, "stream": True}
    with start_http_server({"models": [{"name": "tiny", "model": str(tiny_model_folder)}]}) as (url, service):
        engine = service.models["tiny"].engine
        events = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                events.append(line)
                if len(events) == 3:
                    engine.stop()
    assert "the answer is incomplete" in events[-2]
    assert "data: [DONE]" not in events


def test_a_damaged_model_is_not_served(start_http_server, tiny_model_folder, tmp_path):
    from tenfold.platform.errors import ModelError
    from tenfold.platform.models.manifest import write_manifest

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    write_manifest(folder, flavor="causal-lm", method="test", name="tiny")
    data = {"models": [{"name": "tiny", "model": str(folder)}]}
    with start_http_server(data) as (url, _):
        assert httpx.get(f"{url}/healthz").status_code == 200
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors"), start_http_server(data):
        pass


def test_the_context_is_the_models_where_nothing_is_said(server):
    assert {name: model.max_context for name, model in server[1].models.items()} == {
        "tiny": 256,
        "base": 64,
        "stories": 512,
    }


def test_a_context_longer_than_the_models_is_refused(start_http_server, tiny_model_folder):
    from tenfold.platform.errors import ConfigError

    data = {"models": [{"name": "tiny", "model": str(tiny_model_folder), "max_context": 512}]}
    with pytest.raises(ConfigError, match="max_context = 512, the model was made for 256"), start_http_server(data):
        pass


def test_asking_in_one_line_gives_the_answer_or_the_servers_reason(url, client):
    from tenfold.platform.errors import TenfoldError
    from tenfold.serve.launch import ask

    expected = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=9)
    assert ask(url, "tiny", CHAT[0]["content"], max_tokens=9) == expected.choices[0].message.content
    with pytest.raises(TenfoldError, match="404: no model 'none'"):
        ask(url, "none", "Hello")
    with pytest.raises(TenfoldError, match="no answer"):
        ask("http://127.0.0.1:9", "tiny", "Hello")
