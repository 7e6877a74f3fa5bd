"""Text that comes in pieces: whole characters, right spaces, nothing of a stop string."""

import random

import pytest
from tenfold.serve.decoding import StopMatcher, TextDecoder


def bytes_decoder(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def words_decoder(ids):
    """Like SentencePiece: words carry their space in front, and the first one loses it."""
    return "".join(f" {word}" for word in ids).removeprefix(" ")


def decode_all(text):
    decoder = TextDecoder(bytes_decoder)
    pieces = [decoder.push(byte) for byte in text.encode()]
    return pieces, decoder.finish()


def test_pieces_join_to_the_text():
    text = "na\u00efve \u4f60\u597d \U0001f600 ok"
    pieces, rest = decode_all(text)
    assert "".join(pieces) == text
    assert rest == ""


def test_nothing_is_given_out_inside_a_character():
    pieces, _ = decode_all("a\U0001f600")
    assert pieces == ["a", "", "", "", "\U0001f600"]


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    decoder = TextDecoder(bytes_decoder)
    assert decoder.push(0x41) == "A"
    assert decoder.push(0xF0) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_a_space_between_prompt_and_answer_is_kept():
    decoder = TextDecoder(words_decoder, ["Once", "upon"])
    assert [decoder.push("a"), decoder.push("time")] == [" a", " time"]


def test_without_a_prompt_the_first_word_has_no_space():
    decoder = TextDecoder(words_decoder)
    assert [decoder.push("a"), decoder.push("time")] == ["a", " time"]


def test_pieces_join_to_the_whole_decoding_for_any_valid_text(tiny_tokenizer):
    def decode(ids):
        return tiny_tokenizer.decode(ids, skip_special_tokens=True)

    text = "The caf\u00e9 \u2603 in \u4f60\u597d: He goes to the park every day. \U0001f600\n\ttab"
    ids = tiny_tokenizer(text)["input_ids"]
    decoder = TextDecoder(decode)
    assert "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish() == text == decode(ids)


def run_stop(pieces, stops):
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.matched:
            return out, True
    out.append(matcher.finish())
    return out, False


def test_a_stop_string_split_over_pieces_is_found_and_not_given_out():
    out, matched = run_stop(["Hello E", "N", "D of it"], ["END"])
    assert ("".join(out), matched) == ("Hello ", True)


def test_what_may_be_the_start_of_a_stop_string_waits():
    out, matched = run_stop(["a<", "|", "b"], ["<|end|>"])
    assert out == ["a", "", "<|b", ""]
    assert not matched


def test_what_waited_comes_at_the_end_when_there_was_no_stop():
    out, matched = run_stop(["text EN"], ["END"])
    assert ("".join(out), matched) == ("text EN", False)


def test_the_first_of_several_stop_strings_counts():
    out, _ = run_stop(["one two three"], ["three", "two"])
    assert "".join(out) == "one "


def test_a_stop_string_that_overlaps_itself_is_found():
    out, matched = run_stop(list("xaaab"), ["aab"])
    assert ("".join(out), matched) == ("xa", True)


def test_after_a_stop_string_nothing_more_is_given_out():
    matcher = StopMatcher(["."])
    assert matcher.push("end. more") == "end"
    assert matcher.push("still more") == ""
    assert matcher.finish() == ""


def test_without_stop_strings_nothing_waits():
    out, _ = run_stop(["a", "b"], [])
    assert out == ["a", "b", ""]


@pytest.mark.parametrize("seed", range(30))
def test_any_cutting_gives_what_a_search_in_the_whole_text_gives(seed):
    generator = random.Random(seed)
    text = "".join(generator.choice("ab") for _ in range(30))
    stops = ["".join(generator.choice("ab") for _ in range(generator.randint(3, 6))) for _ in range(2)]
    out, matched = run_stop(list(text), stops)
    # Character by character the stop string that is complete first wins.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert matched == bool(ends)
    if ends:
        end = min(ends)
        begin = min(end - len(stop) for stop in stops if text[:end].endswith(stop))
        assert "".join(out) == text[:begin]
    else:
        assert "".join(out) == text
