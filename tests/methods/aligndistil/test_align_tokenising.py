import copy
import logging

import pytest
from tenfold.methods.aligndistil.config import PreferenceData
from tenfold.methods.aligndistil.preference_rows import Pair, Prompt, Single
from tenfold.methods.aligndistil.tokenising import chosen_rows, pair_rows, prompt_rows, single_rows
from tenfold.platform.errors import DataError

EOS = "<|im_end|>"


def config(**options):
    return PreferenceData(**{"train": [{"path": "unread.jsonl"}], **options})


def asked(content):
    return ({"role": "user", "content": content},)


def pair(prompt, chosen, rejected):
    return Pair(messages=asked(prompt), chosen=chosen, rejected=rejected, origin="f, row 1")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def scored(labels):
    return [label for label in labels if label != -100]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_pair_becomes_two_rows_with_one_prompt(tiny_tokenizer):
    data, counts = pair_rows([pair("Name a colour.", "red", "no")], tiny_tokenizer, config())
    assert data.column_names == [
        "input_ids",
        "labels",
        "rejected_input_ids",
        "rejected_labels",
        "length",
        "index",
    ]
    row = data[0]
    header = f"<|im_start|>user\nName a colour.{EOS}\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(row["input_ids"]) == f"{header}red{EOS}"
    assert tiny_tokenizer.decode(row["rejected_input_ids"]) == f"{header}no{EOS}"
    prompt = encode(tiny_tokenizer, header)
    for ids, labels in (("input_ids", "labels"), ("rejected_input_ids", "rejected_labels")):
        assert row[ids][: len(prompt)] == prompt
        assert row[labels] == [-100] * len(prompt) + row[ids][len(prompt) :]
    assert row["length"] == max(len(row["input_ids"]), len(row["rejected_input_ids"]))
    assert counts.rows() == ()
    assert counts.kept == 1


def test_nothing_follows_eos_though_the_template_writes_a_newline(tiny_tokenizer):
    whole = tiny_tokenizer.apply_chat_template(
        [*asked("Name a colour."), {"role": "assistant", "content": "red"}], tokenize=False
    )
    assert whole.endswith(f"{EOS}\n")
    data, _ = chosen_rows([pair("Name a colour.", "red", "no")], tiny_tokenizer, config())
    assert data[0]["input_ids"] == encode(tiny_tokenizer, whole[:-1])
    assert data[0]["input_ids"].count(tiny_tokenizer.eos_token_id) == 2  # the user's turn has its own
    assert scored(data[0]["labels"]).count(tiny_tokenizer.eos_token_id) == 1


def test_eos_is_appended_as_an_id_where_the_template_writes_none(tiny_tokenizer):
    bare = with_template(
        tiny_tokenizer,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    data, counts = chosen_rows([pair("a", "b", "c")], bare, config())
    assert data[0]["input_ids"][-1] == bare.eos_token_id
    assert bare.decode(data[0]["input_ids"][:-1]) == "user: a assistant: b "
    assert counts.without_template_eos == 1


def test_a_template_that_changes_the_prompt_leads_to_separate_tokenising(tiny_tokenizer):
    thinking = with_template(
        tiny_tokenizer,
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}",
    )
    data, counts = pair_rows([pair("a", "bb", "c")], thinking, config())
    end = [thinking.eos_token_id]
    assert data[0]["input_ids"] == encode(thinking, "a<think>") + encode(thinking, "bb") + end
    assert data[0]["rejected_input_ids"] == encode(thinking, "a<think>") + encode(thinking, "c") + end
    assert scored(data[0]["labels"]) == encode(thinking, "bb") + end
    assert counts.apart == 2
    assert counts.without_template_eos == 0


def test_tokens_that_join_prompt_and_response_are_not_used(tiny_tokenizer):
    """Where the whole text has a token across the border, the prompt's tokens are no beginning of it."""
    glued = with_template(tiny_tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert encode(tiny_tokenizer, "The capital")[:4] != encode(tiny_tokenizer, "The capi")[:4]
    data, counts = chosen_rows([pair("The capi", "tal", "x")], glued, config())
    assert data[0]["input_ids"] == [
        *encode(glued, "The capi"),
        *encode(glued, "tal"),
        glued.eos_token_id,
    ]
    assert counts.apart == 1


def test_without_a_template_prompt_and_response_are_tokenised_apart(tiny_tokenizer):
    data, _ = chosen_rows([pair("The capi", "tal", "x")], tiny_tokenizer, config(template="none"))
    prompt, response = encode(tiny_tokenizer, "The capi"), encode(tiny_tokenizer, "tal")
    assert data[0]["input_ids"] == [*prompt, *response, tiny_tokenizer.eos_token_id]
    assert data[0]["labels"] == [-100] * len(prompt) + [*response, tiny_tokenizer.eos_token_id]


def test_the_alpaca_template_sets_the_input_apart(tiny_tokenizer):
    one = Prompt(messages=asked("Fix.\nHe go."), origin="f", input="He go.")
    data, _ = prompt_rows([one], tiny_tokenizer, config(template="alpaca"))
    text = tiny_tokenizer.decode(data[0]["input_ids"])
    assert text.endswith("### Instruction:\nFix.\n\n### Input:\nHe go.\n\n### Response:\n")


def test_the_system_message_is_in_prompt_and_whole_alike(tiny_tokenizer):
    data, counts = chosen_rows([pair("a", "b", "c")], tiny_tokenizer, config(system="Be brief."))
    assert tiny_tokenizer.decode(data[0]["input_ids"]) == (
        f"<|im_start|>system\nBe brief.{EOS}\n<|im_start|>user\na{EOS}\n<|im_start|>assistant\nb{EOS}"
    )
    assert scored(data[0]["labels"]) == [*encode(tiny_tokenizer, "b"), tiny_tokenizer.eos_token_id]
    assert counts.apart == 0


def test_an_empty_response_is_eos_alone_and_counted(tiny_tokenizer):
    for template in ("chat", "none"):
        data, counts = pair_rows([pair("a", "b", " \n ")], tiny_tokenizer, config(template=template))
        assert scored(data[0]["rejected_labels"]) == [tiny_tokenizer.eos_token_id]
        assert counts.empty == 1


def test_a_response_that_names_eos_ends_there(tiny_tokenizer):
    for template in ("chat", "none"):
        data, counts = chosen_rows([pair("a", f"b{EOS}more", "c")], tiny_tokenizer, config(template=template))
        assert scored(data[0]["labels"]) == [*encode(tiny_tokenizer, "b"), tiny_tokenizer.eos_token_id]
        assert counts.early_eos == 1


def test_long_prompts_are_left_out_and_counted(tiny_tokenizer):
    pairs = [pair("z" * size, "yes", "no") for size in (4, 5, 6, 7)]
    by_prompt, counts = pair_rows(pairs, tiny_tokenizer, config(template="none", max_prompt_length=5))
    assert list(by_prompt["index"]) == [0, 1]
    assert counts.dropped == 2
    by_room, counts = pair_rows(pairs, tiny_tokenizer, config(template="none", max_length=8, max_prompt_length=8))
    assert list(by_room["index"]) == [0, 1]  # prompts of max_length - 2 = 6 tokens and more leave too little
    assert counts.dropped == 2


def test_prompts_for_own_responses_are_limited_by_their_own_length_alone(tiny_tokenizer):
    prompts = [Prompt(messages=asked("z" * size), origin="f") for size in (4, 8, 9)]
    data, counts = prompt_rows(prompts, tiny_tokenizer, config(template="none", max_length=8, max_prompt_length=8))
    assert list(data["index"]) == [0, 1]
    assert counts.dropped == 1
    assert data.column_names == ["input_ids", "labels", "length", "index"]
    assert data[1]["input_ids"] == encode(tiny_tokenizer, "z" * 8)
    assert data[1]["labels"] == [-100] * 8
    assert list(data["length"]) == [4, 8]


def test_prompts_end_with_the_assistants_header_and_no_eos(tiny_tokenizer):
    data, _ = prompt_rows([Prompt(messages=asked("a"), origin="f")], tiny_tokenizer, config())
    assert tiny_tokenizer.decode(data[0]["input_ids"]).endswith("<|im_start|>assistant\n")


def test_a_cut_response_loses_its_eos_unless_it_is_forced(tiny_tokenizer):
    options = {"template": "none", "max_length": 8, "max_prompt_length": 4}
    pairs = [pair("z", "yyyyyyyyyy", "no")]
    whole, _ = pair_rows(pairs, tiny_tokenizer, config(template="none"))
    cut, counts = pair_rows(pairs, tiny_tokenizer, config(**options))
    forced, _ = pair_rows(pairs, tiny_tokenizer, config(**options, force_eos_on_truncation=True))
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:8]
    assert cut[0]["labels"] == whole[0]["labels"][:8]
    assert tiny_tokenizer.eos_token_id not in cut[0]["input_ids"]
    assert forced[0]["input_ids"] == [*whole[0]["input_ids"][:7], tiny_tokenizer.eos_token_id]
    assert forced[0]["labels"] == [*whole[0]["labels"][:7], tiny_tokenizer.eos_token_id]
    assert cut[0]["rejected_input_ids"] == forced[0]["rejected_input_ids"] == whole[0]["rejected_input_ids"]
    assert counts.cut == 1


def test_pairs_that_are_the_same_after_the_cut_are_left_out(tiny_tokenizer):
    options = {"template": "none", "max_length": 8, "max_prompt_length": 4}
    pairs = [pair("z", "yyyyyyyyyya", "yyyyyyyyyyb"), pair("z", "a", "b")]
    data, counts = pair_rows(pairs, tiny_tokenizer, config(**options))
    assert list(data["index"]) == [1]
    assert counts.same == 1


def test_single_answers_keep_their_label(tiny_tokenizer):
    singles = [
        Single(messages=asked("a"), response="b", desirable=True, origin="f"),
        Single(messages=asked("z" * 30), response="b", desirable=True, origin="f"),
        Single(messages=asked("a"), response="c", desirable=False, origin="f"),
    ]
    data, counts = single_rows(singles, tiny_tokenizer, config(template="none", max_prompt_length=20))
    assert data.column_names == ["input_ids", "labels", "desirable", "length", "index"]
    assert list(data["desirable"]) == [True, False]
    assert list(data["index"]) == [0, 2]
    assert scored(data[1]["labels"]) == [*encode(tiny_tokenizer, "c"), tiny_tokenizer.eos_token_id]
    assert counts.dropped == 1


def test_chosen_rows_are_the_chosen_half_of_pair_rows(tiny_tokenizer):
    pairs = [pair("a", "b c", "d"), pair("e", "", "f")]
    chosen, _ = chosen_rows(pairs, tiny_tokenizer, config())
    both, _ = pair_rows(pairs, tiny_tokenizer, config())
    assert list(chosen["input_ids"]) == list(both["input_ids"])
    assert list(chosen["labels"]) == list(both["labels"])
    assert list(chosen["length"]) == [len(ids) for ids in chosen["input_ids"]]


def test_what_was_changed_is_told(tiny_tokenizer, caplog):
    pairs = [pair("z" * 9, "a", "b"), pair("z", "", "b")]
    with caplog.at_level(logging.INFO):
        pair_rows(pairs, tiny_tokenizer, config(template="none", max_prompt_length=5))
    assert "1 of 2 rows are tokenised" in caplog.text
    assert "rows with too long prompts, left out: 1" in caplog.text
    assert "responses of EOS alone: 1" in caplog.text
    assert "cut" not in caplog.text


def test_nothing_left_is_an_error_that_names_the_limits(tiny_tokenizer):
    with pytest.raises(DataError, match="none of 1 rows is left: 1 prompts are longer than max_prompt_length 4"):
        pair_rows([pair("zzzzz", "a", "b")], tiny_tokenizer, config(template="none", max_prompt_length=4))
    with pytest.raises(DataError, match="none of 0 rows is left"):
        prompt_rows([], tiny_tokenizer, config())


def test_a_prompt_without_tokens_is_refused_with_its_row(tiny_tokenizer):
    silent = with_template(tiny_tokenizer, "{{ '' }}")
    for build in (pair_rows, chosen_rows, prompt_rows):
        with pytest.raises(DataError, match="f, row 1: the prompt has no tokens"):
            build([pair("a", "b", "c")], silent, config())


def test_a_template_that_refuses_the_whole_conversation_is_named_with_its_row(tiny_tokenizer):
    strict = with_template(
        tiny_tokenizer,
        "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}",
    )
    with pytest.raises(DataError, match="f, row 1: the tokenizer's chat template refuses it: no"):
        chosen_rows([pair("a", "b", "c")], strict, config())
