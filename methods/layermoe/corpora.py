"""Which text of which language: the configuration, and reading documents lazily, in the order of their file.

A document is one line of a text file, or the text field of one row. Blank documents are left out.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, model_validator
from tenfold.platform.data.config import DataSource
from tenfold.platform.data.readers import ENDINGS as ROW_ENDINGS
from tenfold.platform.data.readers import BadRow, read_rows
from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.experiment import StrictModel
from tenfold.platform.storage import Storage

SAMPLE = "sample:"
TEXT_ENDINGS = (".txt", ".dev", ".devtest")  # the last two are FLORES's
ENDINGS: Mapping[str, str] = {**ROW_ENDINGS, **dict.fromkeys(TEXT_ENDINGS, "text")}
BY_LINES = ("text", "jsonl")  # read line by line here, also from .gz; all else by `platform.data.readers`
CHECKED_DOCUMENTS = 1000
WHOLE_DIGEST_BYTES = 256 * 2**20


class Corpus(StrictModel):
    """Text of one language in one file or data set."""

    language: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the language's name, as metrics and tables show it: en"
    )
    path: str = Field(
        min_length=1,
        description="file or URI (s3://, gs://): .txt, one document a line; .jsonl, .json, .parquet; .txt.gz, "
        ".jsonl.gz; sample:PATH for packaged samples; a data set's name with format hub",
    )
    format: Literal["auto", "text", "json", "jsonl", "parquet", "hub", "ray"] = Field(
        "auto", description="auto: by the file's ending; hub: Hugging Face data set; ray: read with Ray Data"
    )
    split: str | None = Field(None, description="split of a hub data set; default: train")
    field: str = Field("text", min_length=1, description="name of the text in rows; not read for text files")
    start: int = Field(0, ge=0, description="first line or row taken, from 0; blank lines of a text file count")
    stop: int | None = Field(None, ge=1, description="line or row after the last one taken; default: to the end")

    @model_validator(mode="after")
    def _consistent(self) -> Corpus:
        self.source()
        return self

    def source(self) -> DataSource:
        """Return the same rows as the platform's readers name them.

        Raises:
            ValueError: start, stop, split or path contradict each other.
        """
        kind: Any = "auto" if self.format == "text" else self.format
        return DataSource(path=self.path, format=kind, split=self.split, start=self.start, stop=self.stop)


class LanguageData(StrictModel):
    """Documents by language and how they become blocks of tokens (section 5)."""

    old: list[Corpus] = Field(
        default_factory=list, description="languages that must not be forgotten: replay in stage 2, similarity"
    )
    new: list[Corpus] = Field(min_length=1, description="languages that are added: stage 1 and stage 2")
    earlier: list[Corpus] = Field(
        default_factory=list, description="languages that earlier expansions added: replay in stage 2, similarity"
    )
    evaluation: list[Corpus] = Field(
        min_length=1, description="held-out text, a line or document at a time, of every language above"
    )
    stage1_length: int = Field(1024, ge=2, description="tokens of a block in stage 1 (official: 1024)")
    stage2_length: int = Field(512, ge=2, description="tokens of a block in stage 2 (official: 512)")
    token_budget: int | None = Field(
        None,
        ge=1,
        description="stage 1: documents of a language are taken until they have so many tokens (official: 2e9); "
        "default: all",
    )
    max_documents: int | None = Field(
        100_000, ge=1, description="stage 2: first documents of a language that are read (official: 100 000)"
    )

    @model_validator(mode="after")
    def _languages_are_told_apart(self) -> LanguageData:
        groups = self.groups()
        reserved = [
            name for name in languages_of([*self.old, *self.new, *self.earlier, *self.evaluation]) if name in groups
        ]
        if reserved:
            raise ValueError(f"a language is called {reserved[0]}, as a group is in metrics; use its code, such as en")
        for first, second in itertools.combinations(groups, 2):
            both = [language for language in groups[first] if language in groups[second]]
            if both:
                raise ValueError(f"{', '.join(both)} in both {first} and {second}; a language belongs to one group")
        held_out = languages_of(self.evaluation)
        lacking = [language for group in groups.values() for language in group if language not in held_out]
        if lacking:
            raise ValueError(f"evaluation has no lines of {', '.join(lacking)}; give held-out text of every language")
        return self

    def groups(self) -> dict[str, list[str]]:
        """Return old, new and earlier -> languages, in the order given."""
        return {name: languages_of(getattr(self, name)) for name in ("old", "new", "earlier")}

    def named(self) -> dict[str, list[Corpus]]:
        """Return old, new, earlier and evaluation -> corpora."""
        return {name: list(getattr(self, name)) for name in ("old", "new", "earlier", "evaluation")}


def languages_of(corpora: Sequence[Corpus]) -> list[str]:
    """Return the languages in the order of their first corpus."""
    return list(dict.fromkeys(corpus.language for corpus in corpora))


def by_language(corpora: Sequence[Corpus]) -> dict[str, list[Corpus]]:
    """Return language -> its corpora, both in the order given."""
    return {name: [corpus for corpus in corpora if corpus.language == name] for name in languages_of(corpora)}


def group_of_language(data: LanguageData, expansions: Sequence[Sequence[str]] = ()) -> dict[str, int]:
    """Return language -> the number of its group: 0 for old ones, then one number an expansion, the new ones' last.

    Args:
        data: the languages of an expansion.
        expansions: the languages of each earlier expansion, as the model's configuration lists them. An earlier
            language that none of them lists counts to the last of them.
    """
    groups = data.groups()
    last = max(len(expansions), 1 if groups["earlier"] else 0)
    added = {language: number for number, group in enumerate(expansions, start=1) for language in group}
    earlier = {language: added.get(language, last) for language in groups["earlier"]}
    return dict.fromkeys(groups["old"], 0) | earlier | dict.fromkeys(groups["new"], last + 1)


def replay_warnings(
    data: LanguageData, known: Mapping[str, Sequence[str]] | None = None, later: Sequence[str] = ()
) -> list[str]:
    """Say which languages training will make the model forget, because stage 2 sees no text of them (section 10).

    Args:
        data: the data of an expansion.
        known: group ("old", "earlier") -> languages that the model has by its own record, e.g. an expanded model's.
        later: languages that a later expansion adds; evaluated already, not to be kept.

    Returns:
        One sentence a kind of language; none where every language has replay data.
    """
    trained = {language for group in data.groups().values() for language in group}
    found = []
    if not data.old:
        found.append("data.old is empty: no replay of old languages, so nothing keeps them; give documents of each")
    for group, languages in (known or {}).items():
        lacking = [language for language in languages if language not in trained]
        if lacking:
            found.append(
                f"data.{group} has no documents of {', '.join(lacking)}, which the model has: without replay they are "
                "forgotten"
            )
    told = {language for languages in (known or {}).values() for language in languages}
    evaluated = [name for name in languages_of(data.evaluation) if name not in trained | told | set(later)]
    if evaluated:
        found.append(
            f"data.evaluation measures {', '.join(evaluated)}, without documents in data.old: no replay keeps them"
        )
    return found


def documents(corpora: Corpus | Sequence[Corpus], *, keep_blank: bool = False) -> Iterator[str]:
    """Yield the documents of one or more corpora, one after the other, each in the order of its file.

    Files of lines (.txt, .jsonl, also .gz) and Parquet are read as they are consumed. A text line keeps its spaces.

    Args:
        corpora: what is read.
        keep_blank: yield blank documents too, so that parallel files stay parallel.

    Raises:
        DataError: a file is missing, empty, of an unknown ending, or not UTF-8, or a row has no text; the message
            names file and line.
    """
    for corpus in [corpora] if isinstance(corpora, Corpus) else corpora:
        empty = True
        for text, _ in _texts(corpus):
            is_blank = not text.strip()
            empty = empty and is_blank
            if keep_blank or not is_blank:
                yield text
        if empty:
            raise DataError(f"{corpus.path}: holds no text{_range(corpus)}. Give a file with text, or another range")


def lines_by_language(
    corpora: Sequence[Corpus], max_lines: int | None = None, *, keep_blank: bool = False
) -> dict[str, list[str]]:
    """Return language -> its first documents, in memory: for evaluation. Arguments as for `documents`.

    Raises:
        DataError: see `documents`.
    """
    return {
        language: list(itertools.islice(documents(own, keep_blank=keep_blank), max_lines))
        for language, own in by_language(corpora).items()
    }


def check_corpora(data: LanguageData, limit: int = CHECKED_DOCUMENTS) -> list[tuple[str, str]]:
    """Read the start of every corpus, so that what is wrong is known before any work.

    Args:
        data: what is read.
        limit: documents of a corpus that are read; a longer file may still hold a bad line further down.

    Returns:
        (group and language, what was found) for a plan.

    Raises:
        DataError: see `documents`; the first corpus that cannot be read.
    """
    rows = []
    for name, corpora in data.named().items():
        for language, own in by_language(corpora).items():
            parts = [_seen(corpus, limit) for corpus in own]
            rows.append((f"{name} {language}", "; ".join(parts)))
    return rows


def _seen(corpus: Corpus, limit: int) -> str:
    found = list(itertools.islice(documents(corpus), limit + 1))
    size = sum(len(text.encode()) for text in found[:limit])
    more = "more than " if len(found) > limit else ""
    of_first = f" (the first {limit:,} have {size:,} bytes)" if more else f", {size:,} bytes"
    return f"{corpus.path}: {more}{min(len(found), limit):,} documents{of_first}"


def corpora_digest(corpora: Sequence[Corpus]) -> str:
    """Return a sha256 over which text the corpora mean and what is in it.

    A file of up to 256 MiB counts by its content; a larger one by its size and time of change. Hub data sets and what
    Ray Data reads count by name.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for corpus in corpora:
        digest.update(json.dumps(corpus.model_dump(exclude={"path"}), sort_keys=True).encode())
        if corpus.format in ("hub", "ray"):
            digest.update(corpus.path.encode())
            continue
        with _reading(corpus) as (filesystem, path):
            info = filesystem.get_file_info(path)
            if not info.is_file:
                raise FileNotFoundError(path)
            if info.size > WHOLE_DIGEST_BYTES:
                digest.update(f"{corpus.path} {info.size} {info.mtime_ns}".encode())
                continue
            with filesystem.open_input_stream(path, compression=None) as stream:
                digest.update(hashlib.sha256(stream.read()).digest())
    return digest.hexdigest()


def _range(corpus: Corpus) -> str:
    if corpus.start == 0 and corpus.stop is None:
        return ""
    return f" from {corpus.start} to {'the end' if corpus.stop is None else corpus.stop}"


def _kind(corpus: Corpus) -> str:
    if corpus.format != "auto":
        return corpus.format
    path = PurePosixPath(corpus.path)
    packed = path.suffix == ".gz"
    ending = path.with_suffix("").suffix if packed else path.suffix
    kind = ENDINGS.get(ending)
    if kind is None or (packed and kind not in BY_LINES):
        known = ", ".join([*ENDINGS, *(f"{name}.gz" for name, kind in ENDINGS.items() if kind in BY_LINES)])
        shown = f"{ending}.gz" if packed else ending
        raise DataError(f"{corpus.path}: the ending {shown!r} is unknown; known: {known}. Rename it or set `format`")
    return kind


def _texts(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Yield (text, origin), blank texts too."""
    kind = _kind(corpus)
    if kind not in BY_LINES:
        yield from ((_text_of(row, origin, corpus.field), origin) for row, origin in read_rows(corpus.source()))
        return
    lines = _lines(corpus)
    if kind == "text":
        yield from itertools.islice(lines, corpus.start, corpus.stop)
        return
    rows = ((line, origin) for line, origin in lines if line.strip())
    for line, origin in itertools.islice(rows, corpus.start, corpus.stop):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{origin}: not JSON: {error.msg} at column {error.colno}. Mend the line") from error
        yield _text_of(row, origin, corpus.field), origin


def _text_of(row: Any, origin: str, field: str) -> str:
    if isinstance(row, BadRow):
        raise DataError(f"{origin}: {row.reason}. Mend the row")
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a {type(row).__name__}; needs an object with the text under {field!r}")
    text = row.get(field)
    if isinstance(text, str):
        return text
    found = (
        f"{field!r} is a {type(text).__name__}"
        if field in row
        else f"no {field!r}, only {', '.join(row) or 'nothing'}"
    )
    raise DataError(f"{origin}: {found}; needs text. Mend the row, or set `field` to the name of the text")


def _lines(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Yield (line without its end, origin) of a file that is never whole in memory."""
    with (
        _reading(corpus) as (filesystem, path),
        filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as stream,
        # bytes end at \n alone: text may hold U+2028 and other characters that str.splitlines() takes for line ends
        io.BufferedReader(stream) as lines,
    ):
        for number, line in enumerate(lines, start=1):
            origin = f"{corpus.path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{origin}: not UTF-8 text: {error}. Convert the file to UTF-8") from error
            yield text.removesuffix("\n").removesuffix("\r"), origin


@contextmanager
def _reading(corpus: Corpus) -> Iterator[tuple[Any, str]]:
    """Give (pyarrow file system, path in it) of a file; what fails inside is told with the file's name."""
    from pyarrow import ArrowException

    path = corpus.path
    if path.startswith(SAMPLE):
        path = str(importlib.resources.files("tenfold.samples") / path.removeprefix(SAMPLE))
    folder, name = posixpath.split(path)
    try:
        storage = Storage(folder or ".")
        yield storage.filesystem, posixpath.join(storage.root, name)
    except FileNotFoundError as error:
        raise DataError(f"{corpus.path}: no such file; relative paths start at {Path.cwd()}") from error
    except (OSError, ArrowException) as error:
        cause = str(error).strip().partition("\n")[0]
        raise DataError(f"{corpus.path}: cannot be read: {cause}. Check the file, its path and permissions") from error
    except ConfigError as error:
        raise DataError(f"{corpus.path}: cannot be opened: {error}") from error
