"""What the server refuses, and what it says when it cannot answer; with real tiny models over HTTP."""

import shutil
import threading
import time

import httpx
import openai
import pytest

CHAT = [{"role": "user", "content": "Convert 45 kilometers to meters."}]


def test_too_many_requests_are_refused_with_when_to_come_back(url, engines, post, limits):
    body = {"model": "stories", "prompt": "Once", "max_tokens": 480, "temperature": 0}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(url, body))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= limits["max_running"] + limits["max_waiting"]
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


def test_a_message_the_template_refuses_is_400(start_http_server, tiny_model_folder, tmp_path, post):
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


def slow_down(monkeypatch, model):
    """Make sure that an answer of many tokens is not at its end before anybody has seen its first ones."""
    forward = model.forward

    def slowly(*arguments, **options):
        time.sleep(0.02)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slowly)


def test_a_dead_engine_is_503_and_unhealthy(start_http_server, tiny_model_folder, monkeypatch, post):
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


def test_an_engine_that_dies_in_mid_stream_is_an_error_event(start_http_server, tiny_model_folder, monkeypatch):
    body = {"model": "tiny", "prompt": "Name", "max_tokens": 200, "seed": 1, "temperature": 2, "stream": True}
    with start_http_server({"models": [{"name": "tiny", "model": str(tiny_model_folder)}]}) as (url, service):
        engine = service.models["tiny"].engine
        slow_down(monkeypatch, engine._manager.model)
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


def test_a_context_longer_than_the_models_is_refused(start_http_server, tiny_model_folder):
    from tenfold.platform.errors import ConfigError

    data = {"models": [{"name": "tiny", "model": str(tiny_model_folder), "max_context": 512}]}
    with pytest.raises(ConfigError, match="max_context = 512, the model was made for 256"), start_http_server(data):
        pass


def test_serves_health_check_fails_with_the_generation_thread(tiny_model_folder):
    from tenfold.serve.engine import EngineError
    from tenfold.serve.language_models import LanguageModels

    replica = LanguageModels({"models": [{"name": "tiny", "model": str(tiny_model_folder)}]})
    replica.service.start()
    try:
        replica.check_health()
        assert replica.statistics()["tiny"]["running"] == 0
    finally:
        replica.service.stop()
    with pytest.raises(EngineError, match="tiny: the generation thread has stopped"):
        replica.check_health()
