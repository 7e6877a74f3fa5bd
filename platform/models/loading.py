"""Loading tokenizers and causal language models, and describing them without their weights."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ModelError
from tenfold.platform.models.adapters import base_model, is_adapter, merge_adapter, tokenizer_place
from tenfold.platform.models.architectures import known_in
from tenfold.platform.models.configuration import fresh_config, read_config, skeleton
from tenfold.platform.models.conversion import check_gguf, convert_gguf, outline_gguf
from tenfold.platform.models.folder import VOCABULARIES, weight_files
from tenfold.platform.models.heads import head_from_folder, head_of, head_shape
from tenfold.platform.models.manifest import MANIFEST_NAME, check_digest, model_digest, read_manifest
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.references import locate, resolve
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelFacts",
    "check_fit",
    "describe",
    "head_from_folder",
    "head_of",
    "load_causal_lm",
    "load_tokenizer",
    "model_digest",
    "resolve",
    "same_tokenizer",
    "tokenizer_digest",
]

# What tokenizers with one vocabulary may still split differently: spaces, digits, accents, other scripts, code.
PROBES = (
    "Hello, world! It's 3.14, isn't it?",
    "  two spaces,\ttab\n\nblank line  ",
    "caf\u00e9 cafe\u0301 na\u00efve \u2603 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f600",
    "def f(x_1): return x_1 ** 2  # note",
    "1234567890 10,000 x=45",
)


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model without reading its weights.

    Attributes:
        name: as the user wrote it, or `fresh TYPE`.
        model_type: transformers' name of the architecture.
        num_parameters: tied weights count once.
        vocabulary_size: rows of the output head; at least tokenizer_length.
        hidden_size: columns of the output head.
        num_layers: transformer blocks.
        dtype: of the weights in memory.
        tokenizer_length: entries of the tokenizer, added tokens included.
        digest: `model_digest` of a folder with a manifest, sha256 of a GGUF file; None where finding out would need
            reading all weights, and for fresh models.
    """

    name: str
    model_type: str
    num_parameters: int
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    dtype: str
    tokenizer_length: int
    digest: str | None


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source. One without padding token pads with its EOS token.

    No weights are converted for it.

    Raises:
        ModelError: it is missing, damaged, or has no EOS token.
    """
    own = source.tokenizer is None
    reference = source.tokenizer or source.model or ""
    place = locate(reference, revision=source.revision if own else None, weights=False, code=source.trust_remote_code)
    if is_adapter(place):
        place = tokenizer_place(place)
    folder = place if place.is_dir() else outline_gguf(place, sha256=source.sha256 if own else None)
    tokenizer = _read_tokenizer(folder, source.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{reference}: its tokenizer has no EOS token, so no answer could end. Add eos_token to it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"{folder}: no tokenizer (none of {', '.join(VOCABULARIES)}). Name a place that has one as tokenizer"
        )
    known_in(folder)  # a tokenizer may be chosen by the model's type
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Damaged files raise whatever their parser raises.
        raise ModelError(
            f"{folder}: the tokenizer cannot be read: {type(error).__name__}: {error}. Get it again, or give another "
            f"one as tokenizer"
        ) from error


def load_causal_lm(source: ModelSource, *, seed: int = 0, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Load a model, or make a fresh one; in evaluation mode.

    Args:
        source: which model. Only safetensors and GGUF are read, nothing is unpickled.
        seed: decides a fresh model's weights, together with the dtype and with whether ZeRO-3 is on (transformers then
            draws them in another order); the global random state is left alone.
        dtype: overrides the source's: "float32", torch.bfloat16, ... or "auto".

    Raises:
        ModelError: it is missing, damaged or incomplete, has no language-model head, or the tokenizer has more entries
            than the head has rows.
    """
    wanted = _dtype_name(dtype if dtype is not None else source.dtype)
    if source.config is not None:
        tokenizer = load_tokenizer(source)
        model = _fresh(source, tokenizer, seed, wanted)
    else:
        # Small files are looked at before the weights are read.
        folder = _checked_folder(source)
        tokenizer = load_tokenizer(source)
        model = _pretrained(folder, wanted, source.trust_remote_code)
    check_fit(source.name, len(tokenizer), head_shape(model)[0])
    return model.eval()


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fresh(source: ModelSource, tokenizer: PreTrainedTokenizerBase, seed: int, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    config = fresh_config(source.config or {}, tokenizer)
    check_fit(source.name, len(tokenizer), config.get_text_config().vocab_size)
    name = _memory_dtype(config, dtype)
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, name))


def _memory_dtype(config: PretrainedConfig, dtype: str) -> str:
    return dtype if dtype != "auto" else _dtype_name(config.dtype or "float32")


def _checked_folder(source: ModelSource) -> Path:
    place = locate(source.model or "", revision=source.revision, code=source.trust_remote_code)
    if place.is_file():
        folder = convert_gguf(place, sha256=source.sha256)
    else:
        folder = merge_adapter(place) if is_adapter(place) else place
        check_digest(folder, source.sha256)
    read_config(folder, trust_remote_code=source.trust_remote_code)
    weight_files(folder)
    return folder


def _pretrained(folder: Path, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # a log file has no use for a bar
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Safetensors, JSON and shape checks raise errors of their own kinds.
        raise ModelError(
            f"{folder}: cannot be loaded as a causal language model: {type(error).__name__}: {error}. Get the model "
            f"again, or give one of another kind"
        ) from error
    model, found = loaded
    absent = sorted(found["missing_keys"])
    if absent:
        # transformers would fill them with random numbers and go on.
        raise ModelError(
            f"{folder}: {len(absent)} weights are missing, the first is {absent[0]}. Its config.json belongs to "
            f"another model, or the weights are incomplete"
        )
    return model


def check_fit(name: str, tokenizer_length: int, vocabulary_size: int) -> None:
    """Make sure that every token has a row in the head.

    Raises:
        ModelError: the tokenizer has more entries than the head has rows.
    """
    if tokenizer_length > vocabulary_size:
        raise ModelError(
            f"{name}: the tokenizer has {tokenizer_length} entries, the model's head only {vocabulary_size} rows. "
            f"Give the tokenizer that belongs to the model; for a fresh model leave out vocab_size"
        )


def describe(source: ModelSource) -> ModelFacts:
    """Return sizes from configuration and tokenizer alone, for the plan: reads no weights, converts nothing.

    Raises:
        ModelError: model or tokenizer are missing, damaged, or do not fit together.
    """
    config, dtype, digest = _known(source)
    tokenizer = load_tokenizer(source)
    model = skeleton(config, trust_remote_code=source.trust_remote_code)
    rows, columns = head_shape(model)
    check_fit(source.name, len(tokenizer), rows)
    return ModelFacts(
        name=source.name,
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary_size=rows,
        hidden_size=columns,
        num_layers=config.get_text_config().num_hidden_layers,
        dtype=_memory_dtype(config, dtype),
        tokenizer_length=len(tokenizer),
        digest=digest,
    )


def outline(source: ModelSource) -> PreTrainedModel:
    """Return a source's model without weights (on torch's meta device).

    Raises:
        ModelError: model or tokenizer are missing or damaged.
    """
    config, _, _ = _known(source)
    return skeleton(config, trust_remote_code=source.trust_remote_code)


def _known(source: ModelSource) -> tuple[PretrainedConfig, str, str | None]:
    """Return (configuration, dtype that is asked for, digest where it costs nothing)."""
    if source.config is not None:
        return fresh_config(source.config, load_tokenizer(source)), source.dtype, None
    place = locate(source.model or "", revision=source.revision, weights=False, code=source.trust_remote_code)
    if is_adapter(place):
        base = {"model": str(base_model(place, weights=False)), "sha256": None, "revision": None}
        config, dtype, _ = _known(source.model_copy(update=base))
        return config, dtype, None  # the merged model's digest is known when it has been merged
    folder = place if place.is_dir() else outline_gguf(place, sha256=source.sha256)
    config = read_config(folder, trust_remote_code=source.trust_remote_code)
    if place.is_file():
        digest = check_gguf(place, source.sha256)
        return config, "float32" if source.dtype == "auto" else source.dtype, digest
    known = read_manifest(place).digest if (place / MANIFEST_NAME).is_file() else None
    return config, source.dtype, known


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers are interchangeable: equal vocabularies, and equal ids for all probe texts."""
    return first.get_vocab() == second.get_vocab() and _probe_ids(first) == _probe_ids(second)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 over the vocabulary, the ids of the probe texts and the chat template."""
    content = [tokenizer.get_vocab(), _probe_ids(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
