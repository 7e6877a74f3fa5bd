"""Many clients on one model: tenfold's server against answering one request at a time.

Every server is a Ray Serve application with one replica on one core, asked over HTTP by clients that stream greedy
completions of the same length and send the next one as soon as one is finished. Compared are

* batched: tenfold's server as it is;
* one at a time: the same with max_running = 1;
* generate: what one writes first, transformers' generate() with its streamer behind FastAPI, one request at a time.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from reporting import Report, Target, argument_parser, median

PROMPTS = (
    "Once upon a time",
    "One day",
    "The cat",
    "Lily had a",
    "Tim saw a ball",
    "A big dog",
    "The sun",
    "Mom said",
)
CLIENTS = (1, 8)


@dataclass
class Load:
    """What the clients of one measurement saw; seconds."""

    first_token: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    seconds: float = 0.0


def generate_application(reference: str) -> Any:
    """Return a Serve application that answers one request at a time with generate()."""
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse
    from ray import serve

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
    @serve.ingress(app)
    class Generate:
        def __init__(self) -> None:
            import torch
            from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
            from tenfold.platform.models.source import ModelSource

            torch.set_num_threads(1)
            source = ModelSource(model=reference)
            self.tokenizer, self.model = load_tokenizer(source), load_causal_lm(source)
            self.turn = asyncio.Lock()

        @app.get("/healthz")
        async def healthz(self) -> str:
            return "ok"

        @app.post("/v1/completions")
        async def completions(self, request: Request) -> StreamingResponse:
            body = await request.json()
            return StreamingResponse(self.events(body["prompt"], body["max_tokens"]), media_type="text/event-stream")

        async def events(self, prompt: str, max_tokens: int) -> AsyncIterator[str]:
            from transformers import AsyncTextIteratorStreamer

            async with self.turn:
                streamer = AsyncTextIteratorStreamer(self.tokenizer, skip_prompt=True)
                encoded = self.tokenizer(prompt, return_tensors="pt")
                options = {"max_new_tokens": max_tokens, "do_sample": False, "streamer": streamer}
                work = asyncio.create_task(asyncio.to_thread(self.model.generate, **encoded, **options))
                async for text in streamer:
                    if text:
                        yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
                await work
            yield "data: [DONE]\n\n"

    return Generate.bind()


async def one_request(client: httpx.AsyncClient, body: dict[str, Any], load: Load) -> None:
    """Send a request, read its stream to the end, and note the times."""
    start = time.perf_counter()
    first = None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first is None and line.startswith("data: {"):
                first = time.perf_counter() - start
            if line == "data: [DONE]":
                break
    if first is None:
        raise RuntimeError("an answer without a token")
    load.first_token.append(first)
    load.latency.append(time.perf_counter() - start)


async def measure(url: str, model: str, *, clients: int, requests: int, tokens: int) -> Load:
    """Send `requests` requests from `clients` clients."""
    load = Load()
    remaining = iter(range(requests))

    async def work(client: httpx.AsyncClient) -> None:
        for number in remaining:
            prompt = PROMPTS[number % len(PROMPTS)]
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            await one_request(client, body, load)

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await asyncio.gather(*(one_request(client, _short(model), Load()) for _ in range(clients)))
        start = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        load.seconds = time.perf_counter() - start
    return load


def _short(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0, "stream": True}


def row_of(server: str, clients: int, load: Load) -> dict[str, Any]:
    """Return a row of the table."""
    ordered = sorted(load.first_token)
    return {
        "server": server,
        "clients": clients,
        "requests": len(load.latency),
        "requests_per_s": len(load.latency) / load.seconds,
        "first_token_ms": 1e3 * median(ordered),
        "first_token_p95_ms": 1e3 * ordered[int(0.95 * (len(ordered) - 1))],
        "latency_ms": 1e3 * median(load.latency),
    }


def measure_server(server: str, reference: str, port: int, requests: int, tokens: int) -> list[dict[str, Any]]:
    """Start a server, measure it with all numbers of clients, stop it."""
    from ray import serve
    from tenfold.serve.config import parse_config
    from tenfold.serve.launch import run_server, stop_server

    print(f"{server} ...", file=sys.stderr, flush=True)
    if server == "generate":
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        quiet = {"log_level": "WARNING"}
        serve.run(generate_application(reference), name="generate", route_prefix="/", logging_config=quiet)
        url = f"http://127.0.0.1:{port}"
    else:
        limits = {"max_running": 1 if server == "one at a time" else max(CLIENTS)}
        data = {"models": [{"name": "model", "model": reference}], "limits": limits}
        url = run_server(parse_config(data), port=port, blocking=False)
    try:
        return [
            row_of(
                server,
                clients,
                asyncio.run(measure(url, "model", clients=clients, requests=requests, tokens=tokens)),
            )
            for clients in CLIENTS
        ]
    finally:
        if server == "generate":
            serve.shutdown()
        else:
            stop_server()


def targets_of(rows: list[dict[str, Any]]) -> list[Target]:
    """Hold the batched server against the better of the two others."""

    def values(key: str, clients: int) -> dict[str, float]:
        return {row["server"]: row[key] for row in rows if row["clients"] == clients}

    many, first = values("requests_per_s", CLIENTS[-1]), values("first_token_ms", CLIENTS[-1])
    single = values("latency_ms", 1)
    return [
        Target(
            "requests_per_s_8_clients_over_best_one_at_a_time",
            many["batched"] / max(many["one at a time"], many["generate"]),
            2.0,
            at_most=False,
        ),
        Target(
            "first_token_8_clients_over_best_one_at_a_time",
            first["batched"] / min(first["one at a time"], first["generate"]),
            0.25,
        ),
        Target("latency_1_client_over_generate", single["batched"] / single["generate"], 1.5),
    ]


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--model", default="sample:models/stories260K", help="reference of the model")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=96, help="requests a measurement")
    options = parser.parse_args()
    requests = 32 if options.quick else options.requests

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from tenfold.platform import cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    report = Report("serving", {"model": options.model, "tokens": options.tokens, "requests": requests})
    cluster.connect()
    try:
        for server in ("batched", "one at a time", "generate"):
            report.rows += measure_server(server, options.model, port, requests, options.tokens)
    finally:
        cluster.shutdown()
    report.targets = targets_of(report.rows)
    report.show(
        {
            "server": "server",
            "clients": "clients",
            "requests_per_s": "requests/s",
            "first_token_ms": "first token ms",
            "first_token_p95_ms": "p95",
            "latency_ms": "latency ms",
        }
    )
    return report.finish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())
