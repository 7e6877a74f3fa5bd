import subprocess
import sys

import pytest
from pydantic import ValidationError
from tenfold.platform.data.config import DataConfig, DataSource

SOURCE = {"path": "a.jsonl"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop": 3, "start": 3}, "stop must be above start; got start 3, stop 3"),
        ({"split": "test"}, "split is read with format hub only"),
        ({"path": "sample:../secret.json"}, "must not leave them"),
        ({"path": "sample:/etc/passwd"}, "must not leave them"),
        ({"path": ""}, "at least 1 character"),
        ({"fields": {"answer": "a"}}, "fields: unknown answer; allowed: instruction, input, response, messages"),
        ({"fields": {"instruction": "q"}}, "needs messages alone, or instruction, response"),
        ({"fields": {"messages": "m", "response": "r"}}, "needs messages alone, or instruction, response"),
        ({"format": "csv"}, "'auto', 'json'"),
        ({"row": 1}, "Extra inputs"),
    ],
)
def test_an_inconsistent_source_is_refused(options, told):
    with pytest.raises(ValidationError) as error:
        DataSource(**{**SOURCE, **options})
    assert told in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"messages": "chat"}, {"instruction": "q", "response": "a"}, {"instruction": "q", "input": "c", "response": "a"}],
)
def test_complete_fields_are_accepted(fields):
    assert DataSource(**SOURCE, fields=fields).fields == fields


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_length": 10, "max_prompt_length": 11}, "max_prompt_length 11 is above max_length 10"),
        ({"template": "alpaca", "system": "Be brief."}, "system is read by the chat template only"),
        ({"validation_ratio": 0.0}, "greater than 0"),
        ({"train": []}, "at least 1 item"),
        ({"validation": []}, "at least 1 item"),
    ],
)
def test_an_inconsistent_data_section_is_refused(options, told):
    with pytest.raises(ValidationError) as error:
        DataConfig(**{"train": [SOURCE], **options})
    assert told in str(error.value)


def test_what_was_resolved_is_valid_again():
    config = DataConfig(train=[{"path": "org/set", "format": "hub"}])
    assert DataConfig.model_validate_json(config.model_dump_json(), strict=True) == config


def test_the_configuration_imports_nothing_heavy():
    code = (
        "import sys, tenfold.platform.data.config, tenfold.platform.evaluation.options;"
        "print(*{'torch', 'transformers', 'ray', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
