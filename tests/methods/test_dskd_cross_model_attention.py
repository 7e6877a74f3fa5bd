"""Cross-model attention against the worked numbers, plain loops and its invariants (DSKD, arXiv 2406.17328)."""

import math

import pytest
import torch
from tenfold.methods.dskd.cross_model_attention import Sequences, attention_scores, cross_model_attention, normalise
from torch import nn

IGNORED = -100


def worked_example():
    """One student and two teacher positions, hidden sizes 1, two entries in each vocabulary."""
    student = Sequences(
        torch.tensor([[[0.5]]]), torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[1.0], [2.0]])
    )
    teacher = Sequences(
        torch.tensor([[[2.0], [1.0]]]), torch.tensor([[0, 1]]), torch.tensor([[1, 0]]), torch.tensor([[1.0], [3.0]])
    )
    return student, teacher


def random_batch(dtype=torch.float64, seed=0):
    """Three samples of unequal lengths: student n = 5, d = 3; teacher m = 7, D = 4.

    The second has a prompt of one token for the student, the last no student label.
    """
    generator = torch.Generator().manual_seed(seed)

    def sequences(length, size, entries, spans):
        ids = torch.randint(1, entries, (3, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        for row, (start, stop) in enumerate(spans):
            labels[row, :start] = IGNORED
            labels[row, stop:] = IGNORED
        hidden = torch.randn(3, length, size, generator=generator, dtype=dtype)
        table = torch.randn(entries, size, generator=generator, dtype=dtype)
        return Sequences(hidden.requires_grad_(), ids[:, :-1], labels, table.requires_grad_())

    student = sequences(5, 3, 11, [(1, 4), (0, 3), (0, 0)])
    teacher = sequences(7, 4, 13, [(2, 7), (1, 2), (3, 5)])
    torch.manual_seed(seed)
    projectors = [nn.Linear(*sizes, dtype=dtype) for sizes in ((6, 8), (4, 3), (3, 4))]
    return student, teacher, projectors


def slowly(student, teacher, query, t2s, s2t, masked=False):
    """Loops over the formulas, sample by sample and position by position."""

    def std(rows, masks):
        chosen = [row for sample, mask in zip(rows, masks, strict=True) for row, one in zip(sample, mask, strict=True)
                  if one or not masked]  # fmt: skip
        numbers = torch.stack(chosen).flatten()
        return ((numbers - numbers.mean()) ** 2).sum().div(len(numbers) - 1).sqrt()

    def embedded(side, ids):
        return [
            [side.embedding[i if y != IGNORED else 0] for i, y in zip(row, labels, strict=True)]
            for row, labels in zip(ids.tolist(), side.labels.tolist(), strict=True)
        ]

    s_mask, t_mask = (side.labels != IGNORED for side in (student, teacher))
    s_now, s_next = embedded(student, student.input_ids), embedded(student, student.labels)
    t_now, t_next = embedded(teacher, teacher.input_ids), embedded(teacher, teacher.labels)
    keys = [[torch.cat(pair) for pair in zip(*rows, strict=True)] for rows in zip(t_now, t_next, strict=True)]
    key_std, hidden_std, next_std = std(keys, t_mask), std(teacher.hidden, t_mask), std(t_next, t_mask)
    to_student, to_teacher = [], []
    for b in range(len(s_now)):
        n, m = len(s_now[b]), len(t_now[b])
        scores = [
            [
                (query(torch.cat([s_now[b][i], s_next[b][i]])) @ (keys[b][j] / key_std)) / math.sqrt(len(keys[b][j]))
                - 100000 * (1 - int(s_mask[b, i] and t_mask[b, j]))
                for j in range(m)
            ]
            for i in range(n)
        ]
        values = [t2s(teacher.hidden[b, j] / hidden_std + t_next[b][j] / next_std) for j in range(m)]
        own = [s2t(student.hidden[b, i]) for i in range(n)]
        for i in range(n):
            if s_mask[b, i]:
                weights = torch.softmax(torch.stack(scores[i]), 0)
                to_student.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        for j in range(m):
            if t_mask[b, j]:
                weights = torch.softmax(torch.stack([scores[i][j] for i in range(n)]), 0)
                to_teacher.append(sum(w * v for w, v in zip(weights, own, strict=True)))
    return torch.stack(to_student), torch.stack(to_teacher)


def test_the_tiny_worked_example():
    student, teacher = worked_example()
    keys = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
    assert keys.std().item() == pytest.approx(1.154701, abs=1e-6)
    scores = attention_scores(torch.tensor([[[1.0, 2.0]]]), normalise(keys), student.mask, teacher.mask)
    torch.testing.assert_close(scores, torch.tensor([[[4.286607, 3.061862]]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.softmax(-1), torch.tensor([[[0.772897, 0.227103]]]), rtol=0, atol=1e-5)
    values = []
    t2s, s2t = cross_model_attention(
        student, teacher, lambda x: x, lambda x: values.append(x) or x, lambda x: 2 * x
    )  # fmt: skip
    torch.testing.assert_close(values[0].flatten(), torch.tensor([4.949747, 2.121320]), rtol=0, atol=1e-5)
    torch.testing.assert_close(t2s, torch.tensor([[4.3074]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(s2t, torch.tensor([[1.0], [1.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_both_readings_and_their_gradients_agree_with_loops(masked):
    student, teacher, projectors = random_batch()
    trained = [p for projector in projectors for p in projector.parameters()] + [student.hidden]
    results = []
    for read in (
        lambda: cross_model_attention(student, teacher, *projectors, masked_std=masked),
        lambda: slowly(student, teacher, *projectors, masked=masked),
    ):
        rows = read()
        mixed = sum((part * torch.arange(1, part.numel() + 1).view_as(part).cos()).sum() for part in rows)
        results.append((*rows, *torch.autograd.grad(mixed, trained)))
    assert results[0][0].shape == (6, 3)
    assert results[0][1].shape == (8, 4)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_embeddings_and_the_teacher_get_no_gradient():
    student, teacher, projectors = random_batch()
    t2s, s2t = cross_model_attention(student, teacher, *projectors)
    (t2s.sum() + s2t.sum()).backward()
    assert student.hidden.grad.abs().sum() > 0
    assert all(projector.weight.grad.abs().sum() > 0 for projector in projectors)
    assert student.embedding.grad is teacher.embedding.grad is teacher.hidden.grad is None


def test_the_query_learns_from_both_readings_and_each_projector_from_its_own():
    student, teacher, (query, t2s, s2t) = random_batch()
    to_student, to_teacher = cross_model_attention(student, teacher, query, t2s, s2t)
    sources = [query.weight, t2s.weight, s2t.weight]
    first = torch.autograd.grad(to_student.square().sum(), sources, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(to_teacher.square().sum(), sources, allow_unused=True)
    assert [gradient is not None for gradient in first] == [True, True, False]
    assert [gradient is not None for gradient in second] == [True, False, True]


def test_attention_sums_to_one_and_leaves_out_what_is_masked():
    student, teacher, (query, _, _) = random_batch(torch.float32)
    generator = torch.Generator().manual_seed(1)
    queries = query(torch.randn(3, 5, 6, generator=generator))
    scores = attention_scores(queries, torch.randn(3, 7, 8, generator=generator), student.mask, teacher.mask)
    assert scores.dtype == torch.float32
    for dim, own, other in ((2, student.mask[:, :, None], teacher.mask[:, None, :]),
                            (1, teacher.mask[:, None, :], student.mask[:, :, None])):  # fmt: skip
        weights = scores.softmax(dim)
        torch.testing.assert_close(weights.sum(dim), torch.ones_like(weights.sum(dim)))
        # the third sample has no student label: there nothing can be left out
        hidden = (own & ~other)[:2].expand_as(weights[:2])
        assert (weights[:2][hidden] < 1e-30).all()
        assert hidden.any()
    # the only teacher label of the second sample takes everything
    assert (scores.softmax(2)[1, :3, 1] == 1).all()


def test_scores_stay_in_float32_under_autocast():
    student, teacher, _ = random_batch(torch.float32)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 7, 8, generator=generator)
    expected = attention_scores(query, key, student.mask, teacher.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_scores(query, key, student.mask, teacher.mask), expected)


def test_the_order_of_teacher_positions_does_not_matter():
    student, teacher, projectors = random_batch()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    shuffled = Sequences(
        teacher.hidden[:, order], teacher.input_ids[:, order], teacher.labels[:, order], teacher.embedding
    )
    before, after = (cross_model_attention(student, side, *projectors)[0] for side in (teacher, shuffled))
    torch.testing.assert_close(before, after)


def test_a_batch_without_labels_gives_no_rows_and_a_finite_graph():
    for masked in (False, True):
        student, teacher, projectors = random_batch()
        student.labels.fill_(IGNORED)
        t2s, s2t = cross_model_attention(student, teacher, *projectors, masked_std=masked)
        assert t2s.shape == (0, 3)
        assert s2t.shape == (8, 4)
        (t2s.sum() + s2t.sum()).backward()
        teacher.labels.fill_(IGNORED)
        t2s, s2t = cross_model_attention(student, teacher, *projectors, masked_std=masked)
        assert t2s.shape == (0, 3)
        assert s2t.shape == (0, 4)
        (t2s.sum() + s2t.sum()).backward()
        for projector in projectors:
            assert torch.isfinite(projector.weight.grad).all()


def test_a_sample_without_student_labels_stays_finite():
    student, teacher, projectors = random_batch(torch.float32)
    t2s, s2t = cross_model_attention(student, teacher, *projectors)
    assert torch.isfinite(t2s).all()
    assert torch.isfinite(s2t).all()


def padded(side, extra):
    generator = torch.Generator().manual_seed(9)
    noise = 5 * torch.randn(3, extra, side.hidden.shape[2], generator=generator, dtype=side.hidden.dtype)
    more = torch.full((3, extra), 7)
    return Sequences(
        torch.cat([side.hidden, noise], 1),
        torch.cat([side.input_ids, more], 1),
        torch.cat([side.labels, torch.full_like(more, IGNORED)], 1),
        side.embedding,
    )


def test_padding_changes_the_batch_deviation_and_not_the_masked_one():
    student, teacher, projectors = random_batch()
    # every sample with a teacher label needs a student label for this
    student.labels[2, 1] = 4
    for masked in (False, True):
        before = cross_model_attention(student, teacher, *projectors, masked_std=masked)
        after = cross_model_attention(padded(student, 3), padded(teacher, 2), *projectors, masked_std=masked)
        assert torch.allclose(before[0], after[0], rtol=1e-9) is masked
        assert torch.allclose(before[1], after[1], rtol=1e-9) is masked


def test_values_without_a_deviation_are_left_as_they_are():
    for values in (torch.tensor([[[3.0]]]), torch.full((2, 3, 1), 2.0)):
        assert torch.equal(normalise(values), values)
    values = torch.arange(6.0).view(1, 3, 2)
    torch.testing.assert_close(normalise(values), values / 3.5**0.5)
    mask = torch.tensor([[True, False, True]])
    torch.testing.assert_close(normalise(values, mask), values / torch.tensor([0.0, 1, 4, 5]).std())
    assert torch.equal(normalise(values, torch.zeros_like(mask)), values)
    assert normalise(values.bfloat16()).dtype == torch.bfloat16
