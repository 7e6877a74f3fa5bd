"""Every option of AlignDistil: type, unit, range, default and source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from tenfold.platform.data.config import DataConfig, DataSource
from tenfold.platform.evaluation.options import JudgeOptions
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.adapters import LoraOptions
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.options import TrainingOptions

# What the policy is distilled into (section 3.8 of the paper's ablations), and what it is compared with.
TEACHERS = ("aligndistil", "contrast_const", "theorem1_const", "theorem1_adaptive", "gkd")
PREFERENCE = ("dpo", "cdpo", "ipo", "simpo", "tdpo1", "tdpo2", "kto")
Objective = Literal[
    "aligndistil",
    "contrast_const",
    "theorem1_const",
    "theorem1_adaptive",
    "gkd",
    "dpo",
    "cdpo",
    "ipo",
    "simpo",
    "tdpo1",
    "tdpo2",
    "kto",
    "rto",
]
FIELDS = ("prompt", "instruction", "input", "chosen", "rejected", "completion", "label", "messages")


class PreferenceSource(DataSource):
    """One file or data set of preferences: pairs, single answers that are good or bad, or prompts alone.

    Without `fields` the columns are found by name; with it exactly the named ones are read.
    """

    fields: dict[str, str] = Field(
        default_factory=dict,
        description=f"our name ({', '.join(FIELDS)}) -> the data's column; default: found by name",
    )

    @model_validator(mode="after")
    def _fields_are_complete(self) -> PreferenceSource:
        unknown = sorted(set(self.fields) - set(FIELDS))
        if unknown:
            raise ValueError(f"fields: unknown {', '.join(unknown)}; allowed: {', '.join(FIELDS)}")
        return self


class PreferenceData(DataConfig):
    """Preferences and their tokenisation."""

    train: list[PreferenceSource] = Field(min_length=1, description="training data")  # type: ignore[assignment]
    validation: list[PreferenceSource] | None = Field(  # type: ignore[assignment]
        None, min_length=1, description="validation data; default: a part of the training data"
    )
    max_length: int = Field(
        2048,
        ge=3,
        description="tokens of prompt and response together (official scripts: 2048); given responses are cut to it, "
        "own ones (on_policy) must fit",
    )
    max_prompt_length: int = Field(
        1024, ge=1, description="longest prompt; examples with a longer one are left out (official scripts: 1024)"
    )
    swap_preferences: bool = Field(False, description="exchange chosen and rejected: trains a reverse model")
    force_eos_on_truncation: bool = Field(
        False, description="end a response that is cut with EOS, as the official code does; teaches to stop midway"
    )


class OnPolicy(StrictModel):
    """Training on what the policy itself writes; every batch is used for one step."""

    max_new_tokens: int = Field(1024, ge=1, description="longest response (official scripts: 1024)")
    temperature: float = Field(1.0, gt=0, description="of sampling; other than 1 is no sample of the policy itself")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off (official scripts: 1)")
    top_k: int = Field(0, ge=0, description="sample among the k most probable tokens; 0 is off")
    samples_per_prompt: int = Field(
        1, ge=1, description="responses to each prompt; all are in the same step, whose batch is so much larger"
    )
    max_truncated: float = Field(
        0.2, ge=0, le=1, description="share of responses that are cut above which a warning is given"
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what generates; vllm: on the training GPUs, needs tenfold[gpu,align] (not run on a GPU so far)",
    )
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="share of a GPU's memory that vLLM may take")

    def generation(self) -> GenerationOptions:
        """Return how responses are drawn."""
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=1,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class SimPOOptions(StrictModel):
    """SimPO (arXiv 2405.14734)."""

    beta: float = Field(2.5, gt=0, description="scale of the mean log-probabilities (official CLI: 2.5)")
    gamma_ratio: float = Field(0.5, ge=0, description="margin gamma / beta (official CLI: 0.5)")


class KTOOptions(StrictModel):
    """KTO (arXiv 2402.01306)."""

    desirable_weight: float = Field(1.0, ge=0, description="lambda_D, weight of good answers")
    undesirable_weight: float = Field(1.0, ge=0, description="lambda_U, weight of bad answers")
    reference_point: Literal["mismatched", "paired"] = Field(
        "mismatched",
        description="z_0 from prompts with another example's answer (KTO), or from the opposite answers of the batch",
    )


class RTOOptions(StrictModel):
    """RTO (arXiv 2404.18922): PPO with a DPO model's reward at every token."""

    reward_beta: float = Field(0.1, gt=0, description="scale of log pi_dpo - log pi_ref as a token's reward")
    kl_coefficient: float = Field(0.01, ge=0, description="weight of log pi - log pi_ref, taken off each reward")
    reward_clip: float = Field(10.0, gt=0, description="the DPO reward of a token is clipped to +- this")
    clip: float = Field(0.2, gt=0, description="PPO: the ratio is clipped to 1 +- this")
    value_clip: float = Field(0.2, gt=0, description="the value may move by this in one step")
    gamma: float = Field(1.0, gt=0, le=1, description="discount of rewards")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    critic: ModelSource | None = Field(None, description="backbone of the critic; default: the policy's start")
    critic_learning_rate: float = Field(9e-6, gt=0, description="AdamW rate of the critic (official CLI: 9e-6)")


class AlignEvaluation(StrictModel):
    """How a policy is measured on held-out preferences."""

    generation: GenerationOptions = Field(
        GenerationOptions(max_new_tokens=256, do_sample=False), description="how answers are drawn; greedy by default"
    )
    max_pairs: int | None = Field(None, ge=1, description="held-out pairs that are scored; default: all")
    max_prompts: int = Field(64, ge=1, description="held-out prompts that are answered")
    token_plots: int = Field(3, ge=0, description="answers whose token weights are drawn")
    contrast_reward: bool = Field(
        False,
        description="measure with the contrast of the DPO and the reverse model also where the objective does not "
        "read them; they are trained first where they are missing, and shared",
    )
    in_sweeps: bool = Field(
        True, description="also in every trial of a sweep, which otherwise compares what training itself measures"
    )
    judge: JudgeOptions | None = Field(
        None, description="a language model compares the answers with the starting model's; off by default"
    )


class AlignDistilConfig(StrictModel):
    """Options of an alignment run. "paper" is arXiv 2503.02832."""

    model: ModelSource = Field(description="the instruct model that is aligned; also the reference of every method")
    objective: Objective = Field(
        "aligndistil",
        description="what is trained: distillation into the contrast of two DPO models (aligndistil), its ablations "
        "(contrast_const, theorem1_const, theorem1_adaptive, gkd), or a competitor",
    )
    dpo_model: ModelSource | None = Field(None, description="a ready DPO model; default: trained first")
    reverse_model: ModelSource | None = Field(None, description="a ready reverse DPO model; default: trained first")
    data: PreferenceData = Field(description="training and validation preferences")
    on_policy: OnPolicy | None = Field(
        None, description="train on the policy's own responses to the prompts; default: on the chosen responses"
    )
    beta: float = Field(
        0.1, gt=0, description="beta_0: of DPO, reverse DPO, IPO, TDPO, KTO and of the contrast (paper: 0.1)"
    )
    extrapolation: float | None = Field(
        None,
        ge=0,
        description="r, upper scale of alpha_t = r D_t + epsilon; default 20 off-policy, 30 on-policy: what the "
        "official scripts compute (the paper's own value is unverified)",
    )
    official_beta2: float | None = Field(
        None, gt=0, description="the official scripts' name for the same: r is twice this (their D_t lacks the 1/2)"
    )
    epsilon: float = Field(1e-3, gt=0, description="smallest alpha_t (paper: 0.001)")
    constant: float = Field(
        1.0, gt=0, description="alpha = beta_0 / beta of contrast_const and theorem1_const (paper tries 1 and 2)"
    )
    temperature: float = Field(1.0, gt=0, description="divides policy and teacher logits in the loss (paper: 1)")
    length_norm: bool = Field(True, description="mean over a response's tokens; false: their sum (paper: mean)")
    max_token_weight: float | None = Field(
        None, gt=0, description="largest weight beta_t of a token; default: none, beta_0 / epsilon (our option)"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken as swapped: cDPO (which takes 0.1 if 0), DPO, SimPO"
    )
    nll_weight: float = Field(0.0, ge=0, description="weight of the chosen response's mean cross entropy beside DPO")
    simpo: SimPOOptions = Field(default_factory=SimPOOptions, description="options of SimPO")
    tdpo_alpha: float = Field(0.5, ge=0, description="alpha of TDPO2 (TDPO paper: 0.5)")
    kto: KTOOptions = Field(default_factory=KTOOptions, description="options of KTO")
    rto: RTOOptions = Field(default_factory=RTOOptions, description="options of RTO")
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the frozen models; auto: bfloat16 where this hardware computes in it"
    )
    frozen_offload: Literal["none", "cpu"] = Field(
        "none", description="weights of the frozen models; cpu: in main memory, shared out over the workers"
    )
    lora: LoraOptions | None = Field(
        None, description="train low-rank adapters, merged when saved; default: all weights"
    )
    loss_chunk_rows: int = Field(256, ge=1, description="label positions whose logits exist at once; changes no value")
    training: TrainingOptions = Field(
        default_factory=TrainingOptions, description="steps, batches, learning rate of the objective"
    )
    preference_training: TrainingOptions | None = Field(
        None, description="the same for the DPO and the reverse DPO model; default: as `training`"
    )
    side_by_side: bool = Field(
        True, description="train the DPO and the reverse DPO model at once where the cluster has room"
    )
    evaluation: AlignEvaluation = Field(default_factory=AlignEvaluation, description="measures, judge")

    @model_validator(mode="after")
    def _options_fit_the_objective(self) -> AlignDistilConfig:
        for name in ("model", "dpo_model", "reverse_model"):
            source = getattr(self, name)
            if source is not None and source.model is None:
                raise ValueError(f"{name}: alignment starts from a trained model; give model instead of config")
        if self.extrapolation is not None and self.official_beta2 is not None:
            raise ValueError("extrapolation and official_beta2 are two names of one option; give one of them")
        if self.objective in PREFERENCE and self.on_policy is not None:
            raise ValueError(
                f"objective = {self.objective} trains on given answers; remove on_policy, or use one of "
                f"{', '.join(TEACHERS)}, rto"
            )
        if self.objective == "rto" and self.on_policy is None:
            raise ValueError("objective = rto trains on the policy's own responses; give on_policy: {}")
        if self.on_policy is not None and self.on_policy.engine == "vllm" and self.lora is not None:
            raise ValueError("on_policy.engine = vllm takes a whole policy, not an adapter; leave lora out")
        if self.objective in ("simpo", "kto") and self.nll_weight:
            raise ValueError(f"nll_weight stands beside DPO; {self.objective} has no such term")
        if self.objective in ("ipo", "tdpo1", "tdpo2", "kto") and self.label_smoothing:
            raise ValueError(f"label_smoothing is read by dpo, cdpo and simpo; objective is {self.objective}")
        if self.objective == "kto" and self.training.per_device_train_batch_size < 2:
            raise ValueError("objective = kto compares the rows of a batch: per_device_train_batch_size must be >= 2")
        for name in ("dpo", "reverse"):
            if getattr(self, f"{name}_model") is not None and name not in self.evaluated_names:
                raise ValueError(f"objective = {self.objective} reads no {name} model; remove {name}_model")
        return self

    @property
    def scale(self) -> float:
        """Return r."""
        if self.official_beta2 is not None:
            return 2 * self.official_beta2
        if self.extrapolation is not None:
            return self.extrapolation
        return 20.0 if self.on_policy is None else 30.0

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Return the frozen models that training reads: of dpo, reverse and reference, in this order."""
        return {
            "aligndistil": ("dpo", "reverse"),
            "contrast_const": ("dpo", "reverse"),
            "theorem1_const": ("dpo", "reference"),
            "theorem1_adaptive": ("dpo", "reference"),
            "gkd": ("dpo",),
            "rto": ("dpo", "reference"),
            "simpo": (),
        }.get(self.objective, ("reference",))

    @property
    def evaluated_names(self) -> tuple[str, ...]:
        """Return the frozen models that training or evaluation reads."""
        read = set(self.frozen_names) | ({"dpo", "reverse"} if self.evaluation.contrast_reward else set())
        return tuple(name for name in ("dpo", "reverse", "reference") if name in read)
