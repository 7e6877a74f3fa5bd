"""Every option of LayerMoE: type, unit, range, default and source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from tenfold.methods.layermoe.corpora import Corpus, LanguageData
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.adapters import LoraOptions
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.options import TrainingOptions

Strategy = Literal["layermoe", "moe_lpr", "mola", "moe", "full_ft", "lora", "llama_pro", "base"]
EXPANDING = ("layermoe", "moe_lpr", "mola", "moe")  # strategies that add experts
REVIEWING = ("layermoe", "moe_lpr", "mola")  # strategies with a second stage
NEW_EXPERTS_A_LAYER = 2.5  # delta / layers of the official runs (70 of 28 layers, about 60 of 24)


class SimilarityOptions(StrictModel):
    """How alike languages look to a layer (section 3.1 of the specification; official script's values)."""

    tokens: int = Field(100_000, ge=1, description="token vectors of a language (Q, official: 100 000)")
    max_document: int = Field(
        32_000, ge=1, description="tokens of the longest document that is read; longer ones are left out"
    )
    truncate: int = Field(10_000, ge=1, description="first tokens of a document that the model sees")
    indicator: Literal["combined", "nn", "no", "pooled"] = Field(
        "combined",
        description="combined: mean of new-new and new-old similarity (paper); nn, no: one of them; "
        "pooled: mean over all pairs with a new language",
    )


class AllocationOptions(StrictModel):
    """How many experts a layer gets.

    layermoe reads `delta`, `total_experts` or `explicit`; moe_lpr and moe read `uniform`; mola reads none of them.
    """

    delta: float | None = Field(
        None, gt=0, description="budget factor of N = ceil(delta (1/S) / sum(1/S)); default: 2.5 x layers"
    )
    total_experts: int | None = Field(
        None, ge=1, description="exact number of experts of all layers together, counted as count_mode says"
    )
    explicit: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="experts of every layer, counted as count_mode says; no formula"
    )
    count_mode: Literal["total_minus_one", "new"] = Field(
        "total_minus_one",
        description="what the numbers count: the original FFN and the new experts (official; also in later "
        "expansions, which add one less), or new experts alone",
    )
    min_per_layer: int = Field(1, ge=0, description="fewest experts of a layer")
    max_per_layer: int | None = Field(None, ge=1, description="most experts of a layer; default: no limit")
    order: Literal["similar", "inverse", "random", "uniform"] = Field(
        "similar",
        description="similar: fewer experts where languages are more alike (paper); inverse: more of them there; "
        "random: the paper's numbers, shuffled over the layers; uniform: as if all layers were alike",
    )
    uniform: int = Field(6, ge=2, description="experts of every layer with moe_lpr and moe, original FFN included")

    @model_validator(mode="after")
    def _one_rule(self) -> AllocationOptions:
        given = [name for name in ("delta", "total_experts", "explicit") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} decide the same; give one of delta, total_experts, explicit")
        if self.max_per_layer is not None and self.max_per_layer < self.min_per_layer:
            raise ValueError(f"max_per_layer {self.max_per_layer} is below min_per_layer {self.min_per_layer}")
        if self.count_mode == "total_minus_one" and self.explicit is not None and min(self.explicit) < 1:
            raise ValueError("explicit counts the original FFN: at least 1 a layer; use count_mode: new for 0")
        if self.count_mode == "total_minus_one" and self.min_per_layer < 1:
            raise ValueError("min_per_layer counts the original FFN: at least 1; use count_mode: new for 0")
        if self.explicit is not None and self.order != "similar":
            raise ValueError(f"order = {self.order} reorders what a formula gives; explicit is taken as it is")
        return self


class ClassifierOptions(StrictModel):
    """The classifiers that send sequences of old languages to the original FFN (layermoe only)."""

    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="layers that get one, from 0; default: those of the largest similarity; []: none"
    )
    share: float = Field(
        0.3, gt=0, le=1, description="share of the layers that get one by default (official lists: 7 of 24)"
    )
    classes: int = Field(
        2,
        ge=2,
        description="2: old and new (official); more: old, then one class an expansion, which may use its own "
        "and earlier experts",
    )
    pool: Literal["sequence", "prefix"] = Field(
        "sequence",
        description="what a decision reads: the whole sequence, or the tokens so far (for likelihoods of texts)",
    )
    route_with: Literal["predicted", "gold"] = Field(
        "predicted", description="class by which training routes: the classifier's own (official) or the true one"
    )

    @model_validator(mode="after")
    def _different_layers(self) -> ClassifierOptions:
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers names a layer twice: {self.layers}")
        return self


class TranslationOptions(StrictModel):
    """Few-shot translation of the held-out lines between a pivot and every other language (section 5.4)."""

    examples: list[Corpus] = Field(
        min_length=2, description="lines of every language that the examples of a prompt are drawn from, parallel"
    )
    pivot: str = Field("en", min_length=1, description="language that all others are translated from and to")
    shots: int = Field(8, ge=0, description="examples in a prompt (official: 8)")
    max_lines: int = Field(100, ge=1, description="first held-out lines that are translated")
    num_beams: int = Field(6, ge=1, description="beams (official: 6)")
    max_new_tokens: int = Field(512, ge=1, description="longest translation (official: 512)")
    batch_size: int = Field(16, ge=1, description="prompts at once")


class HarnessOptions(StrictModel):
    """The paper's benchmarks in lm-evaluation-harness, which downloads them; by ISO 639-1 codes of the languages."""

    benchmarks: list[str] | None = Field(None, min_length=1, description="ARC-Challenge, MMLU, ...; default: all")
    limit: int | None = Field(None, ge=1, description="first documents of a task; default: all")
    definitions: str | None = Field(
        None, min_length=1, description="folder with tasks that the harness lacks; default: those are left out"
    )
    batch_size: int = Field(8, ge=1, description="requests at once")


class LayerMoEEvaluation(StrictModel):
    """What is measured on held-out lines."""

    batch_size: int = Field(16, ge=1, description="lines in a forward pass")
    max_lines: int | None = Field(None, ge=1, description="first lines of a language that are read; default: all")
    routing: bool = Field(True, description="also where tokens go: share of expert 0, load, classifier accuracy")
    translation: TranslationOptions | None = Field(
        None, description="also few-shot translation, chrF and BLEU; needs the package sacrebleu"
    )
    harness: HarnessOptions | None = Field(None, description="also the paper's benchmarks; needs the package lm-eval")


class Expansion(StrictModel):
    """A further expansion after the first (section 3.8): the languages so far become earlier ones."""

    new: list[Corpus] = Field(min_length=1, description="documents of the languages that are added")
    allocation: AllocationOptions | None = Field(None, description="default: as the first expansion's")
    classifier: ClassifierOptions | None = Field(None, description="default: as the first expansion's")


class LayerMoEConfig(StrictModel):
    """Options of an expansion. "paper" is arXiv 2505.22582, "official" its published scripts."""

    model: ModelSource = Field(
        description="a dense model; a fresh one (then base_training); or an expanded one for a later expansion"
    )
    base_training: TrainingOptions | None = Field(
        None, description="train the model on the old languages first, all weights; default: take it as it is"
    )
    strategy: Strategy = Field(
        "layermoe",
        description="layermoe: the paper; moe_lpr: as many experts on every layer, no classifier (2408.11396); "
        "mola: 2, 4, 6, 8 experts by depth; moe: upcycled, nothing frozen; full_ft, lora: no experts; llama_pro: "
        "copies of layers (2401.02415); base: nothing",
    )
    data: LanguageData = Field(description="documents of old and new languages, held-out lines")
    lifelong: list[Expansion] = Field(
        default_factory=list, description="further expansions in the same run, each on what the one before it gave"
    )
    similarity: SimilarityOptions = Field(default_factory=SimilarityOptions, description="how likeness is measured")
    allocation: AllocationOptions = Field(default_factory=AllocationOptions, description="experts of every layer")
    top_k: int = Field(2, ge=1, description="experts of a token (paper: 2); with 1 only the auxiliary losses train it")
    router_init: Literal["reinit", "extend"] = Field(
        "reinit",
        description="routers in a later expansion: drawn anew (official), or old rows kept and new ones drawn",
    )
    classifier: ClassifierOptions = Field(default_factory=ClassifierOptions, description="classifiers of layermoe")
    balance_weight: float = Field(0.01, ge=0, description="alpha, weight of load balance in stage 1 (official: 0.01)")
    prior_weight: float = Field(
        0.1, ge=0, description="beta, weight of language-prior routing in stage 2 (official: 0.1)"
    )
    prior_form: Literal["nll", "official", "group"] = Field(
        "nll",
        description="nll: -log p of expert 0 for old tokens; official: with the second softmax of the published code; "
        "group: every token shall prefer its own group's experts (for lifelong moe_lpr)",
    )
    classifier_weight: float = Field(
        0.1, ge=0, description="gamma, weight of the classifiers' loss in stage 2 (official: 0.1)"
    )
    lora: LoraOptions = Field(
        LoraOptions(r=8, alpha=16.0, dropout=0.0, target_modules="all-linear"),
        description="adapter of strategy lora (rank of MoE-LPR's own baseline unverified)",
    )
    inserted_layers: int | None = Field(
        None,
        ge=1,
        description="copies of layers that llama_pro inserts, evenly spaced; default: one behind every second layer "
        "(12 in MoE-LPR's 24-layer baseline)",
    )
    stage1: TrainingOptions = Field(
        default_factory=TrainingOptions, description="post-pretraining on the new languages; all strategies but base"
    )
    stage2: TrainingOptions | None = Field(
        None, description="review with replay; layermoe, moe_lpr and mola; default: none"
    )
    loss_chunk_rows: int = Field(256, ge=1, description="label positions whose logits exist at once; changes no value")
    evaluation: LayerMoEEvaluation = Field(default_factory=LayerMoEEvaluation, description="measures")

    @model_validator(mode="after")
    def _options_fit_the_strategy(self) -> LayerMoEConfig:
        asked = f"strategy = {self.strategy}"
        allocations = [self.allocation, *(e.allocation for e in self.lifelong if e.allocation is not None)]
        classifiers = [self.classifier, *(e.classifier for e in self.lifelong if e.classifier is not None)]
        if self.strategy != "layermoe":
            if any(allocation.explicit is not None for allocation in allocations):
                raise ValueError(f"allocation.explicit is read by layermoe; {asked}. Remove it")
            if any(classifier.layers for classifier in classifiers):
                raise ValueError(f"classifier.layers is read by layermoe; {asked}. Remove it")
        if not self.has_review and any(classifier.layers for classifier in classifiers):
            raise ValueError("classifier.layers are trained by the review; give stage2, or remove them")
        default_lora = type(self).model_fields["lora"].default
        if self.strategy != "lora" and self.lora != default_lora:
            raise ValueError(f"lora is read by strategy lora; {asked}. Remove it")
        if self.strategy != "llama_pro" and self.inserted_layers is not None:
            raise ValueError(f"inserted_layers is read by strategy llama_pro; {asked}. Remove it")
        if self.strategy not in EXPANDING and self.lifelong:
            raise ValueError(f"lifelong adds experts again and again; {asked} adds none. Remove it")
        if self.base_training is not None and self.model.config is None and self.data.earlier:
            raise ValueError(
                "base_training is for a model before its first expansion; data.earlier names earlier ones"
            )
        try:
            self.expansions()
        except ValidationError as error:
            raise ValueError(f"lifelong: {'; '.join(each['msg'] for each in error.errors())}") from error
        return self

    @property
    def has_review(self) -> bool:
        """Say whether a second stage follows."""
        return self.strategy in REVIEWING and self.stage2 is not None

    @property
    def needs_similarity(self) -> bool:
        """Say whether counts or classifier layers are decided by similarity."""
        return self.strategy == "layermoe" and (
            (self.allocation.explicit is None and self.allocation.order != "uniform") or self.default_classifiers
        )

    @property
    def default_classifiers(self) -> bool:
        """Say whether the layers that get a classifier are those of the largest similarity."""
        return self.strategy == "layermoe" and self.has_review and self.classifier.layers is None

    def expansions(self) -> list[LayerMoEConfig]:
        """Return the options of every expansion; of all but the first, `model` is what the one before it gives.

        Held-out text is that of the languages known by then, so that later ones do not make another stage of it.
        """
        configs = [self]
        for expansion in self.lifelong:
            last = configs[-1].data
            data = {**dict(self.data), "earlier": [*last.earlier, *last.new], "new": expansion.new}
            update = {
                "data": LanguageData(**data),
                "base_training": None,
                "allocation": expansion.allocation or self.allocation,
                "classifier": expansion.classifier or self.classifier,
            }
            configs.append(self.model_copy(update=update))
        return [
            config.model_copy(update={"lifelong": [], "data": _without_strangers(config.data)}) for config in configs
        ]


def _without_strangers(data: LanguageData) -> LanguageData:
    """Return the data without held-out text of languages that are in none of its groups."""
    known = {language for group in data.groups().values() for language in group}
    return data.model_copy(update={"evaluation": [c for c in data.evaluation if c.language in known]})
