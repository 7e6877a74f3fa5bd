"""How answers are generated."""

from __future__ import annotations

from pydantic import Field, model_validator
from tenfold.platform.experiment import StrictModel


class GenerationOptions(StrictModel):
    """Decoding options; names and meaning are those of `transformers.GenerationConfig`.

    The defaults sample from the model's own distribution, as the evaluation of DSKD (arXiv 2406.17328) does.
    """

    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    min_new_tokens: int = Field(0, ge=0, description="tokens before an answer may end")
    do_sample: bool = Field(True, description="draw tokens at random; false takes the most probable one (greedy)")
    temperature: float = Field(1.0, gt=0, description="divides the logits before sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most probable tokens that make up this mass")
    top_k: int = Field(0, ge=0, description="sample from so many most probable tokens; 0: from all")
    no_repeat_ngram_size: int = Field(0, ge=0, description="no n-gram of this size occurs twice; 0: no such rule")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 makes tokens that occurred less probable")
    batch_size: int = Field(16, ge=1, description="prompts that are continued at once")

    @model_validator(mode="after")
    def _lengths_fit(self) -> GenerationOptions:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self

    @model_validator(mode="after")
    def _greedy_reads_no_sampling_options(self) -> GenerationOptions:
        changed = [
            name
            for name in ("temperature", "top_p", "top_k")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if not self.do_sample and changed:
            raise ValueError(f"do_sample is false, so {', '.join(changed)} would not be read; remove one or the other")
        return self
