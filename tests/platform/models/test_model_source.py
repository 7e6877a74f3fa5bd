"""Which model an option means, and how answers are generated: the checked configuration."""

import subprocess
import sys

import pytest
from pydantic import ValidationError
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource
from tenfold.platform.validation import validate_all

FRESH = {"config": {"model_type": "llama", "hidden_size": 32}, "tokenizer": "some/folder"}


def test_importing_the_options_imports_nothing_heavy():
    code = (
        "import sys; import tenfold.platform.models.source, tenfold.platform.models.options;"
        "print([name for name in ('torch', 'transformers', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of model"),
        ({"model": "a", **FRESH}, "exactly one of model"),
        ({"config": {"hidden_size": 32}, "tokenizer": "t"}, "needs model_type"),
        ({"config": {"model_type": "llama"}}, "needs tokenizer"),
        ({**FRESH, "sha256": "0" * 64}, "sha256 belong"),
        ({**FRESH, "revision": "main"}, "revision belong"),
        ({"model": "a", "sha256": "12"}, "should match pattern"),
        ({"model": "a", "dtype": "int8"}, "float32"),
        ({"model": "a", "path": "b"}, "Extra inputs"),
    ],
)
def test_a_source_that_means_nothing_or_two_things_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ModelSource(**options)


def test_a_source_is_named_as_the_user_wrote_it():
    assert ModelSource(model="owner/name").name == "owner/name"
    assert ModelSource(**FRESH).name == "fresh llama"


def test_a_source_passes_the_strict_check_of_experiment_files():
    source, errors = validate_all(ModelSource, FRESH)
    assert errors == []
    assert source == ModelSource(**FRESH)


def test_code_of_strangers_is_off_unless_it_is_asked_for():
    assert ModelSource(model="a").trust_remote_code is False


@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_greedy_decoding_refuses_options_that_it_would_not_read(option):
    with pytest.raises(ValidationError, match=f"{next(iter(option))} would not be read"):
        GenerationOptions(do_sample=False, **option)
    assert GenerationOptions(do_sample=True, **option)


@pytest.mark.parametrize(
    "option",
    [{"max_new_tokens": 0}, {"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"batch_size": 0}],
)
def test_generation_options_have_ranges(option):
    with pytest.raises(ValidationError):
        GenerationOptions(**option)
