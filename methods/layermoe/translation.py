"""Few-shot translation of FLORES-101 lines (section 5.4 of LayerMoE, arXiv 2505.22582), scored by chrF and BLEU.

A prompt has eight examples, one a line, the same for every sentence and direction, and then the sentence:

    Translation: English: On Monday, ... Greek: ...
    Translation: English: The dog ... Greek:

Beam search goes on until a beam writes "Translation:" anew; the first line is the translation. The paper scores with
COMET (wmt22-comet-da), a model of its own; chrF and BLEU of sacrebleu need none. sacrebleu is not among the package's
dependencies: it is only needed for these scores.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.models.hidden import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START = "Translation:"  # begins every line of a prompt, and ends what is generated
SHOTS, EXAMPLE_SEED = 8, 42
Direction = tuple[str, str]

# English names, by ISO 639-1 code; FLORES's own codes mean the same.
NAMES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "hu": "Hungarian",
    "ja": "Japanese",
    "ko": "Korean",
    "ne": "Nepali",
    "ru": "Russian",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
FLORES_CODES = {
    "ara": "ar",
    "ben": "bn",
    "deu": "de",
    "ell": "el",
    "eng": "en",
    "spa": "es",
    "fra": "fr",
    "hin": "hi",
    "hun": "hu",
    "jpn": "ja",
    "kor": "ko",
    "npi": "ne",
    "rus": "ru",
    "tur": "tr",
    "ukr": "uk",
    "vie": "vi",
    "zho_simpl": "zh",
}
# sacrebleu's ways to cut sentences into words where its default finds no spaces to cut at
BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char"}


@dataclass(frozen=True)
class TranslationScore:
    """Corpus scores of one direction, 0 to 100.

    Attributes:
        chrf: character n-gram F-score (chrF2).
        bleu: word n-gram precision; for Japanese and Korean of characters.
    """

    chrf: float
    bleu: float


def check_sacrebleu(option: str) -> None:
    """Make sure that translations can be scored here.

    Args:
        option: the one by which the user asked for it, for the message.

    Raises:
        ConfigError: the package is missing.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError(
            f"{option}: translations are scored with sacrebleu, which is not installed here. "
            f"Run: pip install 'tenfold[languages]', or leave {option} out"
        )


def directions(pivot: str, languages: Sequence[str]) -> list[Direction]:
    """Return (source, target) from the pivot to every other language and back, in their order."""
    others = [language for language in languages if language != pivot]
    return [direction for other in others for direction in ((pivot, other), (other, pivot))]


def language_name(language: str) -> str:
    """Return a language's English name; of a code that is not in the table, the code."""
    return NAMES.get(FLORES_CODES.get(language, language), language)


def example_indices(number: int, shots: int = SHOTS, seed: int = EXAMPLE_SEED) -> list[int]:
    """Return which of so many lines are examples; of FLORES's 997 the official 654, 114, 25, 759, 281, 250, 228, 142.

    Raises:
        DataError: there are fewer lines than examples.
    """
    if number < shots:
        raise DataError(
            f"translation: {shots} examples a prompt, and {number} lines to draw them from. Give more lines"
        )
    return random.Random(seed).sample(range(number), shots)


def pairs(lines: Mapping[str, Sequence[str]], direction: Direction) -> tuple[list[str], list[str]]:
    """Return the sentences of two languages that both have: a blank line is one that was not translated.

    Raises:
        DataError: the two languages have unequally many lines.
    """
    source, target = (lines[language] for language in direction)
    if len(source) != len(target):
        raise DataError(
            f"translation: {len(source):,} lines of {direction[0]}, {len(target):,} of {direction[1]}. Line n of each "
            "must be the same sentence"
        )
    both = [(one, other) for one, other in zip(source, target, strict=True) if one.strip() and other.strip()]
    return [one for one, _ in both], [other for _, other in both]


def prompts(
    examples: Mapping[str, Sequence[str]],
    sources: Sequence[str],
    direction: Direction,
    *,
    shots: int = SHOTS,
    seed: int = EXAMPLE_SEED,
) -> list[str]:
    """Return one prompt a source line. Spaces around lines are left out.

    Args:
        examples: language -> lines; line n means the same in both languages, a blank one is no example.
        sources: to be translated.
        direction: (source, target) language.
        shots: examples in a prompt.
        seed: decides which lines they are, the same for every direction.

    Raises:
        DataError: the two languages have unequally many lines, or too few.
    """
    source, target = pairs(examples, direction)
    names = [language_name(language) for language in direction]

    def line(text: str, translation: str) -> str:
        return f"{START} {names[0]}: {text.strip()} {names[1]}: {translation.strip()}"

    shown = "".join(f"{line(source[n], target[n])}\n" for n in example_indices(len(source), shots, seed))
    return [shown + line(text, "") for text in sources]


def first_line(text: str) -> str:
    """Return the translation in what a model wrote: its first line, up to where a further example would begin."""
    return text.partition("\n")[0].partition(START)[0].strip()


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 6,
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> list[str]:
    """Return what a model writes after each prompt, cut to the translation.

    Beams end at EOS or at the text "Translation:", however it is cut into tokens. (The official code looks at the
    first beam's token ids alone.) Prompts have the tokenizer's usual special tokens, such as BOS.

    Args:
        model: its mode, and its own generation defaults, are as before afterwards.
        tokenizer: the model's, with an EOS token.
        texts: prompts.
        num_beams: 1 is greedy.
        max_new_tokens: longest answer.
        batch_size: prompts at once.
    """
    import torch
    from transformers import GenerationConfig

    generate: Any = model.generate
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        early_stopping=num_beams > 1,
        max_new_tokens=max_new_tokens,
        stop_strings=[START],
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoded: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in texts]  # type: ignore[misc]
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    answers = [""] * len(encoded)
    own, model.generation_config = model.generation_config, config
    try:
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, mask = _left_padded([encoded[index] for index in batch], pad)
                output = generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    tokenizer=tokenizer,
                )
                written = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
                for index, text in zip(batch, written, strict=True):
                    answers[index] = first_line(text)
    finally:
        model.generation_config = own
    return answers


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """Return (ids, mask), both [B, T] int64."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def score(translations: Sequence[str], references: Sequence[str], target: str) -> TranslationScore:
    """Return chrF2 and BLEU of a corpus, by sacrebleu with its defaults.

    Args:
        translations: of a model.
        references: one for each.
        target: their language.

    Raises:
        ConfigError: sacrebleu is missing.
    """
    check_sacrebleu("evaluation.translation")
    import sacrebleu

    code = FLORES_CODES.get(target, target)
    bleu = sacrebleu.corpus_bleu(list(translations), [list(references)], tokenize=BLEU_TOKENIZERS.get(code, "13a"))
    return TranslationScore(sacrebleu.corpus_chrf(list(translations), [list(references)]).score, bleu.score)


def measure_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    direction: Direction,
    examples: Mapping[str, Sequence[str]],
    lines: Mapping[str, Sequence[str]],
    *,
    max_lines: int | None = None,
    shots: int = SHOTS,
    **generation: int,
) -> tuple[TranslationScore, list[str]]:
    """Translate the first lines of one language into another; return the score and the translations.

    Args:
        model: dense or expanded.
        tokenizer: the model's.
        direction: (source, target) language.
        examples: language -> lines for the examples (FLORES: dev).
        lines: language -> lines to translate, and their references (FLORES: devtest).
        max_lines: first lines that are translated; default: all (official: 1012).
        shots: examples in a prompt.
        generation: as for `translate`.

    Raises:
        ConfigError: sacrebleu is missing.
        DataError: a language's lines are not as many as the other's.
    """
    check_sacrebleu("evaluation.translation")
    source, target = pairs(lines, direction)
    texts = prompts(examples, source[:max_lines], direction, shots=shots)
    translations = translate(model, tokenizer, texts, **generation)
    return score(translations, target[:max_lines], direction[1]), translations


def translation_metrics(
    scores: Mapping[Direction, TranslationScore], pivot: str, groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return `translation/SOURCE-TARGET/chrf` and `/bleu`, and means over the directions of each group's languages.

    A direction belongs to the group of the language that is not the pivot: `translation/old/chrf`, ...
    """
    metrics = {}
    for name in ("chrf", "bleu"):
        by_group: dict[str, list[float]] = {}
        for (source, target), found in scores.items():
            value = getattr(found, name)
            metrics[f"translation/{source}-{target}/{name}"] = value
            other = target if source == pivot else source
            for group, languages in groups.items():
                if other in languages:
                    by_group.setdefault(group, []).append(value)
        metrics |= {f"translation/{group}/{name}": sum(found) / len(found) for group, found in by_group.items()}
    return metrics
