"""Every option of DSKD: type, unit, range, default and source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from tenfold.platform.data.config import DataConfig, DataSource
from tenfold.platform.errors import ConfigError
from tenfold.platform.evaluation.options import EvaluationOptions
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.adapters import LoraOptions
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.options import TrainingOptions

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "tvd",
    "jsd",
    "top1_ce",
]


Alignment = Literal["none", "cma", "eta", "order", "mined"]
# How the teacher's positions reach the student's where the two tokenizers differ.
ALIGNMENTS: dict[str, Alignment] = {
    "sft": "none",
    "seqkd": "none",
    "dual_space_v1": "cma",
    "dual_space_v2": "eta",
    "overlap_kd": "eta",
    "uld": "order",
    "mined": "mined",
}
# These objectives compare by their own pairs also where the tokenizers are the same.
ALWAYS_PAIRED = ("overlap_kd", "uld", "mined")
# These objectives need no gold label and no table of positions: they can read what the student generates.
ON_POLICY = ("kl", "dual_space_v1", "dual_space_v2", "overlap_kd")


class OnPolicy(StrictModel):
    """Training on what the student itself generates (v2, arXiv 2504.11426); needs a live teacher."""

    after_epochs: int = Field(3, ge=0, description="epochs on the data alone at first (v2: 3, its example 1)")
    ratio: float = Field(0.5, ge=0, le=1, description="share of the forward passes that generate (v2: 0.5)")
    temperature: float = Field(1.0, gt=0, description="of sampling (v2: 1.0)")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off (v2: 1.0)")
    top_k: int = Field(0, ge=0, description="sample among the k most probable tokens; 0 is off (v2: 0)")
    max_new_tokens: int | None = Field(
        None, ge=1, description="longest response; default: max_length - max_prompt_length (v2)"
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what generates; vllm: on the training GPUs, needs tenfold[gpu,align] (not run on a GPU so far)",
    )
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="share of a GPU's memory that vLLM may take")


class DSKDEvaluation(EvaluationOptions):
    """How the finished student is measured: ROUGE-L always, a judge and the papers' analyses on demand."""

    judge_against: str = Field(
        "references",
        min_length=1,
        description="whose answers the student's are compared with: references, teacher, or the folder of another run "
        "with the same rows",
    )
    judge_sets: list[str] = Field(
        ["validation"], min_length=1, description="rows that are judged: validation, or names in test_sets"
    )
    structure_distance: int | None = Field(
        None,
        ge=1,
        description="compare how student and teacher arrange the tokens of so many training responses (v1: 1000); "
        "off by default",
    )


class DSKDConfig(StrictModel):
    """Options of a distillation run. "v1" is arXiv 2406.17328, "v2" is arXiv 2504.11426."""

    student: ModelSource = Field(description="the model that is trained")
    teacher: ModelSource = Field(description="the frozen model it learns from")
    teacher_mode: Literal["cache", "live"] = Field(
        "cache",
        description="cache: the teacher reads the data once, its label states are kept on disk; live: in every step",
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="the teacher's arithmetic; auto: bfloat16 where this hardware computes in it"
    )
    teacher_offload: Literal["none", "cpu"] = Field(
        "none",
        description="a live teacher's weights; cpu: in main memory, shared out over the workers, on the device layer "
        "by layer: for one that does not fit beside the student",
    )
    lora: LoraOptions | None = Field(
        None, description="train a low-rank adapter of the student, its weights stay frozen; default: all weights"
    )
    data: DataConfig = Field(description="training and validation data")
    test_sets: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], list[DataSource]] = Field(
        default_factory=dict,
        description="further instruction sets that the finished student is measured on: name -> files (v1, v2: five)",
    )
    objective: Literal["sft", "seqkd", "kl", "dual_space_v1", "dual_space_v2", "overlap_kd", "uld", "mined"] = Field(
        "dual_space_v2",
        description="sft: no teacher; seqkd: sft on the teacher's responses; kl: one divergence of the two heads; "
        "dual_space: v1 or v2; overlap_kd, uld, mined: competitors for different vocabularies",
    )
    eta_mode: Literal["byte_span", "official"] = Field(
        "byte_span", description="exact token alignment by bytes, or as the official code does (loses synchronisation)"
    )
    cma_std: Literal["masked", "batch"] = Field(
        "masked",
        description="deviation in CMA's normalisation: over label positions (our choice: padding does not matter), "
        "or over all of the batch (official code; needs teacher_mode live)",
    )
    projector_init: Literal["auto", "random", "pinv"] = Field(
        "auto", description="t2s projector; auto: random for v1, pseudo-inverse for v2 (the papers' ways)"
    )
    topk_vocab: int = Field(-1, description="v2: entries of the vocabulary that the projectors are fitted to; -1: all")
    seqkd_generation: GenerationOptions = Field(
        GenerationOptions(), description="how the teacher answers for seqkd (our choice: sampling at temperature 1)"
    )
    seqkd_seed: Annotated[int, Field(ge=0)] = Field(
        10, description="of the teacher's sampling for seqkd; independent of `seed`, so that seeds share the answers"
    )
    on_policy: OnPolicy | None = Field(
        None, description="train on the student's own responses as well; off by default"
    )
    divergence: Divergence = Field("forward_kl", description="between the distributions (v1 table of divergences)")
    kd_rate: float = Field(0.5, ge=0, le=1, description="alpha: loss = (1 - alpha) CE + alpha KD (v1, v2: 0.5)")
    kd_temperature: float = Field(2.0, gt=0, description="tau: divides both logits in the divergences (v1, v2: 2.0)")
    teacher_temperature: float = Field(
        1.0, gt=0, description="divides the teacher's logits once more (official code: 1.0)"
    )
    skew_lambda: float = Field(0.1, ge=0, lt=1, description="of skewed_forward_kl and skewed_reverse_kl (v1: 0.1)")
    adaptive_alpha: float = Field(0.5, gt=0, lt=1, description="head and tail of adaptive_kl (v1: 0.5)")
    js_beta: float = Field(0.5, gt=0, lt=1, description="weight of the student in jsd")
    spaces: Literal["both", "student", "teacher"] = Field("both", description="v2's ablations; both: the method")
    t2s_mask: Literal["auto", "none", "gold", "agreement"] = Field(
        "auto",
        description="tokens that the student space counts: all, or those whose projected teacher predicts the gold "
        "label or the teacher's token; auto, as the papers: none for v1, gold with cross-model attention, agreement "
        "for v2 (none on the student's own text of one tokenizer)",
    )
    normaliser: Literal["local", "global"] = Field(
        "local",
        description="v2's means are over a micro-batch (official code) or over the whole step, exact whatever the "
        "accumulation and the ranks",
    )
    agreement_threshold: float = Field(
        1.0, ge=0, le=1, description="v2: mask to agreeing tokens when their share is at most this (v2: 1.0)"
    )
    projector_learning_rate: float = Field(1e-3, gt=0, description="AdamW rate of the projectors (v1: 1e-3; v2: 5e-4)")
    s2t_refresh_every: int = Field(
        1, ge=1, description="v2: forward passes between two updates of the student-to-teacher projector (v2: 1)"
    )
    loss_chunk_rows: int = Field(512, ge=1, description="label positions whose logits exist at once; changes no value")
    training: TrainingOptions = Field(default_factory=TrainingOptions, description="steps, batches, learning rate")
    evaluation: DSKDEvaluation = Field(default_factory=DSKDEvaluation, description="ROUGE-L protocol, judge, analyses")

    @model_validator(mode="after")
    def _options_fit_the_objective(self) -> DSKDConfig:
        if self.spaces != "both" and self.objective != "dual_space_v2":
            raise ValueError(f"spaces = {self.spaces} is an ablation of dual_space_v2; objective is {self.objective}")
        if self.topk_vocab != -1 and self.topk_vocab < 1:
            raise ValueError(f"topk_vocab = {self.topk_vocab}: give a number of entries, or -1 for all")
        if self.cma_std == "batch" and self.teacher_mode == "cache":
            raise ValueError("cma_std = batch reads states that a cache does not keep; use teacher_mode = live")
        if self.teacher_offload == "cpu" and self.teacher_mode == "cache":
            raise ValueError("teacher_offload = cpu is for a teacher that runs in training; use teacher_mode = live")
        if self.on_policy is not None and self.objective not in ON_POLICY:
            raise ValueError(f"on_policy works with {', '.join(ON_POLICY)}; objective is {self.objective}")
        self._check_mask()
        unknown = [name for name in self.evaluation.judge_sets if name not in ("validation", *self.test_sets)]
        if self.evaluation.judge is not None and unknown:
            raise ValueError(
                f"evaluation.judge_sets: no rows called {', '.join(unknown)}; there are validation and "
                f"{', '.join(self.test_sets) or 'no test_sets'}"
            )
        if self.normaliser == "global" and self.objective != "dual_space_v2":
            raise ValueError(
                "normaliser = global is for the means of dual_space_v2; the sums of other objectives are divided by "
                f"the label tokens of the step already; objective is {self.objective}"
            )
        if self.on_policy is not None and self.teacher_mode == "cache":
            raise ValueError("on_policy: the teacher must read what the student generates; use teacher_mode = live")
        self._check_engine()
        return self

    def _check_engine(self) -> None:
        if self.on_policy is None or self.on_policy.engine != "vllm":
            return
        if self.student.model is None:
            raise ValueError("on_policy.engine = vllm reads the student from a folder; a fresh one (config) has none")
        if self.lora is not None:
            raise ValueError("on_policy.engine = vllm takes a whole student, not an adapter; leave lora out")

    def _check_mask(self) -> None:
        given = f"t2s_mask = {self.t2s_mask}"
        if self.t2s_mask == "auto":
            return
        if self.objective not in ("dual_space_v1", "dual_space_v2"):
            raise ValueError(f"{given} is for dual_space_v1 and dual_space_v2; objective is {self.objective}")
        if self.spaces == "teacher":
            raise ValueError(f"{given} masks the student space, which spaces = teacher leaves out")
        if self.t2s_mask == "gold" and self.on_policy is not None:
            raise ValueError(f"{given}: text that the student generates has no gold labels; use auto with on_policy")
        if self.t2s_mask == "none" and self.agreement_threshold != 1.0:
            raise ValueError(
                f"{given} leaves agreement_threshold = {self.agreement_threshold} without a mask to bound"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher."""
        return self.objective not in ("sft", "seqkd")

    def alignment(self, same_tokenizer: bool) -> Alignment | None:
        """Return how positions are paired; None where the objective compares equal vocabularies only.

        Raises:
            ConfigError: the mask of the student space needs a prediction that this pairing does not have.
        """
        if same_tokenizer and self.objective not in ALWAYS_PAIRED:
            return "none"
        found = ALIGNMENTS.get(self.objective)
        if found == "cma" and self.t2s_mask == "agreement":
            raise ConfigError(
                "config.t2s_mask = agreement: cross-model attention has no teacher's token at a student's position to "
                "agree with. Use config.t2s_mask=gold or none, or config.objective=dual_space_v2"
            )
        return found
