"""What a request may say, and what is answered to one that says something else."""

import pytest
from tenfold.serve.errors import ApiError
from tenfold.serve.schemas import ChatRequest, CompletionRequest, parse

COMPLETION = {"model": "m", "prompt": "Once"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def refused(schema, data):
    with pytest.raises(ApiError) as caught:
        parse(schema, data)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 2}, "n", "only 1"),
        ({"best_of": 3}, "best_of", "only 1"),
        ({"echo": True}, "echo", "only false"),
        ({"presence_penalty": 0.5}, "presence_penalty", "only 0"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "only empty"),
        ({"temperature": 2.5}, "temperature", "0 (most probable token) to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": float("nan")}, "temperature", "0 (most probable token) to 2"),
        ({"top_p": 0}, "top_p", "above 0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "12"}, "max_tokens", "valid integer"),
        ({"seed": 2**63}, "seed", "same seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "up to 4"),
        ({"stop": [1]}, "stop", "strings"),
        ({"logprobs": 6}, "logprobs", "0 to 5"),
        ({"prompt": 5}, "prompt", "neither text nor token ids"),
        ({"prompt": ["a", "b"]}, "prompt", "several prompts"),
        ({"prompt": []}, "prompt", "neither text nor token ids"),
        ({"prompt": [True]}, "prompt", "neither text nor token ids"),
        ({"max_tokns": 5}, "max_tokns", "did you mean max_tokens?"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"model": None}, "model", "/v1/models"),
    ],
)
def test_a_completion_option_that_would_be_ignored_or_is_wrong_is_refused_by_name(change, param, words):
    error = refused(CompletionRequest, COMPLETION | change)
    assert error.param == param
    assert words in str(error)
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "system, user or assistant"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
            "not text",
        ),
        ({"tools": []}, "tools", "unknown key"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "only text"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "send one of them"),
    ],
)
def test_a_chat_option_that_would_be_ignored_or_is_wrong_is_refused_by_name(change, param, words):
    error = refused(ChatRequest, CHAT | change)
    assert error.param == param
    assert words in str(error)


def test_all_wrong_fields_are_named_at_once():
    error = refused(CompletionRequest, {"model": "m", "prompt": 5, "temperature": 9, "n": 0})
    assert all(f"{name} = " in str(error) for name in ("prompt", "temperature", "n"))


def test_a_body_that_is_no_object_is_refused():
    assert "no object" in str(refused(CompletionRequest, ["model"]))


def test_options_that_change_nothing_are_accepted():
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    nothing = {"stop": None, "seed": None, "stream": None, "stream_options": None, "user": "someone"}
    request = parse(CompletionRequest, COMPLETION | neutral | nothing)
    assert (request.stop, request.num_top_logprobs, request.include_usage) == ((), None, False)


def test_a_single_stop_string_is_a_list_of_one():
    assert parse(CompletionRequest, COMPLETION | {"stop": "END"}).stop == ("END",)


def test_a_list_of_one_prompt_is_that_prompt():
    assert parse(CompletionRequest, COMPLETION | {"prompt": ["a"]}).prompt == "a"
    assert parse(CompletionRequest, COMPLETION | {"prompt": [[1, 2]]}).prompt == [1, 2]
    assert parse(CompletionRequest, COMPLETION | {"prompt": [1, 2]}).prompt == [1, 2]


def test_text_parts_are_joined():
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = parse(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": content}]})
    assert request.messages[0].model_dump() == {"role": "user", "content": "Hello"}


def test_log_probabilities_are_asked_for_in_each_interfaces_own_way():
    assert parse(CompletionRequest, COMPLETION | {"logprobs": 0}).num_top_logprobs == 0
    assert parse(ChatRequest, CHAT | {"logprobs": True}).num_top_logprobs == 0
    assert parse(ChatRequest, CHAT | {"logprobs": True, "top_logprobs": 4}).num_top_logprobs == 4
    assert parse(ChatRequest, CHAT | {"logprobs": False}).num_top_logprobs is None
