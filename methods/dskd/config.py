"""Every option of DSKD: type, unit, range, default and source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from tenfold.platform.data.config import DataConfig
from tenfold.platform.evaluation.options import EvaluationOptions
from tenfold.platform.experiment import StrictModel
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
    data: DataConfig = Field(description="training and validation data")
    objective: Literal["sft", "kl", "dual_space_v1", "dual_space_v2"] = Field(
        "dual_space_v2", description="sft: no teacher; kl: one divergence of the two heads; dual_space: v1 or v2"
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
    agreement_threshold: float = Field(
        1.0, ge=0, le=1, description="v2: mask to agreeing tokens when their share is at most this (v2: 1.0)"
    )
    projector_learning_rate: float = Field(1e-3, gt=0, description="AdamW rate of the projectors (v1: 1e-3; v2: 5e-4)")
    s2t_refresh_every: int = Field(
        1, ge=1, description="v2: forward passes between two updates of the student-to-teacher projector (v2: 1)"
    )
    loss_chunk_rows: int = Field(512, ge=1, description="label positions whose logits exist at once; changes no value")
    training: TrainingOptions = Field(default_factory=TrainingOptions, description="steps, batches, learning rate")
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions, description="ROUGE-L protocol")

    @model_validator(mode="after")
    def _spaces_belong_to_v2(self) -> DSKDConfig:
        if self.spaces != "both" and self.objective != "dual_space_v2":
            raise ValueError(f"spaces = {self.spaces} is an ablation of dual_space_v2; objective is {self.objective}")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads the teacher."""
        return self.objective != "sft"
