import copy

import pytest
from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import to_example
from tenfold.platform.data.templates import check_tokenizer, prompt_text
from tenfold.platform.errors import DataError

PLAIN = to_example({"instruction": "Fix {it}.", "output": "ok"}, "f, row 1")
WITH_INPUT = to_example({"instruction": "Fix.", "input": "He go.", "output": "He goes."}, "f, row 2")


def config(**options):
    return DataConfig(train=[{"path": "unread.jsonl"}], **options)


def test_alpaca_without_input_is_the_papers_text():
    assert prompt_text(PLAIN, None, config(template="alpaca")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nFix {it}.\n\n### Response:\n"
    )


def test_alpaca_with_input_is_the_papers_text():
    assert prompt_text(WITH_INPUT, None, config(template="alpaca")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nFix.\n\n### Input:\nHe go.\n\n### Response:\n"
    )


def test_no_template_is_the_instruction_and_its_input_and_nothing_else():
    assert prompt_text(PLAIN, None, config(template="none")) == "Fix {it}."
    assert prompt_text(WITH_INPUT, None, config(template="none")) == "Fix.\nHe go."


def test_chat_goes_up_to_the_assistants_header(tiny_tokenizer):
    assert prompt_text(WITH_INPUT, tiny_tokenizer, config()) == (
        "<|im_start|>user\nFix.\nHe go.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_system_message_comes_first_unless_the_conversation_has_its_own(tiny_tokenizer):
    own = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    with_system = config(system="Be brief.")
    assert prompt_text(PLAIN, tiny_tokenizer, with_system).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert prompt_text(to_example({"messages": own}, ""), tiny_tokenizer, with_system) == (
        "<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_chat_template_is_refused_for_chat_alone(tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template; set template to alpaca or none"):
        prompt_text(PLAIN, bare, config())
    check_tokenizer(bare, config(template="alpaca"))


def test_a_tokenizer_without_end_token_is_refused(tiny_tokenizer):
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        check_tokenizer(endless, config(template="none"))


def test_what_the_chat_template_refuses_is_named_with_its_row(tiny_tokenizer):
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(DataError, match=r"f, row 1: .*no system messages here"):
        prompt_text(PLAIN, strict, config())
