import copy
import logging
from pathlib import Path

import pytest
from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import to_example
from tenfold.platform.data.tokenise import prompt_ids, tokenise, tokenised_dataset
from tenfold.platform.errors import DataError

GPT2 = Path(__file__).resolve().parents[4] / "shared" / "data" / "tokenizers" / "gpt2"


def config(**options):
    return DataConfig(**{"train": [{"path": "unread.jsonl"}], "template": "none", **options})


def example(instruction, output, **more):
    return to_example({"instruction": instruction, "output": output, **more}, "f, row 1")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_and_response_are_tokenised_apart_and_only_the_response_has_labels(tiny_tokenizer):
    row = tokenise(example("The capi", "tal of France"), tiny_tokenizer, config())
    prompt, response = encode(tiny_tokenizer, "The capi"), encode(tiny_tokenizer, "tal of France")
    assert prompt + response != encode(tiny_tokenizer, "The capital of France")
    assert row["input_ids"] == [*prompt, *response, tiny_tokenizer.eos_token_id]
    assert row["labels"] == [-100] * len(prompt) + [*response, tiny_tokenizer.eos_token_id]


def test_with_the_chat_template_the_answer_follows_the_assistants_header(tiny_tokenizer):
    row = tokenise(example("Name a colour.", "red"), tiny_tokenizer, config(template="chat"))
    text = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    assert tiny_tokenizer.decode(row["input_ids"]) == text
    assert tiny_tokenizer.decode([label for label in row["labels"] if label != -100]) == "red<|im_end|>"
    direct = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert row["input_ids"][: len(direct)] == direct


def test_the_first_of_several_references_is_trained_on(tiny_tokenizer):
    assert tokenise(example("a", ["b", "c"]), tiny_tokenizer, config()) == tokenise(
        example("a", "b"), tiny_tokenizer, config()
    )


def test_no_token_is_added_by_a_tokenizer_that_likes_to_begin_with_one(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    greedy = copy.deepcopy(tiny_tokenizer)
    greedy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", greedy.bos_token_id)]
    )
    assert greedy("a")["input_ids"][0] == greedy.bos_token_id
    assert tokenise(example("a", "b"), greedy, config()) == tokenise(example("a", "b"), tiny_tokenizer, config())


def test_a_prompt_keeps_its_first_tokens(tiny_tokenizer):
    short = config(max_length=12, max_prompt_length=5)
    asked = example("Edit the following sentence for grammar.", "ok")
    expected = encode(tiny_tokenizer, "Edit the following sentence for grammar.")[:5]
    assert prompt_ids(asked, tiny_tokenizer, short) == expected
    assert tokenise(asked, tiny_tokenizer, short)["input_ids"][:5] == expected
    assert tokenise(asked, tiny_tokenizer, short)["labels"][:6].count(-100) == 5


def test_a_response_that_is_cut_loses_its_end(tiny_tokenizer):
    asked = example("a", "zzzzzzzzzz")
    whole = tokenise(asked, tiny_tokenizer, config())
    size = len(whole["input_ids"])
    fits = config(max_length=size, max_prompt_length=1)
    short = config(max_length=size - 1, max_prompt_length=1)
    assert tokenise(asked, tiny_tokenizer, fits) == whole
    assert tokenise(asked, tiny_tokenizer, short) == {name: ids[:-1] for name, ids in whole.items()}
    assert tiny_tokenizer.eos_token_id not in tokenise(asked, tiny_tokenizer, short)["input_ids"]


def test_an_empty_response_has_one_label_the_end(tiny_tokenizer):
    row = tokenise(example("abc", ""), tiny_tokenizer, config())
    assert [label for label in row["labels"] if label != -100] == [tiny_tokenizer.eos_token_id]
    assert row["labels"][-1] == tiny_tokenizer.eos_token_id


def test_the_data_set_has_lengths_and_the_place_of_each_example(tiny_tokenizer):
    examples = [example("a b c", "d"), example("a", "e")]
    data = tokenised_dataset(examples, tiny_tokenizer, config())
    assert data.column_names == ["input_ids", "labels", "length", "index"]
    for index, row in enumerate(data):
        assert row["index"] == index
        assert row["length"] == len(row["input_ids"])
        assert {"input_ids": row["input_ids"], "labels": row["labels"]} == tokenise(
            examples[index], tiny_tokenizer, config()
        )


def test_examples_without_a_label_are_dropped_and_counted(tiny_tokenizer, caplog):
    tight = config(max_length=4, max_prompt_length=4)
    examples = [example("zzzzzz", "a"), example("zzz", "b"), example("z", "c"), example("z", "yyyyy")]
    with caplog.at_level(logging.INFO):
        data = tokenised_dataset(examples, tiny_tokenizer, tight)
    assert list(data["index"]) == [1, 2, 3]
    assert "1 of 4 examples are dropped" in caplog.text
    assert "1 prompts are cut to their first 4 tokens" in caplog.text
    assert "2 responses are cut to 4 tokens in all, without EOS" in caplog.text


def test_nothing_left_is_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match="none of 1 examples keeps a response token within max_length 2"):
        tokenised_dataset([example("zzzz", "a")], tiny_tokenizer, config(max_length=2, max_prompt_length=2))
    with pytest.raises(DataError, match="none of 0 examples"):
        tokenised_dataset([], tiny_tokenizer, config())


def test_a_prompt_without_tokens_is_refused_with_its_row(tiny_tokenizer):
    silent = copy.deepcopy(tiny_tokenizer)
    silent.chat_template = "{{ '' }}"
    for build in (prompt_ids, tokenise, lambda one, *rest: tokenised_dataset([one], *rest)):
        with pytest.raises(DataError, match=r"f, row 1: the prompt has no tokens"):
            build(example("a", "b"), silent, config(template="chat"))


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs ../shared/data/tokenizers/gpt2")
def test_gpt2_twelve_prompt_tokens_and_no_output_give_one_label_at_the_end():
    """DSKD data preparation with limits 40 / 20; there labels are shifted by one, so ours sits one place later."""
    import torch
    from tenfold.platform.data.collator import CausalCollator
    from tenfold.platform.data.positions import label_positions, next_labels
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    limits = config(max_length=40, max_prompt_length=20)
    asked = example("one two three four five six seven eight nine ten eleven twelve", "")
    row = tokenise(asked, tokenizer, limits)
    assert len(prompt_ids(asked, tokenizer, limits)) == 12
    assert len(row["input_ids"]) == 13
    assert row["labels"] == [-100] * 12 + [50256]
    batch = CausalCollator(pad_token_id=50256)([row, {"input_ids": [5] * 40, "labels": [-100] * 20 + [5] * 20}])
    shifted_inputs, shifted_mask = batch["input_ids"][0, :-1], batch["attention_mask"][0, 1:]
    assert len(shifted_inputs) == 39
    assert shifted_mask.sum() == 12
    assert label_positions(batch["labels"])[0].nonzero().flatten().tolist() == [11]
    assert torch.equal(next_labels(batch["labels"][:1]), torch.tensor([50256]))
