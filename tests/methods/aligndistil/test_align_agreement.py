"""Whether models fit together: tokenizers, and frozen models that disagree the right way round."""

import logging

import pytest
import torch
from tenfold.methods.aligndistil.agreement import (
    Disagreement,
    check_vocabularies,
    disagreement,
    log_disagreement,
    warnings_about,
)
from tenfold.methods.aligndistil.collators import PairCollator
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.distillation_module import DistillationModule
from tenfold.platform.errors import ModelError
from tenfold.platform.models.source import ModelSource
from torch.nn.functional import log_softmax

NO = -100


def source(folder):
    return ModelSource(model=str(folder))


@pytest.fixture
def saved(tmp_path, tiny_tokenizer, tiny_llama):
    """Return a function that saves a model with a changed tokenizer."""

    def save(name, vocab=None, **changes):
        folder = tmp_path / name
        tiny_llama(vocab=vocab or len(tiny_tokenizer)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        if changes:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
            for key, value in changes.items():
                setattr(tokenizer, key, value)
            tokenizer.save_pretrained(folder)
        return source(folder)

    return save


def test_models_with_one_tokenizer_agree(saved, caplog):
    check_vocabularies({"policy": saved("a"), "dpo": saved("b")})
    assert not caplog.records


def test_all_models_that_differ_are_named_with_what_differs(saved):
    sources = {
        "policy": saved("a"),
        "dpo": saved("b", vocab=384),
        "reverse": saved("c", eos_token="<|pad|>"),
        "reference": ModelSource(model="sample:models/stories260K"),
    }
    with pytest.raises(ModelError) as error:
        check_vocabularies(sources)
    first, *lines, advice = str(error.value).splitlines()
    assert "one tokenizer and one output size" in first
    assert [line.split()[0] for line in lines] == ["dpo", "reverse", "reference"]
    assert "384 outputs, policy has 320" in lines[0]
    assert "EOS is '<|pad|>', policy has '<|im_end|>'" in lines[1]
    assert "tokens have other ids" in lines[2]
    assert "512 outputs" in lines[2]
    assert "trained from the same one" in advice


def test_another_padding_token_only_gives_a_warning(saved, caplog):
    check_vocabularies({"policy": saved("a"), "dpo": saved("b", pad_token="<|im_start|>")})
    (record,) = caplog.records
    assert "dpo has pad_token '<|im_start|>', policy has '<|pad|>', which is used" in record.getMessage()


@pytest.fixture
def module(tiny_llama):
    def make(dpo, reverse):
        data = {"train": [{"path": "p.jsonl"}]}
        config = AlignDistilConfig.model_validate({"model": {"model": "a"}, "data": data, "loss_chunk_rows": 4})
        return DistillationModule(tiny_llama(), config, {"dpo": dpo, "reverse": reverse}, num_columns=320)

    return make


def pairs():
    draw = torch.Generator().manual_seed(4)
    made = []
    for prompt, chosen, rejected in ((3, 4, 2), (2, 1, 5), (4, 3, 3)):
        ids = [torch.randint(3, 320, (size,), generator=draw).tolist() for size in (prompt, chosen, rejected)]
        row = {}
        for name, answer in (("", ids[1]), ("rejected_", ids[2])):
            row |= {f"{name}input_ids": ids[0] + answer, f"{name}labels": [NO] * prompt + answer}
        made.append(row)
    return made


def test_disagreement_is_that_of_whole_logits_whatever_the_batches(module, tiny_llama):
    dpo, reverse = tiny_llama(seed=1).eval(), tiny_llama(seed=2).eval()
    rows, collate = pairs(), PairCollator(0)
    found = [
        disagreement(module(dpo, reverse), "reverse", batches)
        for batches in ([collate(rows)], [collate([row]) for row in rows])
    ]
    distances, preferred = [], 0
    with torch.no_grad():
        for row in rows:
            margins = {}
            for name in ("", "rejected_"):
                ids, first = torch.tensor([row[f"{name}input_ids"]]), row[f"{name}labels"].count(NO)
                logits = [model(ids).logits[0, first - 1 : -1].double() for model in (dpo, reverse)]
                distances += ((logits[0].softmax(-1) - logits[1].softmax(-1)).abs().sum(-1) / 2).tolist()
                own = [log_softmax(one, -1).gather(1, ids[0, first:, None]).sum().item() for one in logits]
                margins[name] = own[0] - own[1]
            preferred += margins[""] > margins["rejected_"]
    assert 0 < preferred < 3
    for one in found:
        assert one.tvd == pytest.approx(sum(distances) / len(distances), rel=1e-4)
        assert one.preferred == pytest.approx(preferred / 3)
        assert one.pairs == 3


def test_a_model_given_twice_and_exchanged_models_are_told(module, tiny_llama, caplog):
    better = tiny_llama(seed=1).eval()
    batches = [PairCollator(0)(pairs())]
    twice = disagreement(module(better, better), "reverse", batches)
    assert twice.tvd == 0
    assert "nearly the same" in warnings_about(twice, "reverse")[0]
    assert "exchanged" in warnings_about(Disagreement(0.2, 0.4, 10), "reverse")[0]
    assert warnings_about(Disagreement(0.2, 0.6, 10), "reverse") == []
    assert warnings_about(Disagreement(0.0, 0.0, 0), "reverse") == []
    with caplog.at_level(logging.INFO):
        log_disagreement(twice, "reverse")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
