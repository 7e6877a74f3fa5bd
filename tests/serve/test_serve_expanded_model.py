"""An expanded model behind the engine: every request keeps the routes that its own prompt chose."""

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing

import pytest
import torch
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.modeling import blocks_of
from tenfold.platform.errors import ModelError
from tenfold.platform.models.saving import save_model
from tenfold.serve.engine import Engine, EngineError
from tenfold.serve.sampling import Sampling
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

GREEDY = Sampling(temperature=0.0)
EOS = 2
CLASSIFIED = [0, 2]
NEW_TOKENS = 20
# Class of each prompt in the first classifier layer, and in the second.
WANTED = {0: [0, 1, 1, 0, 1, 0, 0, 1], 2: [1, 1, 0, 0, 0, 1, 1, 0]}

# What `tenfold serve` does before it starts Ray, then what a replica does; neither has heard of the method before.
NEW_PROCESS = """
import asyncio, json, sys
from tenfold.serve.config import parse_config
from tenfold.serve.generation import load_language_model
from tenfold.serve.launch import _with_fixed_places
from tenfold.serve.sampling import Sampling

folder, count, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
config = _with_fixed_places(parse_config({"models": [{"name": "expanded", "model": folder}]}))
engine = load_language_model(config.models[0], config.limits, device="cpu").engine

async def answer(prompt):
    tokens = engine.generate(prompt, Sampling(temperature=0.0), max_new_tokens=count)
    return [token.token_id async for token in tokens]

async def answers():
    return await asyncio.gather(*(answer(prompt) for prompt in prompts))

engine.start()
try:
    print(json.dumps(asyncio.run(answers())))
finally:
    engine.stop()
"""


def prompts():
    """Return eight prompts; two begin like the third, with more than a block of the cache in common."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(3, 320, (5 + 9 * place,), generator=generator).tolist() for place in range(6)]
    made[2] = torch.randint(3, 320, (80,), generator=generator).tolist()
    return [*made, [*made[2][:70], 9, 8, 7, 6], [*made[2][:40], *made[1]]]


def point_classifier(model, layer):
    """Give a layer's classifier weights that sort the mean states of `prompts` as `WANTED` says, by a wide margin."""
    block, means = blocks_of(model)[layer], []
    hook = block.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0][0].mean(dim=0)))
    for prompt in prompts():
        model(torch.tensor([prompt]))
    hook.remove()
    sides = 2.0 * torch.tensor(WANTED[layer]) - 1
    towards_one = torch.linalg.lstsq(torch.stack(means), sides.unsqueeze(-1)).solution[:, 0]
    block.classifier.weight.data = torch.stack([-towards_one, towards_one])


@pytest.fixture(scope="module")
def expanded(tiny_llama):
    """Return expanded(pool) -> a model whose new experts do something else than the old ones; no pool: no classifiers.

    Each is made once.
    """
    made = {}

    @torch.no_grad()
    def make(pool="sequence"):
        if pool not in made:
            model = expand(tiny_llama(layers=3), [2, 0, 3], languages=["el"], old_languages=["en"], seed=1).eval()
            generator = torch.Generator().manual_seed(2)
            for name, parameter in model.named_parameters():
                if ".groups." in name or ".router." in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if pool is not None:
                attach_classifiers(model, CLASSIFIED, pool=pool, seed=3)
                for layer in CLASSIFIED:
                    point_classifier(model, layer)
            made[pool] = model.eval()
        return made[pool]

    return make


@pytest.fixture(scope="module")
def alone(expanded):
    """Return alone(pool) -> what generate() answers to each of `prompts`, one at a time."""
    made = {}

    def answer(model, prompt):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
        return out[0, len(prompt) :].tolist()

    def answers(pool="sequence"):
        if pool not in made:
            made[pool] = [answer(expanded(pool), prompt) for prompt in prompts()]
        return made[pool]

    return answers


@pytest.fixture
def make_engine():
    engines = []

    def make(model, **options):
        engine = Engine(model, **{"eos_token_ids": [], "max_context": 256, "max_running": 8} | options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


async def collect(engine, prompt, count=NEW_TOKENS):
    return [token.token_id async for token in engine.generate(prompt, GREEDY, max_new_tokens=count)]


async def one_after_another(engine):
    """Ask for all answers; each prompt but the first arrives three tokens of the batch after the one before it."""
    answers = []
    for prompt in prompts():
        before = engine.statistics.tokens
        answers.append(asyncio.create_task(collect(engine, prompt)))
        while engine.statistics.tokens < before + 3 and not answers[-1].done():
            await asyncio.sleep(0.001)
    return await asyncio.gather(*answers)


async def at_once(engine):
    return await asyncio.gather(*(collect(engine, prompt) for prompt in prompts()))


@torch.no_grad()
def classified_at_each_step(model, prompt):
    """Answer as the official code does: each pass decides from its own tokens."""
    cache, row, answer = DynamicCache(config=model.config), torch.tensor([prompt]), []
    for _ in range(NEW_TOKENS):
        row = model(row, cache=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
        answer.append(row.item())
        cache.route_memory.layers.clear()
    return answer


def test_the_prompts_are_of_both_classes_and_their_answers_depend_on_keeping_them(expanded, alone):
    model = expanded()
    for layer in CLASSIFIED:
        for prompt, wanted in zip(prompts(), WANTED[layer], strict=True):
            cache = DynamicCache(config=model.config)
            model(torch.tensor([prompt]), cache=cache, use_cache=True)
            assert cache.route_memory.layers[layer][0].tolist() == [wanted]
    other = [classified_at_each_step(model, prompt) for prompt in prompts()]
    assert sum(one != kept for one, kept in zip(other, alone(), strict=True)) >= 6


@pytest.mark.parametrize("max_batch_tokens", [512, 16])
@pytest.mark.parametrize("pool", ["sequence", "prefix", None])
def test_answers_in_a_batch_are_those_of_generate_alone(expanded, alone, make_engine, pool, max_batch_tokens):
    engine = make_engine(expanded(pool), max_batch_tokens=max_batch_tokens)
    assert asyncio.run(one_after_another(engine)) == alone(pool)
    assert engine.statistics.largest_batch > 2
    assert asyncio.run(at_once(engine)) == alone(pool)


def test_requests_that_came_and_went_leave_nothing_behind(expanded, alone, make_engine):
    engine = make_engine(expanded(), max_context=160, cache_gb=10 * 32 * 768 / 2**30)
    assert engine.admission.num_blocks == 10  # all of them have been used when the third request comes

    async def scenario():
        for prompt in prompts():
            async with aclosing(engine.generate(prompt, GREEDY, max_new_tokens=60)) as tokens:
                async for _ in tokens:
                    break
        return await at_once(engine)

    assert asyncio.run(scenario()) == alone()
    assert engine.statistics.ended_early == 8
    memories = engine._manager.batch_processor.cache.route_memories
    assert len(memories) <= 8  # those of the last pass at most


def test_an_engine_that_was_stopped_begins_anew(expanded, alone, make_engine):
    model = expanded()
    for _ in range(2):
        engine = make_engine(model)
        for _ in range(2):
            engine.start()
            assert asyncio.run(at_once(engine)) == alone()
            engine.stop()


def test_requests_that_lose_their_blocks_and_begin_again_keep_their_class(expanded, alone, monkeypatch):
    restarted = []
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: restarted.append(len(state.generated_tokens)) or again(state),
    )
    config = ContinuousBatchingConfig(page_size=8, num_blocks=24, max_batch_tokens=128, auto_switch_to_flash=False)
    asked = prompts()
    for max_batch_tokens in (128, 16):
        config.max_batch_tokens = max_batch_tokens
        outputs = expanded().generate_batch(
            asked,
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW_TOKENS),
            continuous_batching_config=config,
        )
        answers = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        assert [answers[tuple(prompt)] for prompt in asked] == alone()
    assert max(restarted) > 0


@pytest.mark.slow
def test_a_saved_folder_is_served_by_processes_that_have_not_imported_the_method(
    expanded, alone, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "model"
    save_model(expanded(), tiny_tokenizer, folder, flavor="moe-causal-lm", method="layermoe", name="expanded")
    command = [sys.executable, "-c", NEW_PROCESS, str(folder), str(NEW_TOKENS), json.dumps(prompts())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = [tokens.index(EOS) + 1 if EOS in tokens else NEW_TOKENS for tokens in alone()]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        tokens[:end] for tokens, end in zip(alone(), ends, strict=True)
    ]


@pytest.mark.parametrize("max_batch_tokens", [128, 16])
def test_several_answers_to_one_prompt_share_its_class(expanded, alone, max_batch_tokens):
    config = ContinuousBatchingConfig(
        page_size=8, num_blocks=200, max_batch_tokens=max_batch_tokens, auto_switch_to_flash=False
    )
    options = GenerationConfig(
        do_sample=True, top_k=1, eos_token_id=-1, max_new_tokens=NEW_TOKENS, num_return_sequences=2
    )
    outputs = expanded().generate_batch(prompts(), options, continuous_batching_config=config)
    assert [output.generated_tokens for output in outputs.values()] == [answer for answer in alone() for _ in range(2)]


def test_blocks_are_shared_where_no_classifier_looks_at_the_prompt(expanded, make_engine):
    sharing = {pool: make_engine(expanded(pool)) for pool in ("sequence", None)}
    for engine in sharing.values():
        asyncio.run(collect(engine, prompts()[0], 1))
    shared = {pool: engine._manager.batch_processor.cache.use_prefix_sharing for pool, engine in sharing.items()}
    assert shared == {"sequence": False, None: True}


def test_two_engines_on_one_model_are_refused_aloud(expanded, make_engine):
    first = make_engine(expanded())
    make_engine(expanded())
    with pytest.raises(EngineError, match="two managers of continuous batching"):
        asyncio.run(asyncio.wait_for(collect(first, prompts()[0]), 120))


def test_eager_attention_is_refused(expanded):
    model = expanded()
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ModelError, match="attn_implementation = sdpa"):
            Engine(model, eos_token_ids=[], max_context=64)
    finally:
        model.set_attn_implementation("sdpa")
