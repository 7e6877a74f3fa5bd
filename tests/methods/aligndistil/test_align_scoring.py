"""Scores of responses against plain formulas on whole logits, and that pieces and batches change nothing."""

import math

import pytest
import torch
from tenfold.methods.aligndistil import scoring
from tenfold.methods.aligndistil.extrapolation import Contrast, token_loss
from tenfold.platform.experiment import Compute
from tenfold.platform.models.source import ModelSource

COLUMNS = 318  # the models have two outputs more than the tokenizer has entries


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_tokenizer, tiny_llama):
    found = {}
    for number, name in enumerate(("policy", "reference", "dpo", "other")):
        folder = tmp_path_factory.mktemp(name)
        model = tiny_llama(320, seed=number)
        with torch.no_grad():  # far enough from each other to tell them apart
            model.model.embed_tokens.weight.mul_(8)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        found[name] = ModelSource(model=str(folder))
    return found


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(0)
    made = []
    for prompt, response in ((3, 4), (1, 1), (6, 9), (2, 5)):
        ids = torch.randint(3, COLUMNS, (prompt + response,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


class OnePiece:
    """Stands for a run: maps in this process."""

    def __init__(self, workers):
        self.compute = Compute(workers=workers)
        self.seed = 1

    def map(self, function, items, **_):
        return [function(item) for item in items]


def logits(source, row):
    from tenfold.platform.models.loading import load_causal_lm

    first = row["labels"].count(-100)
    with torch.no_grad():
        whole = load_causal_lm(source, dtype="float32")(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    return whole[first - 1 : -1, :COLUMNS], torch.tensor(row["input_ids"][first:])


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_log_probabilities_are_those_of_the_whole_logits(sources, rows, workers):
    found = scoring.log_probabilities(
        OnePiece(workers), sources["policy"], rows, name="x", dtype="float32", num_columns=COLUMNS
    )
    for value, row in zip(found, rows, strict=True):
        whole, targets = logits(sources["policy"], row)
        expected = torch.log_softmax(whole, -1).gather(-1, targets[:, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-4)


def test_divergences_are_those_of_the_whole_logits(sources, rows):
    contrast = Contrast(scale=5.0)
    found = scoring.divergences(
        OnePiece(2), sources, rows, name="x", dtype="float32", num_columns=COLUMNS, contrast=contrast
    )
    for result, row in zip(found, rows, strict=True):
        at = {name: torch.log_softmax(logits(source, row)[0], -1) for name, source in sources.items()}
        targets = logits(sources["policy"], row)[1]
        assert result["tokens"] == len(targets)
        for name in ("reference", "dpo", "other"):
            kl = (at["policy"].exp() * (at["policy"] - at[name])).sum().item()
            assert result["kl"][name] == pytest.approx(kl, rel=1e-4)
        for name, values in at.items():
            assert result["log_prob"][name] == pytest.approx(
                values.gather(-1, targets[:, None]).sum().item(), abs=1e-4
            )
        tvd = 0.5 * (at["dpo"].exp() - at["other"].exp()).abs().sum(-1)
        assert result["tvd"] == pytest.approx(tvd.tolist(), abs=1e-5)
        assert result["alpha"] == pytest.approx((5.0 * tvd + 1e-3).tolist(), abs=1e-4)
        loss = token_loss(at["policy"], at["dpo"], at["other"], contrast)
        ours = [weight * kl for weight, kl in zip(result["weight"], result["kl_teacher"], strict=True)]
        assert ours == pytest.approx(loss.tolist(), rel=1e-3)


def test_a_policy_does_not_differ_from_itself(sources, rows):
    same = {"policy": sources["policy"], "reference": sources["policy"]}
    found = scoring.divergences(OnePiece(1), same, rows, name="x", dtype="float32", num_columns=COLUMNS, contrast=None)
    assert all(result["kl"]["reference"] == pytest.approx(0.0, abs=1e-5) for result in found)
    assert all(math.isfinite(result["log_prob"]["policy"]) for result in found)
