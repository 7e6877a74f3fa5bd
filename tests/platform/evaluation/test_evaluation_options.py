import pytest
from pydantic import ValidationError
from tenfold.platform.evaluation.options import EvaluationOptions


def test_the_defaults_are_the_papers_protocol():
    options = EvaluationOptions()
    assert options.seeds == [10, 20, 30, 40, 50]
    generation = options.generation
    assert (generation.max_new_tokens, generation.no_repeat_ngram_size, generation.repetition_penalty) == (256, 6, 1.0)
    assert (generation.do_sample, generation.temperature, generation.top_p, generation.top_k) == (True, 1.0, 1.0, 0)


@pytest.mark.parametrize("options", [{"seeds": []}, {"seeds": [-1]}, {"max_rows": 0}, {"seed": 1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValidationError):
        EvaluationOptions(**options)
