"""What an aligned policy is measured by: held-out pairs, its own answers beside the starting model's, and a judge.

Reward accuracy (Table 2 of arXiv 2503.02832) is the share of held-out pairs whose chosen response has the higher
implicit reward beta_0 (log pi - log pi_ref). The measures of answers need no judge: which of two answers the contrast
of the DPO models prefers, how far the policy went from where it started, how long it talks.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.scoring import answers, divergences, log_probabilities, plain
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.methods.aligndistil.preference_rows import Pair, Prompt
    from tenfold.platform.context import RunContext

FILE = "answers.jsonl"


@dataclass(frozen=True)
class Models:
    """What is compared: sources by name (policy, reference, and of dpo, reverse those that there are)."""

    sources: dict[str, ModelSource]
    tokenizer: Any
    dtype: str

    @property
    def contrast(self) -> dict[str, ModelSource]:
        """The two models whose contrast is a reward, as `dpo` and `other`; empty if there is no DPO model."""
        if "dpo" not in self.sources:
            return {}
        return {"dpo": self.sources["dpo"], "other": self.sources.get("reverse", self.sources["reference"])}


def measure(
    config: AlignDistilConfig, model: str, frozen: Mapping[str, ModelSource], context: RunContext
) -> dict[str, float]:
    """Return `eval/...` of the policy, `start/...` of the model it started from, `reward/...` of the frozen models.

    Args:
        config: the method's options.
        model: address of the policy.
        frozen: dpo, reverse, reference: those that the run has.
        context: the run.

    Raises:
        ConfigError: a judge's API key is missing; before anything is computed.
    """
    from tenfold.methods.aligndistil.loading import frozen_dtype
    from tenfold.methods.aligndistil.preferences import held_out_pairs
    from tenfold.platform.evaluation.judge_client import check_judge
    from tenfold.platform.models.loading import load_tokenizer

    if config.evaluation.judge is not None:
        check_judge(config.evaluation.judge)
    sources = {"policy": ModelSource(model=model), "reference": config.model, **frozen}
    models = Models(sources, load_tokenizer(config.model), frozen_dtype(config))
    pairs = held_out_pairs(config.data)
    metrics = pair_metrics(config, models, pairs[: config.evaluation.max_pairs], context)
    return metrics | _answer_metrics(config, models, pairs, context)


def pair_metrics(
    config: AlignDistilConfig, models: Models, pairs: Sequence[Pair], context: RunContext
) -> dict[str, float]:
    """Return accuracy, ties and margin of the implicit rewards on held-out pairs."""
    from tenfold.methods.aligndistil.tokenising import pair_rows

    rows = list(pair_rows(pairs, models.tokenizer, config.data)[0])
    both = plain(rows) + [
        {"input_ids": list(row["rejected_input_ids"]), "labels": list(row["rejected_labels"])} for row in rows
    ]
    scores: dict[str, list[float]] = {}
    for name, source in models.sources.items():
        values = log_probabilities(
            context,
            source,
            both,
            name=f"pairs-{name}",
            dtype=models.dtype,
            num_columns=len(models.tokenizer),
        )
        # log pi(chosen) - log pi(rejected)
        scores[name] = [better - worse for better, worse in zip(values[: len(rows)], values[len(rows) :], strict=True)]
    found = preference("eval/reward", scores["policy"], scores["reference"], config.beta)
    if "dpo" in scores:
        found |= preference("reward/dpo", scores["dpo"], scores["reference"], config.beta)
    if "reverse" in scores:
        found |= preference("reward/contrast", scores["dpo"], scores["reverse"], config.beta)
    return found


def preference(prefix: str, ours: Sequence[float], theirs: Sequence[float], beta: float) -> dict[str, float]:
    """Return accuracy (0 to 100, ties count as wrong), tie rate and mean margin of beta (ours - theirs) by pair."""
    margins = [beta * (mine - other) for mine, other in zip(ours, theirs, strict=True)]
    return {
        f"{prefix}_accuracy": 100 * sum(margin > 0 for margin in margins) / len(margins),
        f"{prefix}_tie_rate": 100 * sum(margin == 0 for margin in margins) / len(margins),
        f"{prefix}_margin": statistics.fmean(margins),
    }


def _answer_metrics(
    config: AlignDistilConfig, models: Models, pairs: Sequence[Pair], context: RunContext
) -> dict[str, float]:
    from tenfold.methods.aligndistil.extrapolation import contrast_of
    from tenfold.methods.aligndistil.plots import token_figure
    from tenfold.methods.aligndistil.tokenising import prompt_rows
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    options = config.evaluation
    prompts = distinct(pairs)[: options.max_prompts]
    rows = list(prompt_rows(prompts, models.tokenizer, config.data)[0])
    asked = [prompts[row["index"]] for row in rows]
    digests = {name: model_digest(resolve(models.sources[name])) for name in ("policy", "reference")}
    written = {
        name: answers(
            context,
            models.sources[name],
            digests[name],
            [row["input_ids"] for row in rows],
            options.generation,
            dtype=models.dtype,
        )
        for name in digests
    }
    common: dict[str, Any] = {"dtype": models.dtype, "num_columns": len(models.tokenizer)}
    sources = {name: models.sources[name] for name in ("policy", "reference")} | models.contrast
    weighed = contrast_of(config) if models.contrast and options.token_plots else None
    own = divergences(
        context, sources, answered(rows, written["policy"]), name="answers-policy", contrast=weighed, **common
    )
    theirs = divergences(
        context, sources, answered(rows, written["reference"]), name="answers-start", contrast=None, **common
    )
    found = _lengths("eval", written["policy"], models.tokenizer)
    found |= _lengths("start", written["reference"], models.tokenizer)
    found |= _divergence_metrics(own)
    if models.contrast:
        found |= _reward_metrics(own, theirs, config.beta)
    if weighed is not None:
        for number, (row, tokens) in enumerate(zip(own, written["policy"], strict=True)):
            if number < options.token_plots:
                pieces = models.tokenizer.batch_decode([[token] for token in tokens])
                context.log_figure(f"token_weights_{number + 1}", token_figure(pieces, row))
    texts = {name: models.tokenizer.batch_decode(tokens, skip_special_tokens=True) for name, tokens in written.items()}
    _keep(context, asked, texts, own, theirs, config.beta if models.contrast else None)
    return found | _judged(config, asked, texts, context)


def distinct(pairs: Sequence[Pair]) -> list[Prompt]:
    """Return the prompts of pairs, each once, in their order."""
    from tenfold.methods.aligndistil.preference_rows import Prompt

    found = {json.dumps([dict(turn) for turn in pair.messages]): pair for pair in pairs}
    return [Prompt(messages=pair.messages, origin=pair.origin) for pair in found.values()]


def answered(rows: Sequence[Mapping[str, Any]], tokens: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Return prompts with what was written after them; the labels are on the latter."""
    return [
        {
            "input_ids": list(row["input_ids"]) + list(new),
            "labels": [IGNORED] * len(row["input_ids"]) + list(new),
        }
        for row, new in zip(rows, tokens, strict=True)
    ]


def _lengths(prefix: str, tokens: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, float]:
    pairs = [pair for new in tokens for pair in itertools.pairwise(new)]
    return {
        f"{prefix}/response_length": statistics.fmean(len(new) for new in tokens),
        f"{prefix}/truncated": 100 * sum(new[-1:] != [tokenizer.eos_token_id] for new in tokens) / len(tokens),
        f"{prefix}/distinct_2": 100 * len(set(pairs)) / max(len(pairs), 1),
    }


def _divergence_metrics(own: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return KL of the policy from the starting and the DPO model on its own answers: nats by answer and by token."""
    tokens = max(sum(row["tokens"] for row in own), 1)
    names = {"reference": "start", "dpo": "dpo"}
    found: dict[str, float] = {}
    for key in set(names) & set(own[0]["kl"]):
        total = sum(row["kl"][key] for row in own)
        found |= {
            f"eval/answer_kl_{names[key]}": total / len(own),
            f"eval/answer_kl_{names[key]}_per_token": total / tokens,
        }
    return found


def contrast_reward(row: Mapping[str, Any], beta: float) -> float:
    """Return beta_0 (log pi_dpo - log pi_other) of an answer (Section 3.3)."""
    return beta * (row["log_prob"]["dpo"] - row["log_prob"]["other"])


def _reward_metrics(
    own: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], beta: float
) -> dict[str, float]:
    pairs = [
        (contrast_reward(mine, beta), contrast_reward(other, beta)) for mine, other in zip(own, theirs, strict=True)
    ]
    return {
        # a tie is half a win, as with a judge
        "eval/win_rate": 100 * statistics.fmean((mine > other) + (mine == other) / 2 for mine, other in pairs),
        "eval/answer_reward": statistics.fmean(mine for mine, _ in pairs),
        "start/answer_reward": statistics.fmean(other for _, other in pairs),
    }


def _judged(
    config: AlignDistilConfig, prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]], context: RunContext
) -> dict[str, float]:
    from tenfold.platform.evaluation.judge import compare

    if config.evaluation.judge is None:
        return {}
    judged = compare(
        config.evaluation.judge,
        [request(prompt) for prompt in prompts],
        texts["policy"],
        texts["reference"],
        context.storage,
        "judge.jsonl",
    )
    return {f"eval/{name}": value for name, value in judged.metrics().items()}


def request(prompt: Prompt) -> str:
    """Return what a judge reads as the request: the instruction, or the whole conversation where there is more."""
    if len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.messages)


def _keep(
    context: RunContext,
    prompts: Sequence[Prompt],
    texts: Mapping[str, Sequence[str]],
    own: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    beta: float | None,
) -> None:
    """Store every prompt with both answers and, with a contrast, their rewards."""
    lines = []
    for number, prompt in enumerate(prompts):
        line: dict[str, Any] = {
            "prompt": request(prompt),
            "policy": texts["policy"][number],
            "start": texts["reference"][number],
        }
        if beta is not None:
            line |= {
                "policy_reward": contrast_reward(own[number], beta),
                "start_reward": contrast_reward(theirs[number], beta),
            }
        lines.append(json.dumps(line, ensure_ascii=False))
    text = "".join(line + "\n" for line in lines)
    context.storage.write_text(FILE, text)
    context.tracker.log_text(text, FILE)
