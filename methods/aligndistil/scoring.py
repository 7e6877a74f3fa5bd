"""What models say about given responses, and what they answer: pieces of work for the cluster, one model at a time.

Nothing here needs two whole models at once: of each only the hidden states at the label positions stay, and its head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.methods.aligndistil.extrapolation import Contrast
    from tenfold.platform.context import RunContext
    from tenfold.platform.losses.chunked_rows import Side

Rows = Sequence[Mapping[str, Any]]
BATCH = 8


def log_probabilities(
    context: RunContext, source: ModelSource, rows: Rows, *, name: str, dtype: str, num_columns: int
) -> list[float]:
    """Return the summed log-probability (nats) of each row's labels, `input_ids` and `labels` given."""
    common = {"source": source.model_dump(mode="json"), "dtype": dtype, "num_columns": num_columns}
    return _spread(context, log_probability_piece, plain(rows), common, name)


def answers(
    context: RunContext,
    source: ModelSource,
    digest: str,
    prompts: Sequence[Sequence[int]],
    generation: GenerationOptions,
    *,
    dtype: str,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the EOS that ends them; equal questions are answered once.

    Args:
        context: the run.
        source: the model.
        digest: of its weights.
        prompts: token ids.
        generation: how they are drawn.
        dtype: what it computes in.
    """
    key = _key([digest, dtype, generation.model_dump(mode="json"), [list(p) for p in prompts], context.seed])
    cached = f"answers/{key}.json"
    if context.cache.exists(cached):
        return json.loads(context.cache.read_text(cached))
    common = {
        "source": source.model_dump(mode="json"),
        "dtype": dtype,
        "generation": generation.model_dump(mode="json"),
        "seed": context.seed,
    }
    found = _spread(context, answer_piece, [list(prompt) for prompt in prompts], common, f"answers-{key}")
    context.cache.write_text(cached, json.dumps(found))
    return found


def divergences(
    context: RunContext,
    sources: Mapping[str, ModelSource],
    rows: Rows,
    *,
    name: str,
    dtype: str,
    num_columns: int,
    contrast: Contrast | None,
) -> list[dict[str, Any]]:
    """Compare the policy with the frozen models on given responses.

    Args:
        context: the run.
        sources: `policy`, and any of `reference`, `dpo`, `other`.
        rows: `input_ids` and `labels`.
        name: of this piece of work in the run.
        dtype: what all models compute in.
        num_columns: entries of the tokenizer.
        contrast: the token weights are wanted as well; needs `dpo` and `other`.

    Returns:
        For each row: `tokens`; `log_prob` model -> nats; `kl` frozen model -> sum over the tokens of KL(policy ||
        model); with a contrast `alpha`, `tvd`, `weight` and `kl_teacher` by token.
    """
    common = {
        "sources": {key: source.model_dump(mode="json") for key, source in sources.items()},
        "dtype": dtype,
        "num_columns": num_columns,
        "contrast": None if contrast is None else asdict(contrast),
    }
    return _spread(context, divergence_piece, plain(rows), common, name)


def log_probability_piece(item: dict[str, Any]) -> list[float]:
    """Score some rows; runs on a worker."""
    hidden, targets, sizes = _read(item["source"], item["dtype"], item["rows"])
    return [float(part.sum()) for part in _log_probs(hidden, targets, item["num_columns"]).split(sizes)]


def answer_piece(item: dict[str, Any]) -> list[list[int]]:
    """Answer some prompts; runs on a worker."""
    from tenfold.platform.models.generation import generate_tokens
    from tenfold.platform.models.loading import load_tokenizer

    model = _model(item["source"], item["dtype"])
    tokenizer = load_tokenizer(ModelSource.model_validate(item["source"]))
    options = GenerationOptions.model_validate(item["generation"])
    prompts: list[list[int]] = item["rows"]
    # prompts of like length share a batch, which pads them on the left
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    for number, start in enumerate(range(0, len(order), options.batch_size)):
        chosen = order[start : start + options.batch_size]
        seed = hash((item["seed"], item["piece"], number)) % 2**63
        made = generate_tokens(model, tokenizer, [prompts[index] for index in chosen], options, seed=seed)
        for index, tokens in zip(chosen, made, strict=True):
            found[index] = tokens
    return found


def divergence_piece(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the models on some rows; runs on a worker."""
    from tenfold.methods.aligndistil.extrapolation import Contrast
    from tenfold.methods.aligndistil.fused import fused_alignment_loss

    columns, sides = item["num_columns"], {}
    targets: Any = None
    sizes: list[int] = []
    for name, source in item["sources"].items():
        sides[name], targets, sizes = _read(source, item["dtype"], item["rows"])
    policy = sides.pop("policy")
    log_probs = {name: _log_probs(side, targets, columns) for name, side in {"policy": policy, **sides}.items()}
    kl = {name: _kl(policy, side, columns) for name, side in sides.items()}
    found = [
        {
            "tokens": size,
            "log_prob": {name: float(values.split(sizes)[row].sum()) for name, values in log_probs.items()},
            "kl": {name: float(values.split(sizes)[row].sum()) for name, values in kl.items()},
        }
        for row, size in enumerate(sizes)
    ]
    if item["contrast"] is not None:
        contrast = Contrast(**item["contrast"])
        sums = fused_alignment_loss(policy, sides["dpo"], sides["other"], contrast, None, num_columns=columns)
        for name in ("alpha", "tvd", "weight", "kl"):
            for row, part in enumerate(sums.rows[name].split(sizes)):
                found[row]["kl_teacher" if name == "kl" else name] = part.tolist()
    return found


def _log_probs(side: Side, targets: Any, num_columns: int) -> Any:
    from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows

    return -linear_cross_entropy_rows(side.hidden, side.head, targets, bias=side.bias, num_columns=num_columns)


def _kl(policy: Side, other: Side, num_columns: int) -> Any:
    """Return KL(policy || other) of every row, [R]."""
    from tenfold.platform.losses.chunked_rows import DivergenceTerm, Needs, Task, run
    from tenfold.platform.losses.divergence import DivergenceOptions

    weight = policy.hidden.new_ones(len(policy.hidden)).float()
    term = DivergenceTerm("reverse_kl", DivergenceOptions(), weight, num_columns)
    return run(Task(policy, other, 256, divergence_term=term), Needs()).divergence_rows


def _read(source: dict[str, Any], dtype: str, rows: list[dict[str, Any]]) -> tuple[Side, Any, list[int]]:
    """Return a model's hidden rows with its head, the labels [R], and the label positions of each row."""
    import torch
    from tenfold.platform.data.collator import CausalCollator
    from tenfold.platform.data.positions import label_positions, next_labels
    from tenfold.platform.losses.chunked_rows import Side
    from tenfold.platform.models.heads import head_of
    from tenfold.platform.models.hidden import check_head, final_hidden

    model = _model(source, dtype)
    check_head(model)
    head, bias = head_of(model)
    collate = CausalCollator(pad_token_id=0)
    states: list[Any] = [None] * len(rows)
    targets: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = {key: value.to(model.device) for key, value in collate([rows[i] for i in chosen]).items()}
            positions = label_positions(batch["labels"])
            sizes = positions.sum(1).tolist()
            hidden = final_hidden(model, batch["input_ids"], batch["attention_mask"])[positions]
            for index, own, labels in zip(
                chosen, hidden.split(sizes), next_labels(batch["labels"]).split(sizes), strict=True
            ):
                states[index], targets[index] = own, labels
        side = Side(torch.cat(states), head.detach(), None if bias is None else bias.detach())
        return side, torch.cat(targets), [len(part) for part in targets]


def _model(source: dict[str, Any], dtype: str) -> Any:
    import torch
    from tenfold.platform.models.loading import load_causal_lm

    model = load_causal_lm(ModelSource.model_validate(source), dtype=dtype).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def _spread(context: RunContext, function: Any, rows: list[Any], common: dict[str, Any], name: str) -> list[Any]:
    """Apply a piece function to rows, shared out over as many pieces as there are workers; results in row order."""
    number = max(min(context.compute.max_workers, len(rows)), 1)
    items = [{**common, "piece": piece, "rows": rows[piece::number]} for piece in range(number)]
    keys = [_key([item, context.seed]) for item in items]
    compute = context.compute
    results = context.map(
        function, items, name=name, keys=keys, cpus=compute.cpus_per_worker, gpus=compute.gpus_per_worker
    )
    found: list[Any] = [None] * len(rows)
    for piece in range(number):
        found[piece::number] = results[piece]
    return found


def plain(rows: Rows) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of rows as plain lists."""
    return [{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows]


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
