"""The judge against a real HTTP server on this machine that prefers the longer answer, or misbehaves on purpose."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError
from tenfold.platform.errors import ConfigError, ModelError
from tenfold.platform.evaluation.judge import Judgement, compare, outcome, parse_verdict, plan_comparisons
from tenfold.platform.evaluation.options import JudgeOptions
from tenfold.platform.storage import Storage

QUICK = {"retry_delay_s": 0.0, "timeout_s": 5.0}
PARTS = re.compile(r"<request>\n(.*)\n</request>.*<answer_A>\n(.*)\n</answer_A>.*<answer_B>\n(.*)\n</answer_B>", re.S)


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def longer(question):
    _, first, second = PARTS.search(question).groups()
    return "Tied" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


class Server(ThreadingHTTPServer):
    """Answers with `behave(question, number of this try)`; keeps what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = lambda question, attempt: completion(longer(question))
        self.asked, self.headers, self.bodies = Counter(), [], []
        self.lock, self.open, self.most_open = threading.Lock(), 0, 0

    def options(self, **more):
        return JudgeOptions(base_url=f"http://127.0.0.1:{self.server_address[1]}/v1", model="judge", **QUICK | more)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.asked[question] += 1
            attempt = server.asked[question]
            server.headers.append(dict(self.headers))
            server.bodies.append({**body, "path": self.path})
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        status, text = server.behave(question, attempt)
        with server.lock:
            server.open -= 1
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


PROMPTS = [f"Question {number}?" for number in range(8)]
ANSWERS = ["long answer"] * 5 + ["no"] * 2 + ["same"]
OPPONENTS = ["short"] * 5 + ["longer one"] * 2 + ["sane"]


def judged(server, storage, **more):
    return compare(server.options(**more), PROMPTS, ANSWERS, OPPONENTS, storage, "judge.jsonl")


def test_wins_losses_and_ties_are_counted_whatever_place_an_answer_had(server, storage):
    found = judged(server, storage)
    assert (found.wins, found.losses, found.ties, found.unparsable) == (5, 2, 1, 0)
    planned = plan_comparisons(server.options(), PROMPTS, ANSWERS, OPPONENTS)
    assert {one.swapped for one in planned} == {True, False}
    shown_first = sum((item < 5) != one.swapped for item, one in enumerate(planned) if item < 7)
    assert found.first == shown_first
    assert found.metrics() == {
        "judge_wins": 5,
        "judge_losses": 2,
        "judge_ties": 1,
        "judge_unparsable": 0,
        "judge_win_rate": 100 * 5.5 / 8,
        "judge_first_rate": pytest.approx(100 * shown_first / 7),
    }


def test_the_request_is_a_plain_chat_completion(server, storage, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "secret-1\n")
    judged(server, storage, api_key_env="OUR_KEY", temperature=None, max_items=1)
    (body,), (headers,) = server.bodies, server.headers
    assert body["path"] == "/v1/chat/completions"
    assert body["model"] == "judge"
    assert body["max_tokens"] == 512
    assert "temperature" not in body
    assert headers["authorization" if "authorization" in headers else "Authorization"] == "Bearer secret-1"
    assert "secret-1" not in storage.read_text("judge.jsonl")


def test_the_protocols_defaults_are_the_papers():
    options = JudgeOptions(base_url="http://localhost/v1/", model="m")
    assert (options.max_items, options.seed, options.temperature, options.max_retries) == (100, 42, 0.1, 5)
    assert options.base_url == "http://localhost/v1"
    assert options.both_orders is False


def test_both_orders_ask_twice_and_cancel_a_judge_that_looks_at_the_place_alone(server, storage):
    server.behave = lambda question, attempt: completion("A")
    found = judged(server, storage, both_orders=True)
    assert (found.wins, found.losses, found.first) == (8, 8, 16)
    assert found.metrics()["judge_win_rate"] == 50
    assert found.metrics()["judge_first_rate"] == 100


def test_items_and_orders_are_drawn_by_the_seed_alone():
    texts = [str(number) for number in range(50)]

    def drawn(seed, other="x"):
        options = JudgeOptions(base_url="http://localhost/v1", model="m", max_items=20, seed=seed)
        return [(one.item, one.swapped) for one in plan_comparisons(options, texts, texts, [other] * 50)]

    assert drawn(1) == drawn(1, "y")
    assert [item for item, _ in drawn(1)] == sorted({item for item, _ in drawn(1)})
    assert len(drawn(1)) == 20
    assert drawn(1) != drawn(2)


def test_a_server_that_recovers_is_asked_again(server, storage):
    failures = {
        1: (500, "no"),
        2: (429, "slow down"),
        3: (200, "{}"),
        4: completion("well, hard to say"),
        5: (200, "<"),
    }
    server.behave = lambda question, attempt: failures.get(attempt) or completion(longer(question))
    found = judged(server, storage)
    assert (found.wins, found.losses, found.ties, found.unparsable) == (5, 2, 1, 0)
    assert set(server.asked.values()) == {6}


def test_replies_without_a_verdict_are_counted_apart_and_asked_anew_next_time(server, storage):
    server.behave = lambda question, attempt: completion("maybe" if "Question 0?" in question else longer(question))
    found = judged(server, storage, max_retries=2)
    assert (found.wins, found.losses, found.ties, found.unparsable) == (4, 2, 1, 1)
    assert sorted(server.asked.values()) == [1] * 7 + [3]
    server.behave = lambda question, attempt: completion(longer(question))
    assert judged(server, storage).wins == 5
    assert sorted(server.asked.values()) == [1] * 7 + [4]


def test_a_question_that_the_server_refuses_is_not_repeated(server, storage):
    refused = (400, "too long")
    server.behave = lambda question, attempt: refused if "Question 0?" in question else completion(longer(question))
    assert judged(server, storage).unparsable == 1
    assert set(server.asked.values()) == {1}


def test_no_verdict_at_all_is_an_error_that_shows_a_reply(server, storage):
    server.behave = lambda question, attempt: completion("As a language model")
    with pytest.raises(ModelError, match="none of 8 replies is A, B or Tied; one was 'As a language model'"):
        judged(server, storage, max_retries=0)


def test_a_dead_server_ends_it_and_what_was_judged_is_not_asked_again(server, storage):
    server.behave = lambda question, attempt: (
        (503, "overloaded") if "Question 6?" in question else completion(longer(question))
    )
    with pytest.raises(ModelError, match=r"no answer in 3 tries: HTTP 503 overloaded.*start again"):
        judged(server, storage, max_retries=2, max_concurrent=1)
    assert sum(server.asked.values()) == 6 + 3
    server.behave = lambda question, attempt: completion(longer(question))
    found = judged(server, storage)
    assert (found.wins, found.losses, found.ties) == (5, 2, 1)
    assert sum(server.asked.values()) == 6 + 3 + 2
    assert judged(server, storage) == found
    assert sum(server.asked.values()) == 6 + 3 + 2


def test_other_answers_or_another_judge_are_asked_afresh(server, storage):
    judged(server, storage)
    judged(server, storage, temperature=0.5)
    assert set(server.asked.values()) == {2}
    compare(server.options(), PROMPTS, ["new"] * 8, OPPONENTS, storage, "judge.jsonl")
    assert sum(server.asked.values()) == 24


def test_a_silent_server_is_a_timeout(server, storage):
    server.behave = lambda question, attempt: (time.sleep(0.3), completion("A"))[1]
    with pytest.raises(ModelError, match=r"no answer in 2 tries: nothing within 0.05 s"):
        judged(server, storage, timeout_s=0.05, max_retries=1, max_items=1)


def test_nobody_at_the_address_is_said(storage):
    options = JudgeOptions(base_url="http://127.0.0.1:1/v1", model="m", max_retries=1, **QUICK)
    with pytest.raises(ModelError, match=r"judge m at http://127.0.0.1:1/v1: no answer in 2 tries: .*refused"):
        compare(options, ["p"], ["a"], ["b"], storage, "judge.jsonl")


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_one_error_at_once_and_names_the_variable_not_the_key(server, storage, monkeypatch, status):
    monkeypatch.setenv("OUR_KEY", "secret-1")
    server.behave = lambda question, attempt: (status, "invalid key")
    with pytest.raises(ConfigError, match=f"HTTP {status} invalid key. It does not take the key in OUR_KEY") as caught:
        judged(server, storage, api_key_env="OUR_KEY", max_concurrent=1)
    assert "secret-1" not in str(caught.value)
    assert sum(server.asked.values()) == 1
    assert not storage.exists("judge.jsonl")


def test_a_wrong_path_or_model_is_one_error(server, storage):
    server.behave = lambda question, attempt: (404, "not found")
    with pytest.raises(ConfigError, match=r"HTTP 404 not found. judge.base_url must be"):
        judged(server, storage)


def test_a_missing_key_is_said_before_anything_is_asked(server, storage, monkeypatch):
    monkeypatch.delenv("OUR_KEY", raising=False)
    with pytest.raises(ConfigError, match="OUR_KEY: this environment variable is not set"):
        judged(server, storage, api_key_env="OUR_KEY")
    assert not server.asked


def test_no_more_questions_are_open_than_allowed(server, storage):
    def slowly(question, attempt):
        end = time.monotonic() + 60
        while server.most_open < 2 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        return completion(longer(question))

    server.behave = slowly
    judged(server, storage, max_concurrent=3)
    assert 2 <= server.most_open <= 3


def test_a_request_to_wait_is_heeded(server, storage, monkeypatch):
    waited = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waited.append(timeout) or False)
    monkeypatch.setattr("tenfold.platform.evaluation.judge_client._asked_to_wait", lambda response: 7.0)
    options = server.options(retry_delay_s=2.0, max_retries=3)
    from tenfold.platform.evaluation.judge import _Asking

    replies = iter([(503, ""), (200, "{}"), (200, "{}"), completion("B")])
    server.behave = lambda question, attempt: next(replies)
    (planned,) = plan_comparisons(options, ["p"], ["a"], ["b"])
    line = _Asking(options, storage, "judge.jsonl", {})._ask(planned)
    assert (line["verdict"], line["tries"]) == ("B", 4)
    assert [pause for pause in waited if pause in (2.0, 4.0, 7.0, 8.0)] == [7.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tied**", "Tied"),
        ("tie", "Tied"),
        ("[[B]]", "B"),
        ("A is long, B is right.\n\nVerdict: **B**", "B"),
        ("Final answer: A", "A"),
        ("<think>A or B? A\n</think>\n\nB", "B"),
        ("", None),
        ("Both are good", None),
        ("A or B", None),
        ("Answer", None),
        ("a\nno", None),
    ],
)
def test_the_verdict_is_the_last_line_alone(text, verdict):
    assert parse_verdict(text) == verdict


def test_an_outcome_belongs_to_the_side_that_is_counted():
    assert [outcome(v, False) for v in ("A", "B", "Tied", None)] == ["win", "loss", "tie", "unparsable"]
    assert [outcome(v, True) for v in ("A", "B", "Tied", None)] == ["loss", "win", "tie", "unparsable"]


def test_rates_without_decisions_are_even():
    assert Judgement(0, 0, 3, 0, 0).metrics("")["win_rate"] == 50
    assert Judgement(0, 0, 3, 0, 0).metrics("")["first_rate"] == 50


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "https://user:key@host/v1"},
        {"base_url": "https://host/v1?key=abc"},
        {"base_url": "ftp://host/v1"},
        {"api_key_env": "sk-abc123"},
        {"api_key": "x"},
        {"max_items": 0},
    ],
)
def test_keys_and_odd_addresses_are_refused_in_the_options(wrong):
    with pytest.raises(ValidationError):
        JudgeOptions(**{"base_url": "http://localhost/v1", "model": "m"} | wrong)


def test_sides_of_unequal_length_are_refused(storage):
    with pytest.raises(ValueError, match="needs equally many"):
        compare(JudgeOptions(base_url="http://localhost/v1", model="m"), ["p"], ["a"], [], storage, "f")
