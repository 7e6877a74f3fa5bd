"""What an expansion is measured by on held-out lines (section 5.4 of LayerMoE, arXiv 2505.22582, offline measures).

Loss per UTF-8 byte compares languages and tokenizers; its change is forgetting on old languages, plasticity on new
ones. Routing is read off the same lines: how much expert 0 (the original FFN) gets, and what the classifiers say.

Legend: B rows, T padded length, E experts of the layer, k experts a token uses, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tenfold.methods.layermoe.routing import allowed_experts, top_k_routing
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.errors import ModelError
from tenfold.platform.evaluation.perplexity import perplexity, token_nll
from tenfold.platform.models.hidden import evaluating, final_hidden

if TYPE_CHECKING:
    from tenfold.methods.layermoe.block import ExpertBlock
    from tenfold.methods.layermoe.state import RoutingState
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, list[int]]


@dataclass(frozen=True)
class LanguageLoss:
    """The next-token loss of a model on the lines of one language.

    Attributes:
        nats: summed over the tokens of all lines and the EOS of each.
        tokens: how many.
        bytes: UTF-8 bytes of the lines.
        lines: how many.
    """

    nats: float
    tokens: int
    bytes: int
    lines: int

    @property
    def nats_per_byte(self) -> float:
        """The loss divided by the bytes."""
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """The same to base 2: what a coder that uses this model would need."""
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """Per token: not comparable over tokenizers."""
        return perplexity(self.nats, self.tokens)


def line_rows(lines: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return `input_ids` and `labels` of BOS + line + EOS, with labels on all but the first.

    A tokenizer without BOS gets EOS in its place: in training a document comes after the EOS of another. So every
    token of a line is predicted from something, with any tokenizer.

    Raises:
        ModelError: the tokenizer has no EOS token.
    """
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no EOS token, which ends every line. Set eos_token in its folder")
    begin: Any = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(list(lines), add_special_tokens=False, verbose=False)["input_ids"]
    return [{"input_ids": [begin, *ids, end], "labels": [IGNORED, *ids, end]} for ids in encoded]


def loss_by_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
    chunk: int = 512,
) -> dict[str, LanguageLoss]:
    """Return language -> loss on its lines, by teacher forcing; with classifiers, each line is routed by itself.

    Args:
        model: a dense or an expanded causal language model.
        tokenizer: the model's.
        lines: language -> at least one line that is not empty.
        batch_size: lines at once; changes no value beyond rounding.
        chunk: label positions whose logits exist at once; changes no value beyond rounding.
    """
    found = {}
    for language, texts in lines.items():
        rows = sorted(line_rows(texts, tokenizer), key=lambda row: -len(row["input_ids"]))
        nats, tokens = token_nll(model, rows, batch_size=batch_size, chunk=chunk)
        size = sum(len(text.encode("utf-8")) for text in texts)
        found[language] = LanguageLoss(nats, tokens, size, len(texts))
    return found


def bits_by_language(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lines: Mapping[str, Sequence[str]], **options: int
) -> dict[str, float]:
    """Return language -> bits per byte; arguments as for `loss_by_language`."""
    losses = loss_by_language(model, tokenizer, lines, **options)
    return {language: loss.bits_per_byte for language, loss in losses.items()}


def group_means(values: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return group -> plain mean over those of its languages that have a value; groups without any are left out."""
    present = {name: [values[each] for each in languages if each in values] for name, languages in groups.items()}
    return {name: sum(found) / len(found) for name, found in present.items() if found}


def loss_metrics(
    losses: Mapping[str, LanguageLoss],
    groups: Mapping[str, Sequence[str]],
    base: Mapping[str, LanguageLoss] | None = None,
) -> dict[str, float]:
    """Return metrics of held-out lines, means over a group's languages among them.

    Args:
        losses: of the model.
        groups: old, new and earlier -> languages.
        base: of the model before the expansion, on the same lines.

    Returns:
        `eval/LANGUAGE/bits_per_byte`, `eval/LANGUAGE/nats_per_byte`, the same for GROUP; with `base` also, in nats per
        byte, `eval/forgetting` (old languages, after - before), `eval/forgetting_earlier` and `eval/plasticity` (new
        languages, before - after), where such languages are measured.
    """
    metrics = {}
    for name in ("nats_per_byte", "bits_per_byte"):
        values = {language: getattr(loss, name) for language, loss in losses.items()}
        for key, value in (values | group_means(values, groups)).items():
            metrics[f"eval/{key}/{name}"] = value
    if base is None:
        return metrics
    rises = {
        language: loss.nats_per_byte - base[language].nats_per_byte
        for language, loss in losses.items()
        if language in base
    }
    means = group_means(rises, groups)
    changes = {"forgetting": means.get("old"), "forgetting_earlier": means.get("earlier")}
    changes["plasticity"] = -means["new"] if "new" in means else None
    return metrics | {f"eval/{name}": value for name, value in changes.items() if value is not None}


@dataclass
class LayerCounts:
    """What one layer did with the tokens of one language; sums, which may be added over workers.

    Attributes:
        tokens: real tokens that were routed.
        base_mass: summed router probability of expert 0, p_0, softmax over all experts.
        base_first: tokens whose most probable expert is expert 0.
        load: by expert, how many tokens went through it, after what the classifier decided.
        sequences: lines whose class is known and which a classifier decided on; 0 for a layer without.
        right: those that it decided on as is true.
    """

    tokens: int = 0
    base_mass: float = 0.0
    base_first: int = 0
    load: list[int] = field(default_factory=list)
    sequences: int = 0
    right: int = 0


Counts = dict[str, dict[int, LayerCounts]]


def count_routing(
    state: RoutingState,
    blocks: Mapping[int, ExpertBlock],
    mask_BT: Tensor,
    group: int | None,
    counts: dict[int, LayerCounts],
) -> None:
    """Add what one forward pass over lines of one language did.

    Args:
        state: with the logits that it collected.
        blocks: layer -> its experts, as the model has them.
        mask_BT: bool, True = a real token.
        group: number of the language's group, 0 = old; None where it belongs to none.
        counts: layer -> counts, changed in place.
    """
    for layer, logits_BTE in state.router_logits.items():
        real = mask_BT.flatten()
        rows = logits_BTE.flatten(0, 1)[real]
        own, block = counts.setdefault(layer, LayerCounts(load=[0] * rows.shape[-1])), blocks[layer]
        own.tokens += len(rows)
        own.base_mass += rows.softmax(dim=-1)[:, 0].sum(dtype=torch.float64).item()
        own.base_first += int((rows.argmax(dim=-1) == 0).sum())
        allowed = None
        if layer in state.decisions:
            num_classes = state.classifier_logits[layer].shape[-1]
            classes = state.decisions[layer]
            classes_BT = classes if classes.dim() == 2 else classes[:, None].expand(mask_BT.shape)
            allowed = allowed_experts(classes_BT.flatten()[real], block.sizes, num_classes)
            if group is not None:
                own.sequences += len(mask_BT)
                chosen = state.classifier_logits[layer].argmax(dim=-1)
                own.right += int((chosen == min(group, num_classes - 1)).sum())
        weights, experts = top_k_routing(rows, block.top_k, allowed)
        went = experts[weights > 0].bincount(minlength=rows.shape[-1])
        own.load = [before + now for before, now in zip(own.load, went.tolist(), strict=True)]


@torch.no_grad()
def routing_by_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Mapping[str, Sequence[str]],
    groups: Mapping[str, int],
    *,
    batch_size: int = 16,
) -> Counts:
    """Return language -> layer -> what router and classifier did with the language's lines; dense layers have none.

    Args:
        model: an expanded model; routes by its classifiers' own decisions.
        tokenizer: the model's.
        lines: language -> lines.
        groups: language -> number of its group, 0 = old (`corpora.group_of_language`); others have no true class.
        batch_size: lines at once; changes nothing beyond rounding.

    Raises:
        ModelError: the model has no experts.
    """
    from tenfold.methods.layermoe.modeling import blocks_of
    from tenfold.methods.layermoe.state import collecting

    blocks, collate = blocks_of(model), CausalCollator(pad_token_id=0)
    found: Counts = {}
    with evaluating(model):
        for language, texts in lines.items():
            rows = sorted(line_rows(texts, tokenizer), key=lambda row: -len(row["input_ids"]))
            counts = found.setdefault(language, {})
            for start in range(0, len(rows), batch_size):
                batch = {
                    name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()
                }
                with collecting(model) as state:
                    final_hidden(model, batch["input_ids"], batch["attention_mask"])
                mask = batch["attention_mask"].bool()
                count_routing(state, blocks, mask, groups.get(language), counts)
    return found


def routing_metrics(counts: Counts, groups: Mapping[str, int]) -> dict[str, float]:
    """Return what routing does to old and to new languages, by layer and in the mean over layers.

    Args:
        counts: of `routing_by_language`.
        groups: language -> number of its group; 0 is old, all others are new; languages without one are left out.

    Returns:
        For each KIND of old and new, where there are such languages: `routing/KIND/p0` (mean probability of expert 0
        over tokens), `routing/KIND/top1_base` (share of tokens whose most probable expert it is),
        `routing/KIND/base_load` (share of the routed slots that it gets, after the classifiers),
        `routing/KIND/classifier_accuracy`, and the same with `/layer_000` for every layer that has it.
    """
    metrics = {}
    for kind in ("old", "new"):
        chosen = [
            own
            for language, own in counts.items()
            if language in groups and (groups[language] == 0) == (kind == "old")
        ]
        by_layer: dict[str, dict[int, float]] = {}
        for layer in sorted({layer for own in chosen for layer in own}):
            parts = [own[layer] for own in chosen if layer in own]
            tokens, sequences = sum(part.tokens for part in parts), sum(part.sequences for part in parts)
            slots = sum(sum(part.load) for part in parts)
            values = {
                "p0": sum(part.base_mass for part in parts) / tokens,
                "top1_base": sum(part.base_first for part in parts) / tokens,
                "base_load": sum(part.load[0] for part in parts) / slots,
            }
            if sequences:
                values["classifier_accuracy"] = sum(part.right for part in parts) / sequences
            for name, value in values.items():
                by_layer.setdefault(name, {})[layer] = value
        for name, found in by_layer.items():
            metrics[f"routing/{kind}/{name}"] = sum(found.values()) / len(found)
            metrics |= {f"routing/{kind}/{name}/layer_{layer:03d}": value for layer, value in found.items()}
    return metrics


def load_shares(counts: Counts, num_layers: int) -> dict[str, list[list[float]]]:
    """Return language -> by layer the share of the routed slots that each expert gets; empty for a dense layer."""
    return {
        language: [
            [slots / sum(own[layer].load) for slots in own[layer].load] if layer in own else []
            for layer in range(num_layers)
        ]
        for language, own in counts.items()
    }


def counts_to_json(counts: Counts) -> dict[str, Any]:
    """Return plain data."""
    return {language: {str(layer): asdict(own) for layer, own in by.items()} for language, by in counts.items()}


def counts_from_json(data: Mapping[str, Mapping[str, Any]]) -> Counts:
    """Return the counts that `counts_to_json` wrote."""
    return {language: {int(layer): LayerCounts(**own) for layer, own in by.items()} for language, by in data.items()}
