"""The engine on a real tiny model: same tokens as generate(), batched, reproducible by seed, cancellable, watched."""

import asyncio
import threading
from contextlib import aclosing

import pytest
import torch
from tenfold.serve.admission import Busy
from tenfold.serve.engine import Engine, EngineError
from tenfold.serve.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
EOS = 2


@pytest.fixture
def make_engine(tiny_llama):
    engines = []

    def make(**options):
        model = tiny_llama().eval()
        model.generation_config.eos_token_id = EOS
        options = {"eos_token_ids": [EOS], "max_context": 256, "max_running": 8} | options
        engine = Engine(model, **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


async def collect(engine, prompt, sampling=GREEDY, *, count=24):
    return [token async for token in engine.generate(prompt, sampling, max_new_tokens=count)]


def ids(tokens):
    return [token.token_id for token in tokens]


def prompts(number):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 320, (4 + 7 * i,), generator=generator).tolist() for i in range(number)]


def test_greedy_tokens_are_those_of_generate_alone_and_in_a_batch(make_engine, tiny_llama):
    reference = tiny_llama().eval()
    expected = []
    for prompt in prompts(6):
        out = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=EOS)
        expected.append(out[0, len(prompt) :].tolist())
    engine = make_engine()

    async def scenario():
        alone = [ids(await collect(engine, prompt)) for prompt in prompts(6)]
        together = await asyncio.gather(*(collect(engine, prompt) for prompt in prompts(6)))
        return alone, [ids(tokens) for tokens in together]

    alone, together = asyncio.run(scenario())
    assert alone == expected
    assert together == expected


def test_requests_at_once_share_forward_passes(make_engine):
    engine = make_engine(eos_token_ids=[])

    async def scenario():
        await asyncio.gather(*(collect(engine, prompt, count=100) for prompt in prompts(8)))

    asyncio.run(scenario())
    assert engine.statistics.tokens == 8 * 100
    assert engine.statistics.largest_batch == 8
    assert engine.statistics.steps < 2 * 100


def test_a_seed_gives_the_same_tokens_alone_and_among_others(make_engine):
    engine = make_engine(eos_token_ids=[])
    prompt = prompts(1)[0]
    sampling = Sampling(temperature=1.3, top_p=0.95, seed=11)

    async def scenario():
        alone = await collect(engine, prompt, sampling)
        others = [collect(engine, other, Sampling(seed=i)) for i, other in enumerate(prompts(6))]
        _, among = await asyncio.gather(asyncio.gather(*others), collect(engine, prompt, sampling))
        other_seed = await collect(engine, prompt, Sampling(temperature=1.3, top_p=0.95, seed=12))
        return ids(alone), ids(among), ids(other_seed)

    alone, among, other_seed = asyncio.run(scenario())
    assert among == alone
    assert other_seed != alone


def test_each_request_has_its_own_temperature(make_engine):
    engine = make_engine(eos_token_ids=[])
    prompt = prompts(1)[0]

    async def scenario():
        return await asyncio.gather(
            collect(engine, prompt),
            collect(engine, prompt, Sampling(temperature=1e-4, seed=1)),
            collect(engine, prompt, Sampling(temperature=2.0, seed=1)),
        )

    greedy, cold, hot = (ids(tokens) for tokens in asyncio.run(scenario()))
    assert cold == greedy
    assert hot != greedy


def test_a_long_prompt_is_read_in_several_passes(make_engine, tiny_llama):
    prompt = prompts(30)[29]
    expected = (
        tiny_llama().eval().generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=EOS)
    )
    engine = make_engine(max_batch_tokens=16)
    assert len(prompt) > 10 * 16
    assert ids(asyncio.run(collect(engine, prompt, count=8))) == expected[0, len(prompt) :].tolist()


def test_the_last_token_says_why_it_is_the_last(make_engine):
    prompt = prompts(1)[0]
    limited = asyncio.run(collect(make_engine(eos_token_ids=[]), prompt, count=5))
    assert [token.finish_reason for token in limited] == [None] * 4 + ["length"]
    third = limited[2].token_id
    before = ids(limited).index(third)
    ended = asyncio.run(collect(make_engine(eos_token_ids=[third]), prompt, count=5))
    assert ids(ended) == ids(limited)[: before + 1]
    assert ended[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(make_engine, tiny_llama):
    engine = make_engine(eos_token_ids=[])
    prompt = prompts(1)[0]
    sampling = Sampling(temperature=1.5, seed=4, num_top_logprobs=3)
    tokens = asyncio.run(collect(engine, prompt, sampling, count=10))
    whole = torch.tensor([prompt + ids(tokens)])
    with torch.no_grad():
        logprobs = torch.log_softmax(tiny_llama().eval()(whole).logits[0].float(), dim=-1)
    for index, token in enumerate(tokens):
        row = logprobs[len(prompt) - 1 + index]
        assert token.logprob.chosen == pytest.approx(row[token.token_id].item(), abs=1e-4)
        best = row.topk(3)
        assert [found for found, _ in token.logprob.top] == best.indices.tolist()
        assert [value for _, value in token.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_closing_the_iterator_takes_the_request_out_of_the_batch(make_engine):
    engine = make_engine(eos_token_ids=[])

    async def scenario():
        async with aclosing(engine.generate(prompts(1)[0], GREEDY, max_new_tokens=250)) as tokens:
            async for _ in tokens:
                break
        assert engine.admission.num_running == 0
        # A whole answer after it: had the first gone on, it would have added its tokens to the count.
        await collect(engine, prompts(1)[0], count=40)

    asyncio.run(scenario())
    assert engine.statistics.ended_early == 1
    assert engine.statistics.tokens < 40 + 250
    assert engine.statistics.largest_batch == 1


def test_more_requests_than_the_cache_holds_all_get_their_whole_answer(make_engine):
    # 512 bytes a token here: 16 blocks of 32 tokens, each request reserves 7 of them.
    engine = make_engine(eos_token_ids=[], max_context=224, cache_gb=16 * 32 * 512 / 2**30)
    assert engine.admission.num_blocks == 16

    async def scenario():
        return await asyncio.gather(*(collect(engine, prompts(1)[0], Sampling(seed=i), count=200) for i in range(7)))

    answers = asyncio.run(scenario())
    assert [len(tokens) for tokens in answers] == [200] * 7
    assert engine.statistics.largest_batch == 2


def test_a_full_waiting_line_is_busy(make_engine):
    engine = make_engine(eos_token_ids=[], max_running=1, max_waiting=1)

    async def scenario():
        async with engine.admission.place(1):  # as a request that runs
            waiting = asyncio.create_task(collect(engine, prompts(1)[0], count=4))
            while not engine.admission.num_waiting:
                await asyncio.sleep(0)
            with pytest.raises(Busy):
                await collect(engine, prompts(1)[0])
        assert len(await waiting) == 4

    asyncio.run(scenario())


def test_a_request_longer_than_the_context_is_refused(make_engine):
    engine = make_engine(max_context=64)
    with pytest.raises(ValueError, match="4 prompt tokens and 61 new ones; the context holds 64"):
        asyncio.run(collect(engine, prompts(1)[0], count=61))


def test_a_generation_thread_that_dies_fails_its_requests_and_the_health_check(make_engine, monkeypatch):
    engine = make_engine(eos_token_ids=[])
    engine.check()

    def broken(*_, **__):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine._manager.model, "forward", broken)
    with pytest.raises(EngineError, match="no memory left"):
        asyncio.run(asyncio.wait_for(collect(engine, prompts(1)[0]), 120))
    # the request fails at once, the thread ends a moment later
    engine._manager._generation_thread.join(120)
    with pytest.raises(EngineError, match="no memory left"):
        engine.check()
    with pytest.raises(EngineError):
        asyncio.run(asyncio.wait_for(collect(engine, prompts(1)[0]), 120))


def test_stopping_fails_what_still_runs_and_ends_the_thread(make_engine):
    engine = make_engine(eos_token_ids=[])

    async def scenario():
        answer = asyncio.create_task(collect(engine, prompts(1)[0], count=250))
        while not engine.statistics.tokens:
            await asyncio.sleep(0)
        before = threading.active_count()
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineError):
            await asyncio.wait_for(answer, 120)
        return before

    before = asyncio.run(scenario())
    assert threading.active_count() < before
    with pytest.raises(EngineError):
        engine.check()
