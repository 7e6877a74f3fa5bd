"""Generating with expanded models: a classifier decides on the prompt, and its decision goes along with the cache."""

import copy

import pytest
import torch
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.modeling import blocks_of
from tenfold.methods.layermoe.state import RoutingState, collecting, memory_of, routing_by
from tenfold.platform.errors import ModelError
from transformers import DynamicCache

PROMPTS = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(6))
PAD = 0


@pytest.fixture
def model(tiny_llama):
    """An expanded model whose classifiers divide the prompts, and whose experts differ much."""

    def make(pool="sequence", classifiers=(0, 2)):
        made = expand(tiny_llama(96, layers=3), [2, 0, 1], languages=["el"], old_languages=["en"], seed=1)
        attach_classifiers(made, classifiers, pool=pool, seed=4)
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if ".groups." in name or ".router." in name:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
        made.eval()
        balance(made, pool)
        return made

    return make


def balance(model, pool):
    """Move each classifier's scores so that about half of what it sees is of each class."""
    for layer in [layer for layer, block in blocks_of(model).items() if block.classifier is not None]:
        block, seen = blocks_of(model)[layer], []
        hook = block.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            model(PROMPTS)
            hook.remove()
            states = seen[0].mean(1)
            direction = block.classifier.weight[1] - block.classifier.weight[0]
            centre = states.mean(0)
            # the difference of the scores is zero at the centre of the prompts
            direction = direction - (direction @ centre) / (centre @ centre) * centre
            block.classifier.weight[0].zero_()
            block.classifier.weight[1].copy_(direction)


class Fixed(RoutingState):
    """Routes by given classes, whatever the classifier says."""

    given = None

    def classify(self, layer, scores_BTC, pool):
        classes = self.given[layer]
        return classes[:, None].expand(scores_BTC.shape[:2]) if classes.dim() == 1 else classes


def write(model, prompts, mask=None, **options):
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts) if mask is None else mask,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=PAD,
        **options,
    )


def routes(model, ids, mask=None):
    with collecting(model) as state, torch.no_grad():
        model(ids, attention_mask=mask)
    return state.decisions


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_the_prompts_of_these_tests_are_of_both_classes_on_each_layer(model, pool):
    for classes in routes(model(pool), PROMPTS).values():
        assert classes.unique().tolist() == [0, 1]


def test_decoding_is_a_full_forward_by_the_prompts_decisions(model):
    made = model()
    decided = routes(made, PROMPTS)
    cache = DynamicCache(config=made.config)
    texts, steps, ids = PROMPTS, [], PROMPTS
    with torch.no_grad():
        for _ in range(6):
            out = made(ids, cache=cache, use_cache=True)
            steps.append(out.logits[:, -1])
            ids = steps[-1].argmax(-1, keepdim=True)
            texts = torch.cat([texts, ids], 1)
        fixed = Fixed()
        fixed.given = decided
        with routing_by(made, fixed):
            whole = made(texts, use_cache=False).logits
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 8:-1], rtol=0, atol=1e-4)
    assert all(torch.equal(kept[0], decided[layer]) for layer, kept in memory_of(cache).layers.items())


def test_a_token_alone_would_be_decided_otherwise(model):
    """Else the tests around could not tell a decision that is kept from one made anew."""
    made = model()
    decided, again = routes(made, PROMPTS), routes(made, write(made, PROMPTS)[:, -1:])
    assert any(not torch.equal(decided[layer], again[layer]) for layer in decided)


def test_running_means_are_the_same_in_decoding_as_in_one_pass(model):
    made = model("prefix")
    texts = write(made, PROMPTS)
    with collecting(made) as state, torch.no_grad():
        whole = made(texts).logits
    cache, seen = DynamicCache(config=made.config), []
    with torch.no_grad():
        for piece in (texts[:, :5], texts[:, 5:9], *texts[:, 9:].split(1, 1)):
            with collecting(made) as part:
                logits = made(piece, cache=cache, use_cache=True).logits
            seen.append((logits, part.decisions))
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen], 1), whole, rtol=0, atol=1e-4)
    for layer, classes in state.decisions.items():
        assert torch.equal(torch.cat([parts[layer] for _, parts in seen], 1), classes)
        assert (classes[:, 1:] != classes[:, :-1]).any()


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_prompts_of_other_lengths_and_left_padding_write_what_they_write_alone(model, pool):
    made = model(pool)
    lengths = [9, 4, 6, 9, 2, 5]
    mask = torch.zeros_like(PROMPTS)
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
    together = write(made, PROMPTS.masked_fill(mask == 0, PAD), mask)[:, 9:]
    for row, length in enumerate(lengths):
        alone = write(made, PROMPTS[row : row + 1, 9 - length :])[:, length:]
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_beams_of_a_batch_write_what_those_of_each_prompt_write(model, pool):
    made = model(pool)
    together = write(made, PROMPTS, num_beams=3)
    for row in range(len(PROMPTS)):
        assert torch.equal(together[row : row + 1], write(made, PROMPTS[row : row + 1], num_beams=3))


def test_beams_carry_their_running_means_along(model):
    made = model("prefix")
    assert torch.equal(write(made, PROMPTS, num_beams=4), write(made, PROMPTS, num_beams=4, use_cache=False))


def test_several_samples_of_a_prompt_share_its_decision(model):
    made, seen = model(), []
    hook = made.model.register_forward_hook(lambda _, __, out: seen.append(out.cache))
    made.generate(PROMPTS, max_new_tokens=3, do_sample=True, num_return_sequences=2, pad_token_id=PAD)
    hook.remove()
    decided = routes(made, PROMPTS)
    for layer, kept in memory_of(seen[0]).layers.items():
        assert torch.equal(kept[0], decided[layer].repeat_interleave(2))


def test_generate_texts_of_the_platform_writes_the_same_for_any_batch_size(model, tiny_tokenizer):
    from tenfold.platform.models.generation import generate_texts
    from tenfold.platform.models.options import GenerationOptions

    made = model()
    prompts = [row[: 3 + number].tolist() for number, row in enumerate(PROMPTS)]
    texts = [
        generate_texts(
            made,
            tiny_tokenizer,
            prompts,
            GenerationOptions(max_new_tokens=6, do_sample=False, batch_size=size),
            seed=0,
        )
        for size in (1, 4)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_what_is_done_to_the_cache_is_done_to_the_routes(model, pool):
    made = model(pool)
    cache = DynamicCache(config=made.config)
    with torch.no_grad():
        made(PROMPTS, cache=cache, use_cache=True)
        before = copy.deepcopy(memory_of(cache).layers)
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([5, 0, 0, 1, 2, 3]))
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.batch_repeat_interleave(2)
        expected = {layer: [kept[[5, 5, 1, 1]] for kept in parts] for layer, parts in before.items()}
        for layer, parts in memory_of(cache).layers.items():
            assert all(torch.equal(kept, own) for kept, own in zip(parts, expected[layer], strict=True))
        for layer, parts in memory_of(twin).layers.items():
            assert all(torch.equal(kept, own) for kept, own in zip(parts, before[layer], strict=True))
        step = PROMPTS[[5, 1], :1].repeat_interleave(2, 0)
        found = made(step, cache=cache, use_cache=True).logits
        whole = made(PROMPTS[:, :1], cache=twin, use_cache=True).logits
    alone = DynamicCache(config=made.config)
    with torch.no_grad():
        made(PROMPTS[[5, 1]], cache=alone, use_cache=True)
        own = made(PROMPTS[[5, 1], :1], cache=alone, use_cache=True).logits
    torch.testing.assert_close(found, own.repeat_interleave(2, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole[[5, 1]], own, rtol=0, atol=1e-5)


def test_a_cache_that_is_emptied_decides_anew(model):
    made = model()
    cache = DynamicCache(config=made.config)
    with torch.no_grad():
        made(PROMPTS, cache=cache, use_cache=True)
    cache.reset()
    assert memory_of(cache).layers == {}


def test_a_batch_of_another_size_than_the_cache_s_is_refused(model):
    made = model()
    cache = made(PROMPTS, use_cache=True).cache
    with pytest.raises(ModelError, match="routes of 6 sequences, this pass has 2"):
        made(PROMPTS[:2, :1], cache=cache, use_cache=True)


def test_a_cache_that_another_model_filled_is_refused(model, tiny_llama):
    cache = tiny_llama(96, layers=3).eval()(PROMPTS, use_cache=True).cache
    with pytest.raises(ModelError, match="Start with an empty cache"):
        model()(PROMPTS[:, :1], cache=cache, use_cache=True)


def test_running_means_cannot_be_cut_but_decisions_can(model):
    caches = {}
    for pool in ("sequence", "prefix"):
        made = model(pool)
        caches[pool] = made(PROMPTS, use_cache=True).cache
    caches["sequence"].crop(-2)
    assert caches["sequence"].get_seq_length() == 7
    with pytest.raises(ModelError, match="cannot be cut"):
        caches["prefix"].crop(-2)


def test_without_classifiers_caches_are_transformers_own(model):
    cache = model(classifiers=())(PROMPTS, use_cache=True).cache
    assert type(cache) is DynamicCache


def test_no_cache_is_made_where_none_is_wanted(model):
    made = model()
    assert made(PROMPTS, use_cache=False).cache is None
    made.config.use_cache = False
    assert made(PROMPTS).cache is None


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_a_static_cache_writes_the_same(model, pool):
    made = model(pool)
    mask = torch.ones_like(PROMPTS)
    mask[0, :5] = mask[3, :2] = 0
    static = write(made, PROMPTS, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, write(made, PROMPTS, mask))
