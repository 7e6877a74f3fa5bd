"""AlignDistil as the platform drives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.method import Outcome, Paper, PlanSection

if TYPE_CHECKING:
    from tenfold.platform.context import PlanContext, RunContext


class AlignDistil:
    """Aligns a language model with preferences, token by token."""

    name: ClassVar[str] = "aligndistil"
    summary: ClassVar[str] = (
        "alignment as token-level distillation from a contrast of DPO models, beside DPO, KTO, ..."
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation", "2503.02832", 2025),
    )
    Config: ClassVar[type[AlignDistilConfig]] = AlignDistilConfig

    def plan(self, config: AlignDistilConfig, context: PlanContext) -> list[PlanSection]:
        """Check models, tokenizers and preferences; say stages, sizes, steps and memory."""
        from tenfold.methods.aligndistil.planning import describe_run

        return describe_run(config, context)

    def run(self, config: AlignDistilConfig, context: RunContext) -> Outcome:
        """Train the frozen models that are not given, then the policy, and evaluate it."""
        from tenfold.methods.aligndistil.evaluation import measure
        from tenfold.methods.aligndistil.stages import frozen_models, train_policy

        frozen = frozen_models(config, context)
        trained = train_policy(config, frozen, context)
        model = context.adopt_model(trained)
        metrics = {name: value for name, value in trained.outcome.metrics.items() if name.startswith("eval/")}
        if context.trial is not None and not config.evaluation.in_sweeps:
            return Outcome(metrics=metrics, model=model)
        metrics |= measure(config, context.storage.uri_of(model), frozen, context)
        return Outcome(metrics=metrics, artifacts={"answers": "answers.jsonl"}, model=model)

    def evaluate(self, config: AlignDistilConfig, model: str, context: RunContext) -> Mapping[str, float]:
        """Reward accuracy, win rate and divergence against the starting model, lengths, a judge where asked."""
        from tenfold.methods.aligndistil.evaluation import measure
        from tenfold.methods.aligndistil.stages import frozen_models

        return measure(config, model, frozen_models(config, context), context)
