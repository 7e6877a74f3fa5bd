import json

import pytest
from tenfold.methods.aligndistil import make_sample
from tenfold.methods.aligndistil.config import PreferenceData
from tenfold.methods.aligndistil.make_sample import sampled_pairs
from tenfold.methods.aligndistil.preferences import load_pairs
from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import to_example
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource

STORIES = ModelSource(model="sample:models/stories260K")
PLAIN = DataConfig(train=[{"path": "unread.jsonl"}], template="none")


@pytest.fixture(scope="module")
def writer():
    return load_causal_lm(STORIES, seed=0, dtype="float32"), load_tokenizer(STORIES)


def pairs(writer, *answers, seed=0):
    examples = [
        to_example({"instruction": "Once upon", "input": "a time", "output": answer}, "f, row 1") for answer in answers
    ]
    return list(sampled_pairs(examples, *writer, PLAIN, seed=seed, max_new_tokens=8))


def test_the_given_answer_is_chosen_and_the_models_own_is_rejected(writer):
    (row,) = pairs(writer, " the end ")
    assert {name: row[name] for name in ("instruction", "input", "chosen")} == {
        "instruction": "Once upon",
        "input": "a time",
        "chosen": "the end",
    }
    assert row["rejected"]
    assert row["rejected"] == row["rejected"].strip()


def test_the_seed_decides_what_is_sampled(writer):
    assert pairs(writer, "a") == pairs(writer, "a")
    assert pairs(writer, "a") != pairs(writer, "a", seed=1)


def test_instructions_that_the_model_answers_as_given_are_left_out(writer):
    (row,) = pairs(writer, "a")
    assert pairs(writer, row["rejected"]) == []


def test_the_sample_does_not_depend_on_how_the_work_is_cut(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample, "WRITER", STORIES.model)
    monkeypatch.setattr(make_sample, "TEMPLATE", "none")
    monkeypatch.setattr(make_sample, "BLOCK", 2)

    def make(name, *pieces):
        for start, stop in pieces:
            arguments = [str(tmp_path / name), "--start", start, "--stop", stop, "--max-new-tokens", "4"]
            monkeypatch.setattr("sys.argv", ["make_sample", *map(str, arguments)])
            make_sample.main()
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert make("whole", (0, 6)) == make("pieces", (0, 2), (2, 6))
    with pytest.raises(SystemExit):
        make("odd", (1, 3))


def test_the_packaged_pairs_can_be_read():
    found = load_pairs(PreferenceData(train=[{"path": "sample:preference/short_pairs.jsonl"}])).found
    assert found.train + found.validation >= 500
    assert (found.same, found.skipped, found.empty) == (0, 0, 0)
