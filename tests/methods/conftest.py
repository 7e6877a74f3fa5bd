"""What tests of several methods share."""

import pytest


@pytest.fixture
def local_arguments(tmp_path):
    """Return a function: training options -> arguments of a Trainer in this process, without DeepSpeed."""
    from transformers import TrainingArguments

    def make(training):
        return TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            seed=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            average_tokens_across_devices=True,
            lr_scheduler_type="constant",
            **training.arguments(),
        )

    return make
