import json
import logging
from pathlib import Path

import pytest
from tenfold.methods.aligndistil.config import AlignDistilConfig, PreferenceData
from tenfold.methods.aligndistil.preferences import data_digest, load_pairs, load_prompts, load_singles
from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import load_examples
from tenfold.platform.errors import DataError

PREFERENCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "preference"


@pytest.fixture
def write(tmp_path):
    def put(rows, name="data.jsonl"):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return put


def config(path, **options):
    return PreferenceData(**{"train": [{"path": path}], **options})


def rows(count, **more):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", **more} for i in range(count)]


def asked(items):
    return [item.messages[-1]["content"] for item in items]


def test_pairs_are_split_by_the_seed_alone(write):
    path = write(rows(20))
    first, again = load_pairs(config(path)), load_pairs(config(path))
    other = load_pairs(config(path, split_seed=1))
    assert first == again
    assert sorted(asked(first.train) + asked(first.validation)) == sorted(f"p{i}" for i in range(20))
    assert len(first.validation) == 2
    assert set(asked(first.validation)) != set(asked(other.validation))
    assert first.digest != other.digest


def test_the_split_is_the_platforms_where_every_prompt_is_different(write):
    path = write([{**row, "output": "x"} for row in rows(20)])
    ours = load_pairs(config(path, validation_ratio=0.25, split_seed=3))
    theirs = load_examples(DataConfig(train=[{"path": path}], validation_ratio=0.25, split_seed=3))
    assert asked(ours.train) == asked(theirs.train)
    assert asked(ours.validation) == asked(theirs.validation)


def test_no_prompt_is_in_both_parts(write):
    same_prompts = [{**row, "prompt": f"p{i % 5}"} for i, row in enumerate(rows(30))]
    splits = load_pairs(config(write(same_prompts), validation_ratio=0.4))
    assert len(splits.train) == 18
    assert len(splits.validation) == 12
    assert not set(asked(splits.train)) & set(asked(splits.validation))


def test_all_kinds_hold_out_the_same_prompts_whatever_pairs_are_left_out(write):
    data = rows(30)
    data[3]["rejected"] = data[3]["chosen"]
    data[7] = data[8]
    data[11].pop("rejected")
    data.insert(4, "{")
    options = config(write(data), validation_ratio=0.3, skip_bad_rows=True)
    pairs, singles, prompts = load_pairs(options), load_singles(options), load_prompts(options)
    held_out = set(asked(prompts.validation))
    assert set(asked(pairs.validation)) <= held_out
    assert set(asked(singles.validation)) == set(asked(pairs.validation))
    assert not set(asked(pairs.train)) & held_out
    assert len(prompts.train) + len(prompts.validation) == 29
    assert (pairs.found.skipped, prompts.found.skipped) == (2, 1)


def test_swapping_exchanges_the_answers_and_nothing_else(write):
    path = write(rows(10))
    plain, swapped = load_pairs(config(path)), load_pairs(config(path, swap_preferences=True))
    assert asked(plain.train) == asked(swapped.train)
    for one, other in zip(plain.train + plain.validation, swapped.train + swapped.validation, strict=True):
        assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
    assert plain.digest != swapped.digest


def test_swapping_makes_good_answers_bad(write):
    singles = [{"prompt": f"p{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(6)]
    path = write([*singles, *rows(4)])
    plain, swapped = load_singles(config(path)), load_singles(config(path, swap_preferences=True))
    label = {one.response: one.desirable for one in plain.train + plain.validation}
    other = {one.response: one.desirable for one in swapped.train + swapped.validation}
    assert label == {
        **{f"a{i}": i % 2 == 0 for i in range(6)},
        **{n + str(i): n == "c" for i in range(4) for n in "cr"},
    }
    assert other == {response: not desirable for response, desirable in label.items()}


def test_a_pair_gives_one_good_and_one_bad_answer(write):
    splits = load_singles(config(write(rows(4)), validation_ratio=0.5))
    assert len(splits.train) == len(splits.validation) == 4
    assert all(one.desirable == one.response.startswith("c") for one in splits.train)
    assert splits.found.kind == "answers"


def test_prompts_come_from_every_kind_of_row_once(write):
    mixed = [
        *rows(3),
        {"prompt": "p0", "completion": "x", "label": True},
        {"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "i", "input": "j", "output": "k"},
        {"prompt": "alone"},
    ]
    splits = load_prompts(config(write(mixed), validation_ratio=0.5))
    assert sorted(asked(splits.train + splits.validation)) == ["alone", "i\nj", "m", "p0", "p1", "p2"]
    assert splits.found.duplicates == 1


def test_what_was_left_out_and_what_looks_odd_is_counted(write, caplog):
    data = [
        *rows(6, score_chosen=2.0, score_rejected=1.0),
        {"prompt": "p0", "chosen": "c0", "rejected": "r0"},  # there before
        {"prompt": "p1", "chosen": "x", "rejected": " x\n"},  # the same but for white space
        {"prompt": "p2", "chosen": " ", "rejected": "r"},
        {"prompt": "p3", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 3},
        {"prompt": "p4", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
    ]
    with caplog.at_level(logging.WARNING):
        found = load_pairs(config(write(data), validation_ratio=0.5)).found
    assert found.train + found.validation == 9
    assert (found.same, found.duplicates, found.empty, found.scored_against, found.skipped) == (1, 1, 1, 1, 0)
    assert ("pairs with equal answers, left out", "1") in found.rows()
    assert ("training pairs", str(found.train)) in found.rows()
    assert not any("bad rows" in label for label, _ in found.rows())
    assert "pairs whose scores prefer the rejected answer: 1" in caplog.text


def test_separate_validation_keeps_its_order_and_shared_prompts_are_told(write, caplog):
    train, held_out = write(rows(10)), write(rows(12)[8:], "held_out.jsonl")
    splits = load_pairs(config(train, validation=[{"path": held_out}]))
    assert asked(splits.validation) == ["p8", "p9", "p10", "p11"]
    assert sorted(asked(splits.train)) == sorted(f"p{i}" for i in range(10))
    assert asked(splits.train) != [f"p{i}" for i in range(10)]
    assert splits.found.shared_prompts == 2
    assert "validation prompts that training has too: 2" in caplog.text


def test_row_limits_keep_the_first_rows_after_the_split(write):
    path = write(rows(20))
    whole = load_pairs(config(path, validation_ratio=0.5))
    short = load_pairs(config(path, validation_ratio=0.5, max_train_rows=3, max_validation_rows=2))
    assert short.train == whole.train[:3]
    assert short.validation == whole.validation[:2]
    assert (short.found.train, short.found.validation) == (3, 2)


def test_all_bad_rows_are_told_at_once_with_file_and_line(write):
    bad = [{"prompt": "p"}, "{", [1], {"prompt": "p", "chosen": "c"}]
    path = write([*rows(10), *bad])
    with pytest.raises(DataError) as error:
        load_pairs(config(path))
    for line in (
        "4 of 14 train rows cannot be used",
        f"{path}, line 11: has no chosen",
        f"{path}, line 12: not JSON",
        f"{path}, line 13: is a list",
        f"{path}, line 14: has no rejected",
        "skip_bad_rows: true",
    ):
        assert line in str(error.value)
    splits = load_pairs(config(path, skip_bad_rows=True))
    assert splits.found.skipped == 4
    assert len(splits.train) + len(splits.validation) == 10


def test_more_than_ten_bad_rows_are_summed_up(write):
    with pytest.raises(DataError, match="line 10: has no rejected") as error:
        load_pairs(config(write([{"prompt": "p", "chosen": "c"}] * 13)))
    assert "and 3 more" in str(error.value)
    assert "line 11" not in str(error.value)


def test_earlier_turns_need_the_chat_template(write):
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    path = write([{"prompt": turns, "chosen": "a", "rejected": "b"}, *rows(9)])
    assert load_pairs(config(path)).found.train == 9
    with pytest.raises(DataError, match="line 1: has earlier turns, which template alpaca cannot show; use chat"):
        load_pairs(config(path, template="alpaca"))


def test_fields_of_a_source_name_its_columns(write):
    data = [{"q": f"p{i}", "better": "b", "worse": "w", "chosen": "unread"} for i in range(4)]
    source = {"path": write(data), "fields": {"prompt": "q", "chosen": "better", "rejected": "worse"}}
    splits = load_pairs(PreferenceData(train=[source], validation_ratio=0.5))
    assert {(pair.chosen, pair.rejected) for pair in splits.train} == {("b", "w")}


def test_the_digest_of_a_run_changes_with_whatever_its_objective_reads(write):
    def digest(data, **options):
        chosen = {"model": {"model": "unread"}, "data": config(write(data)), **options}
        return data_digest(AlignDistilConfig(**chosen))

    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(10)]
    renamed = [{**row, "prompt": "q" + row["prompt"]} for row in rows(10)]
    for options in ({"objective": "dpo"}, {"objective": "kto"}, {"on_policy": {}}):
        same, *others = (digest(data, **options) for data in (rows(10), swapped, renamed))
        assert same == digest(rows(10), **options)
        assert same not in others
    kinds = {digest(rows(10), objective="dpo"), digest(rows(10), objective="kto"), digest(rows(10), on_policy={})}
    assert len(kinds) == 3


def test_splits_without_data_are_refused(write):
    with pytest.raises(DataError, match=r"1 different prompts with validation_ratio 0\.1 leave a split empty"):
        load_pairs(config(write(rows(1))))
    equal = [{"prompt": f"p{i}", "chosen": "x", "rejected": "x"} for i in range(9)]
    with pytest.raises(DataError, match="none of 9 train rows is left, 0 are bad"):
        load_pairs(config(write(equal)))
    with pytest.raises(DataError, match=r"(1 training and 0|0 training and 1) validation pairs are left"):
        load_pairs(config(write([*rows(1), equal[1]]), validation_ratio=0.5))


@pytest.mark.skipif(not PREFERENCE.is_dir(), reason="needs ../shared/data/preference")
@pytest.mark.parametrize(
    ("name", "load", "count", "same", "duplicates"),
    [
        ("short_preference.json", load_pairs, 1094, 6, 0),
        ("dpo_en_demo.json", load_pairs, 295, 0, 5),
        ("kto_en_demo.json", load_singles, 300, 0, 0),
        ("kto_en_demo.json", load_prompts, 297, 0, 3),
    ],
)
def test_public_preference_files_are_read_whole(name, load, count, same, duplicates):
    found = load(config(str(PREFERENCE / name))).found
    assert (found.train + found.validation, found.same, found.duplicates) == (count, same, duplicates)
