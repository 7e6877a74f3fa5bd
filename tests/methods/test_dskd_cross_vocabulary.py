"""DSKD for different vocabularies: worked numbers, dense float64 references with autograd, invariants, edge cases."""

import pytest
import torch
from tenfold.methods.dskd.cross_model_attention import Sequences, cross_model_attention
from tenfold.methods.dskd.cross_vocabulary import dual_space_v1_cma, dual_space_v2_eta, labelled_pairs, overlap_kd
from tenfold.methods.dskd.loss_parts import StepCounts
from tenfold.methods.dskd.objective import LossSettings, dual_space_v2
from tenfold.methods.dskd.projectors import student_to_teacher, teacher_to_student
from tenfold.platform.losses.divergence import DivergenceOptions
from torch.nn.functional import cross_entropy

ONE = torch.tensor(1.0)
N, M, K, V_S, V_T = 7, 9, 5, 11, 13
COLUMNS_S, COLUMNS_T = 10, 12  # the last row of each head is padding


def settings(divergence="forward_kl", columns=COLUMNS_S, tau=2.0, alpha=0.3, chunk=512, **options):
    return LossSettings(divergence, DivergenceOptions(temperature=tau, **options), alpha, columns, chunk)


def tensors(seed=0, dtype=torch.float64):
    """Hidden states, heads and projected states; all require gradients, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "student": (N, 3),
        "student_head": (V_S, 3),
        "teacher": (M, 4),
        "teacher_head": (V_T, 4),
        "t2s": (N, 3),
        "s2t": (M, 4),
        "t2s_pairs": (K, 3),
        "s2t_pairs": (K, 4),
    }
    made = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made["labels"] = torch.randint(0, COLUMNS_S, (N,), generator=generator)
    # the teacher's projection predicts some of the labels
    made["labels"][:3] = (made["t2s"] @ made["student_head"].T)[:3, :COLUMNS_S].argmax(-1)
    return {
        name: value.to(dtype).requires_grad_() if value.is_floating_point() else value for name, value in made.items()
    }


def divergence(student, teacher, tau, name="forward_kl", extra=1.0):
    """Per row, from the definitions."""
    q, p = torch.softmax(student / tau, -1), torch.softmax(teacher.detach() / tau / extra, -1)
    if name == "reverse_kl":
        p, q = q, p
    return (p * (p.log() - q.log())).sum(-1)


def gradients(loss, given):
    sources = [value for value in given.values() if value.requires_grad]
    return torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same(found, expected, given, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    names = [name for name, value in given.items() if value.requires_grad]
    pairs = zip(names, gradients(found, given), gradients(expected, given), strict=True)
    for name, own, other in pairs:
        torch.testing.assert_close(own, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def run_cma(t, options=None, items=ONE):
    return dual_space_v1_cma(
        t["student"],
        t["student_head"],
        t["teacher"],
        t["teacher_head"],
        t["t2s"],
        t["s2t"],
        t["labels"],
        items,
        options or settings(),
        COLUMNS_T,
    )


def dense_cma(t, items, alpha=0.3, tau=2.0, name="forward_kl", extra=1.0):
    z_s = t["student"] @ t["student_head"].T
    read = t["t2s"] @ t["student_head"].detach().T
    z_t, lifted = (t["teacher"] @ t["teacher_head"].T).detach(), t["s2t"] @ t["teacher_head"].detach().T
    correct = read[:, :COLUMNS_S].argmax(-1) == t["labels"]
    parts = {
        "ce": cross_entropy(z_s, t["labels"], reduction="sum"),
        "t2s_ce": cross_entropy(read, t["labels"], reduction="sum"),
        "student_space": divergence(z_s[:, :COLUMNS_S], read[:, :COLUMNS_S], tau, name, extra)[correct].sum(),
        "teacher_space": divergence(lifted[:, :COLUMNS_T], z_t[:, :COLUMNS_T], tau).sum(),
    }
    kd = parts["t2s_ce"] + parts["student_space"] + parts["teacher_space"]
    return ((1 - alpha) * parts["ce"] + alpha * kd) / items, parts, correct


def test_the_tiny_worked_example_of_cross_model_attention():
    heads = torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-1.0]])
    student = Sequences(
        torch.tensor([[[0.5]]]), torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[1.0], [2.0]])
    )
    teacher = Sequences(
        torch.tensor([[[2.0], [1.0]]]), torch.tensor([[0, 1]]), torch.tensor([[1, 0]]), torch.tensor([[1.0], [3.0]])
    )
    t2s, s2t = cross_model_attention(student, teacher, lambda x: x, lambda x: x, lambda x: 2 * x)

    def parts_with(gold):
        loss = dual_space_v1_cma(
            student.hidden[0], heads[0], teacher.hidden[0], heads[1], t2s, s2t, torch.tensor([gold]), ONE,
            settings(columns=2, alpha=0.5), 2,
        )  # fmt: skip
        return loss.total.item(), {name: total.item() for name, (total, _) in loss.parts.items()}

    total, parts = parts_with(1)
    assert parts["ce"] == pytest.approx(1.3133, abs=1e-4)
    assert parts["t2s_ce"] == pytest.approx(8.6150, abs=1e-4)
    assert parts["student_space"] == 0
    assert parts["t2s_accuracy"] == 0
    assert parts["teacher_space"] == pytest.approx(0.0817, abs=1e-4)
    assert total == pytest.approx((1.3133 + 8.6150 + 0.0817) / 2, abs=1e-4)
    # with the other gold label the position counts
    assert parts_with(0)[1]["student_space"] == pytest.approx(0.4101, abs=1e-4)


@pytest.mark.parametrize(("name", "extra"), [("forward_kl", 1.0), ("reverse_kl", 1.0), ("forward_kl", 1.7)])
def test_cma_value_and_gradients_agree_with_the_dense_formula(name, extra):
    t, items = tensors(2), torch.tensor(12.0)
    loss = run_cma(t, settings(name, teacher_temperature=extra), items)
    expected, parts, correct = dense_cma(t, items, name=name, extra=extra)
    assert 0 < correct.sum() < N
    assert_same(loss.total, expected, t)
    for part, value in parts.items():
        torch.testing.assert_close(loss.parts[part][0], value.detach())
    assert {part: count.item() for part, (_, count) in loss.parts.items()} == {
        "ce": N, "t2s_ce": N, "student_space": N, "teacher_space": M, "t2s_accuracy": N,
    }  # fmt: skip


def test_cma_gradients_go_where_the_paper_says():
    t = tensors(2)
    student, head, teacher, teacher_head, t2s, s2t = gradients(run_cma(t).total, t)[:6]
    assert teacher.abs().sum() == teacher_head.abs().sum() == 0
    q = torch.softmax(t["t2s"] @ t["student_head"].T, -1) - torch.nn.functional.one_hot(t["labels"], V_S)
    torch.testing.assert_close(t2s, (0.3 * q @ t["student_head"]).detach())
    assert s2t.abs().sum() > 0
    assert student.abs().sum() > 0
    assert head.abs().sum() > 0


@pytest.mark.parametrize("chunk", [1, 2, 4, 512])
def test_chunks_change_no_value_and_no_gradient(chunk):
    t = tensors(2, torch.float32)
    for run in (run_cma, run_eta, run_overlap):
        whole, parts = (run(t, settings(chunk=size)).total for size in (10_000, chunk))
        assert_same(parts, whole, t, rtol=1e-5, atol=1e-5)


def test_cma_of_a_micro_batch_without_labels_is_zero_with_a_graph():
    t = tensors()
    empty = {name: value[:0] if name in ("student", "teacher", "t2s", "s2t", "labels") else value
             for name, value in t.items()}  # fmt: skip
    loss = run_cma(empty)
    assert loss.total.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(loss.total, t))
    assert loss.total.requires_grad


STUDENT_INDEX = torch.tensor([0, 2, 3, 5, 6])
TEACHER_INDEX = torch.tensor([1, 2, 4, 7, 8])
TEACHER_LABEL = torch.tensor([4, 1, 9, 0, 3])


def run_eta(t, options=None, items=ONE, rows=slice(None), labels=TEACHER_LABEL, **keywords):
    return dual_space_v2_eta(
        t["student"],
        t["student_head"],
        t["teacher"][TEACHER_INDEX[rows]],
        t["teacher_head"],
        t["t2s_pairs"][rows],
        t["s2t_pairs"][rows],
        STUDENT_INDEX[rows],
        labels[rows],
        t["labels"],
        items,
        options or settings(),
        COLUMNS_T,
        **keywords,
    )


def agreeing_labels(t, positions):
    """Labels that agree with what the projected teacher predicts at these pairs only."""
    best = (t["t2s_pairs"] @ t["student_head"].T)[:, :COLUMNS_S].argmax(-1)
    return torch.where(torch.isin(torch.arange(K), torch.tensor(positions)), best, (best + 1) % COLUMNS_S)


def dense_eta(t, labels, items, alpha=0.3, tau=2.0, name="forward_kl", extra=1.0, threshold=1.0, micro=1):
    z_s = t["student"] @ t["student_head"].T
    own = z_s[STUDENT_INDEX]
    read = t["t2s_pairs"] @ t["student_head"].detach().T
    z_t = (t["teacher"][TEACHER_INDEX] @ t["teacher_head"].T).detach()
    lifted = t["s2t_pairs"] @ t["teacher_head"].detach().T
    agree = read[:, :COLUMNS_S].argmax(-1) == labels
    rows = divergence(own[:, :COLUMNS_S], read[:, :COLUMNS_S], tau, name, extra)
    in_student = rows[agree].sum() / max(1e-3, agree.sum()) if agree.sum() / K <= threshold else rows.mean()
    in_teacher = divergence(lifted[:, :COLUMNS_T], z_t[:, :COLUMNS_T], tau, name).mean()
    ce = cross_entropy(z_s, t["labels"], reduction="sum") / items
    return ce, in_student, cross_entropy(read, labels), in_teacher, alpha / micro


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("agreeing", "threshold"), [([1, 3], 1.0), ([], 1.0), ([0, 1, 2, 3, 4], 1.0), ([1, 3], 0.3)])
def test_eta_value_and_gradients_agree_with_the_dense_formula(name, agreeing, threshold):
    t, items = tensors(3), torch.tensor(20.0)
    labels = agreeing_labels(t, agreeing)
    loss = run_eta(
        t,
        settings(name, teacher_temperature=1.3),
        items,
        labels=labels,
        micro_batches=4,
        agreement_threshold=threshold,
    )
    ce, in_student, t2s_ce, in_teacher, share = dense_eta(
        t, labels, items, name=name, extra=1.3, threshold=threshold, micro=4
    )
    assert_same(loss.total, 0.7 * ce + share * (in_student + t2s_ce + in_teacher), t)
    parts = {part: (total / count).item() for part, (total, count) in loss.parts.items()}
    assert parts["ce"] == pytest.approx((ce * items / N).item())
    assert parts["student_space"] == pytest.approx(in_student.item())
    assert parts["t2s_ce"] == pytest.approx(t2s_ce.item())
    assert parts["teacher_space"] == pytest.approx(in_teacher.item())
    assert parts["t2s_agreement"] == pytest.approx(len(agreeing) / K)
    assert parts["counted_pairs"] == pytest.approx(K / N)


def test_eta_in_one_space_only():
    t, items = tensors(3), torch.tensor(20.0)
    labels = agreeing_labels(t, [1, 3])
    ce, in_student, t2s_ce, in_teacher, share = dense_eta(t, labels, items)
    student = run_eta(t, items=items, labels=labels, spaces="student")
    assert_same(student.total, 0.7 * ce + share * (in_student + t2s_ce), t)
    assert "teacher_space" not in student.parts
    teacher = run_eta(t, items=items, labels=labels, spaces="teacher")
    assert_same(teacher.total, 0.7 * ce + share * in_teacher, t)
    assert set(teacher.parts) == {"ce", "teacher_space", "counted_pairs"}
    (teacher.total).backward()
    assert t["t2s_pairs"].grad is not None


def test_eta_without_a_pair_is_the_cross_entropy_alone_with_a_graph():
    t = tensors(3)
    none = slice(0, 0)
    for spaces in ("both", "student", "teacher"):
        loss = run_eta(t, items=torch.tensor(7.0), rows=none, spaces=spaces)
        expected = 0.7 * cross_entropy(t["student"] @ t["student_head"].T, t["labels"])
        assert_same(loss.total, expected, t)
        for part, (total, _) in loss.parts.items():
            assert total.item() == 0 or part == "ce"
    zero = run_eta(t, settings(alpha=1.0), rows=none)
    assert zero.total.item() == 0
    loss.total.backward()
    assert t["t2s_pairs"].grad.abs().sum() == 0


def test_eta_of_a_micro_batch_without_labels_is_zero_with_a_graph():
    t = tensors(3)
    empty = t | {"student": t["student"][:0], "labels": t["labels"][:0]}
    loss = run_eta(empty, rows=slice(0, 0))
    assert loss.total.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(loss.total, t))


def test_eta_projected_teacher_and_heads_learn_from_nothing_else():
    t = tensors(3)
    student, head, teacher, teacher_head, _, _, t2s, s2t = gradients(run_eta(t).total, t)
    assert teacher.abs().sum() == teacher_head.abs().sum() == 0
    q = torch.softmax(t["t2s_pairs"] @ t["student_head"].T, -1) - torch.nn.functional.one_hot(TEACHER_LABEL, V_S)
    torch.testing.assert_close(t2s, (0.3 * q @ t["student_head"] / K).detach())
    assert min(part.abs().sum() for part in (student, head, s2t)) > 0


def test_eta_of_one_tokenizer_is_the_same_vocabulary_objective():
    """With N pairs and Z = N the divisors are equal too."""
    generator = torch.Generator().manual_seed(4)
    given = {
        "student": torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_(),
        "head": torch.randn(11, 3, generator=generator, dtype=torch.float64).requires_grad_(),
        "teacher": torch.randn(6, 4, generator=generator, dtype=torch.float64),
        "teacher_head": torch.randn(11, 4, generator=generator, dtype=torch.float64),
        "P": torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_(),
    }
    S = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (6,), generator=generator)
    predicted = (given["teacher"] @ given["teacher_head"].T).argmax(-1)
    rows = torch.arange(6)
    student_rows, teacher_rows, mapped = labelled_pairs(rows, rows, predicted, torch.arange(11))
    states = [given[name] for name in ("student", "head", "teacher", "teacher_head")]
    projected = given["teacher"] @ given["P"], given["student"] @ S
    same = dual_space_v2(*states, *projected, predicted, labels, torch.tensor(6.0), settings(columns=11))
    aligned = dual_space_v2_eta(
        *states, *projected, student_rows, mapped, labels, torch.tensor(6.0), settings(columns=11), 11
    )
    assert torch.equal(teacher_rows, rows)
    assert same.parts["t2s_agreement"][0] > 0
    assert_same(aligned.total, same.total, given)


def test_eta_repeats_the_tiny_worked_example():
    student_head, teacher_head = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.eye(3)
    P, S = teacher_to_student(student_head, teacher_head).float(), student_to_teacher(student_head, teacher_head)
    hidden, teacher = torch.tensor([[1.0, 0]]), torch.tensor([[3.0, 0, 0]])
    zero = torch.tensor([0])
    loss = dual_space_v2_eta(
        hidden, student_head, teacher, teacher_head, teacher @ P, hidden @ S.float(), zero, zero, zero, ONE,
        settings(columns=3, alpha=0.5), 3,
    )  # fmt: skip
    assert loss.total.item() == pytest.approx(0.740266, abs=1e-5)


def test_pairs_whose_teacher_prediction_the_student_lacks_are_dropped_before_counting():
    table = torch.tensor([7, -1, 3, -1])
    students, teachers, labels = labelled_pairs(
        torch.tensor([0, 2, 5]), torch.tensor([3, 1, 0]), torch.tensor([2, 1, 0, 0]), table
    )
    assert (students.tolist(), teachers.tolist(), labels.tolist()) == ([0, 5], [3, 0], [7, 3])
    empty = torch.zeros(0, dtype=torch.int64)
    assert [len(part) for part in labelled_pairs(empty, empty, empty, table)] == [0, 0, 0]


def test_unaligned_rows_and_neighbours_do_not_touch_the_distillation():
    """What happens at student rows outside the pairs changes CE alone."""
    t = tensors(3)
    moved = t | {"student": t["student"].detach().clone()}
    moved["student"][[1, 4]] += 3
    for part in ("student_space", "t2s_ce", "teacher_space"):
        torch.testing.assert_close(run_eta(moved).parts[part][0], run_eta(t).parts[part][0])
    assert (run_eta(moved).parts["ce"][0] - run_eta(t).parts["ce"][0]).abs() > 1e-3


STUDENT_OVERLAP, TEACHER_OVERLAP = torch.tensor([0, 2, 3, 7, 9]), torch.tensor([5, 1, 0, 11, 4])


def run_overlap(t, options=None, items=ONE, rows=slice(None), **keywords):
    return overlap_kd(
        t["student"],
        t["student_head"],
        t["teacher"][TEACHER_INDEX[rows]],
        t["teacher_head"].detach()[TEACHER_OVERLAP],
        STUDENT_INDEX[rows],
        STUDENT_OVERLAP,
        t["labels"],
        items,
        options or settings(),
        **keywords,
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_overlap_value_and_gradients_agree_with_the_renormalised_softmax(name):
    t, items = tensors(5), torch.tensor(9.0)
    z_s = t["student"] @ t["student_head"].T
    z_t = (t["teacher"][TEACHER_INDEX] @ t["teacher_head"].T).detach()
    kd = 0
    for i, row in enumerate(STUDENT_INDEX.tolist()):
        q = torch.softmax(z_s[row] / 2, -1)[STUDENT_OVERLAP]
        p = torch.softmax(z_t[i] / 2, -1)[TEACHER_OVERLAP]
        q, p = q / q.sum(), p / p.sum()
        kd = kd + (p * (p / q).log() if name == "forward_kl" else q * (q / p).log()).sum()
    ce = cross_entropy(z_s, t["labels"], reduction="sum")
    loss = run_overlap(t, settings(name), items)
    assert_same(loss.total, (0.7 * ce + 0.3 * kd) / items, t)
    torch.testing.assert_close(loss.parts["kd"][0], kd.detach())
    assert [loss.parts[name][1].item() for name in ("ce", "kd", "counted_pairs")] == [N, K, N]


def test_overlap_trains_the_common_rows_of_the_students_head():
    t = tensors(5)
    head = gradients(run_overlap(t, settings(alpha=1.0)).total, t)[1]
    assert sorted(head.abs().sum(1).nonzero().flatten().tolist()) == STUDENT_OVERLAP.tolist()


def test_overlap_without_a_pair_is_the_cross_entropy_alone():
    t = tensors(5)
    loss = run_overlap(t, rows=slice(0, 0))
    assert_same(loss.total, 0.7 * cross_entropy(t["student"] @ t["student_head"].T, t["labels"], reduction="sum"), t)
    empty = t | {"student": t["student"][:0], "labels": t["labels"][:0]}
    assert run_overlap(empty, rows=slice(0, 0)).total.item() == 0


def with_biases(t):
    """Heads with a bias, and the same as heads with one more column that reads a 1."""
    generator = torch.Generator().manual_seed(9)
    t = t | {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in (("bias", V_S), ("teacher_bias", V_T))
    }
    wide = t | {
        name: torch.cat([t[name], torch.ones(len(t[name]), 1)], 1)
        for name in ("student", "teacher", "t2s", "s2t", "t2s_pairs", "s2t_pairs")
    }
    wide["student_head"] = torch.cat([t["student_head"], t["bias"][:, None]], 1)
    wide["teacher_head"] = torch.cat([t["teacher_head"], t["teacher_bias"][:, None]], 1)
    return t, wide


@pytest.mark.parametrize("objective", ["cma", "eta", "overlap"])
def test_a_bias_is_a_column_of_the_head_that_reads_a_one(objective):
    t, wide = with_biases(tensors(3))
    biases = {"student_bias_V": t["bias"], "teacher_bias_V": t["teacher_bias"]}
    if objective == "cma":
        states = ("student", "student_head", "teacher", "teacher_head", "t2s", "s2t", "labels")
        found, expected = (
            dual_space_v1_cma(*(one[name] for name in states), ONE, settings(), COLUMNS_T, **more)
            for one, more in ((t, biases), (wide, {}))
        )
    elif objective == "eta":
        found, expected = run_eta(t, **biases), run_eta(wide)
    else:
        own = {"student_bias_V": t["bias"], "teacher_overlap_bias_v": t["teacher_bias"].detach()[TEACHER_OVERLAP]}
        found, expected = run_overlap(t, **own), run_overlap(wide)
    assert_same(found.total, expected.total, t)
    assert torch.autograd.grad(found.total, t["bias"])[0].abs().sum() > 0


@pytest.mark.parametrize("threshold", [1.0, 0.1])
def test_eta_with_the_counts_of_a_step_adds_up_over_its_micro_batches(threshold):
    """Two micro-batches of other pairs, with counts of both, are one of all pairs."""
    t, items = tensors(3), torch.tensor(20.0)
    labels = agreeing_labels(t, [0, 3])
    best = (t["t2s_pairs"] @ t["student_head"].T)[:, :COLUMNS_S].argmax(-1)
    more = {"labels": labels, "agreement_threshold": threshold}
    whole = run_eta(t, items=items, **more)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        counts = StepCounts(torch.tensor(5.0), torch.tensor(2.0), 1.0, (best == labels)[rows])
        parts.append(run_eta(t, items=items, rows=rows, counts=counts, micro_batches=2, **more))
    ce = 0.7 * whole.parts["ce"][0] / items  # all of the cross entropy is in each of the two
    torch.testing.assert_close(sum(part.total for part in parts) - ce, whole.total)
    for name in ("student_space", "t2s_ce", "teacher_space"):
        total, count = (sum(values) for values in zip(*(part.parts[name] for part in parts), strict=True))
        torch.testing.assert_close(total / count, whole.parts[name][0] / whole.parts[name][1])
    # a mean over the passes that wrote themselves has their share of the step
    counts = StepCounts(torch.tensor(5.0), torch.tensor(2.0), 4.0, best == labels)
    share = run_eta(t, settings(alpha=1.0), items, counts=counts, **more).total
    torch.testing.assert_close(4 * share, run_eta(t, settings(alpha=1.0), items, **more).total)


def test_eta_masked_by_gold_labels_or_not_at_all():
    t = tensors(3)
    best = (t["t2s_pairs"] @ t["student_head"].T)[:, :COLUMNS_S].argmax(-1)
    t["labels"][STUDENT_INDEX[:2]] = best[:2]
    t["labels"][STUDENT_INDEX[2:]] = (best[2:] + 1) % COLUMNS_S
    own = (t["student"] @ t["student_head"].T)[STUDENT_INDEX, :COLUMNS_S]
    rows = divergence(own, (t["t2s_pairs"] @ t["student_head"].T)[:, :COLUMNS_S], 2.0).detach()
    for mask, expected in (("gold", rows[:2].mean()), ("none", rows.mean())):
        total, count = run_eta(t, mask=mask).parts["student_space"]
        torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-5)


def test_cma_on_generated_text_averages_over_the_tokens_that_it_predicts():
    """Labels are the teacher's predictions where there are any: 2 of 7 have none, L_tea stays divided by Z."""
    t, items = tensors(2), torch.tensor(12.0)
    t["labels"][[1, 5]] = -100
    states = ("student", "student_head", "teacher", "teacher_head", "t2s", "s2t", "labels")
    loss = dual_space_v1_cma(*(t[name] for name in states), items, settings(alpha=1.0), COLUMNS_T, passes=3)
    read = t["t2s"] @ t["student_head"].detach().T
    correct = read[:, :COLUMNS_S].argmax(-1) == t["labels"]
    assert 0 < correct.sum() < 5
    rows = divergence((t["student"] @ t["student_head"].T)[:, :COLUMNS_S], read[:, :COLUMNS_S], 2.0)
    lifted, z_t = t["s2t"] @ t["teacher_head"].detach().T, t["teacher"] @ t["teacher_head"].T
    in_teacher = divergence(lifted[:, :COLUMNS_T], z_t.detach()[:, :COLUMNS_T], 2.0).sum() / items
    t2s_ce = cross_entropy(read, t["labels"], reduction="sum") / items
    assert_same(loss.total, rows[correct].mean() / 3 + t2s_ce + in_teacher, t, rtol=1e-5, atol=1e-6)
    assert [part.item() for part in loss.parts["t2s_accuracy"]] == [correct.sum().item(), 5]
    torch.testing.assert_close(
        loss.parts["student_space"][0].double(), rows[correct].mean().detach(), rtol=1e-5, atol=1e-6
    )
    t["labels"][:] = -100
    none = dual_space_v1_cma(*(t[name] for name in states), items, settings(alpha=1.0), COLUMNS_T, passes=3)
    assert_same(none.total, in_teacher, t)
