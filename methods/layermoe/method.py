"""LayerMoE as the platform drives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.platform.method import Outcome, Paper, PlanSection

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tenfold.platform.context import PlanContext, RunContext
    from tenfold.platform.tuning.results import Trial


class LayerMoE:
    """Adds languages to a language model as experts, more of them where languages look less alike."""

    name: ClassVar[str] = "layermoe"
    summary: ClassVar[str] = (
        "new languages as layer-wise experts beside a frozen model, beside MoE-LPR, MoLA, fine-tuning, ..."
    )
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Less, but Better: Efficient Multilingual Expansion for LLMs via Layer-wise Mixture-of-Experts",
            "2505.22582",
            2025,
        ),
        Paper(
            "MoE-LPR: Multilingual Extension of Large Language Models through Mixture-of-Experts with Language Priors "
            "Routing",
            "2408.11396",
            2025,
        ),
    )
    Config: ClassVar[type[LayerMoEConfig]] = LayerMoEConfig

    def plan(self, config: LayerMoEConfig, context: PlanContext) -> list[PlanSection]:
        """Check model, languages and texts; say experts, sizes, steps and memory."""
        from tenfold.methods.layermoe.planning import describe_run

        return describe_run(config, context)

    def run(self, config: LayerMoEConfig, context: RunContext) -> Outcome:
        """Do every expansion, then measure the models before and after."""
        from tenfold.methods.layermoe.measures import FILE, measure
        from tenfold.methods.layermoe.stages import grow

        done = grow(config, context)
        result = done[-1].result
        model = context.adopt_model(result) if result is not None else None
        metrics = dict(result.outcome.metrics) if result is not None else {}
        metrics |= measure(config, done, context)
        if context.trial is not None:
            context.report(metrics, step=0)  # training reports what its own loss is, not what is compared
        return Outcome(metrics=metrics, artifacts={"scores": FILE}, model=model)

    def evaluate(self, config: LayerMoEConfig, model: str, context: RunContext) -> Mapping[str, float]:
        """Loss by language before and after, forgetting and plasticity, routing, added parameters."""
        from tenfold.methods.layermoe.measures import measure
        from tenfold.methods.layermoe.stages import grow
        from tenfold.platform.models.source import ModelSource

        *earlier, last = grow(config, context)  # all there, but for a cache that was emptied
        source = ModelSource(model=model, dtype=config.model.dtype)
        return measure(config, [*earlier, replace(last, after=source)], context)

    def sweep_figures(self, trials: Sequence[Trial]) -> dict[str, Figure]:
        """Added parameters against the losses on new and old languages."""
        from tenfold.methods.layermoe.frontier import sweep_figures

        return sweep_figures(trials)
