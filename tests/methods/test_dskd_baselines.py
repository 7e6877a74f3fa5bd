"""ULD and MinED against worked numbers, dense float64 references with autograd, and their invariants."""

import pytest
import torch
from tenfold.methods.dskd.baselines import mined, mined_teacher_head, sorted_distance, uld, uld_pairs
from tenfold.methods.dskd.objective import LossSettings, vanilla_kd
from tenfold.platform.losses.divergence import DivergenceOptions
from torch.nn.functional import cross_entropy

ONE = torch.tensor(1.0)


def settings(columns, alpha=0.3, tau=2.0, chunk=512):
    return LossSettings("reverse_kl", DivergenceOptions(temperature=tau), alpha, columns, chunk)


def tensors(seed=0, dtype=torch.float64, sizes=((7, 3, 11), (9, 4, 13))):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (rows, size, entries) in zip(("student", "teacher"), sizes, strict=True):
        made[name] = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        made[name + "_head"] = torch.randn(entries, size, generator=generator, dtype=torch.float64)
    made = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    made["labels"] = torch.randint(0, sizes[0][2] - 1, (sizes[0][0],), generator=generator)
    return made


def assert_same(found, expected, given, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    sources = [value for value in given.values() if value.is_floating_point()]
    results = [torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True, retain_graph=True)
               for loss in (found, expected)]  # fmt: skip
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


def distance(student, teacher, chunk=512):
    """Of probabilities: with an identity head the hidden states are the logits."""
    student, teacher = torch.tensor([student]).log(), torch.tensor([teacher]).log()
    heads = torch.eye(student.shape[1]), torch.eye(teacher.shape[1])
    return sorted_distance(student, heads[0], teacher, heads[1], chunk=chunk).item()


def test_uld_worked_example_is_symmetric():
    student, teacher = [0.7, 0.2, 0.1], [0.6, 0.3, 0.05, 0.05]
    assert distance(student, teacher) == pytest.approx(0.3, abs=1e-6)
    assert distance(teacher, student) == pytest.approx(0.3, abs=1e-6)
    assert distance([0.1, 0.7, 0.2], [0.05, 0.3, 0.6, 0.05]) == pytest.approx(0.3, abs=1e-6)
    assert distance(student, student[::-1]) == pytest.approx(0, abs=1e-6)


def test_uld_is_at_most_two_a_pair():
    sharp, flat = torch.zeros(1, 1000), torch.zeros(1, 1000)
    sharp[0, 3] = 100.0
    value = sorted_distance(sharp, torch.eye(1000), flat, torch.eye(1000), chunk=4).item()
    assert value == pytest.approx(2 * (1 - 1 / 1000), abs=1e-5)


def test_uld_pairs_the_first_tokens_of_every_sample():
    students, teachers = [3, 0, 2, 4], [2, 5, 0, 6]
    found = uld_pairs(torch.tensor(students), torch.tensor(teachers))
    expected, at_student, at_teacher = [], 0, 0
    for a, c in zip(students, teachers, strict=True):
        expected += [(at_student + k, at_teacher + k) for k in range(min(a, c))]
        at_student, at_teacher = at_student + a, at_teacher + c
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected
    assert [len(part) for part in uld_pairs(torch.tensor([0]), torch.tensor([3]))] == [0, 0]


def dense_uld(t, columns, pairs, alpha=0.3):
    z_s, z_t = t["student"] @ t["student_head"].T, t["teacher"].detach() @ t["teacher_head"].detach().T
    total = 0
    for i, j in zip(*(part.tolist() for part in pairs), strict=True):
        q, p = z_s[i, : columns[0]].softmax(-1), z_t[j, : columns[1]].softmax(-1)
        q, p = q.sort(descending=True).values, p.sort(descending=True).values
        for k in range(max(len(q), len(p))):
            total = total + ((p[k] if k < len(p) else 0) - (q[k] if k < len(q) else 0)).abs()
    return (1 - alpha) * cross_entropy(z_s, t["labels"], reduction="sum") + alpha * total, total


PAIRS = torch.tensor([0, 1, 2, 5, 6]), torch.tensor([0, 1, 2, 3, 4])


def run_uld(t, options, columns, pairs=PAIRS, items=ONE):
    states = [t[name] for name in ("student", "student_head", "teacher", "teacher_head")]
    return uld(*states, *pairs, t["labels"], items, options, columns)


@pytest.mark.parametrize("entries", [(11, 13), (13, 11), (12, 12)])
def test_uld_value_and_gradients_agree_with_the_dense_formula(entries):
    t = tensors(1, sizes=((7, 3, entries[0]), (9, 4, entries[1])))
    columns = entries[0] - 1, entries[1] - 1
    items = torch.tensor(9.0)
    loss = run_uld(t, settings(columns[0]), columns[1], items=items)
    expected, total = dense_uld(t, columns, PAIRS)
    assert_same(loss.total, expected / items, t)
    torch.testing.assert_close(loss.parts["uld"][0], total.detach())
    assert (loss.parts["ce"][1].item(), loss.parts["uld"][1].item()) == (7, 5)
    assert loss.parts["uld"][0] <= 2 * 5


def test_uld_gradients_pass_a_numerical_check():
    t = tensors(2, sizes=((4, 3, 6), (4, 2, 9)))
    teacher, head = t["teacher"].detach(), t["teacher_head"].detach()
    assert torch.autograd.gradcheck(
        lambda hidden, own: sorted_distance(hidden, own, teacher, head, chunk=3), (t["student"], t["student_head"])
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 512])
def test_chunks_change_no_value_and_no_gradient(chunk):
    t = tensors(3, torch.float32)
    whole, parts = (run_uld(t, settings(10, chunk=size), 12).total for size in (10_000, chunk))
    assert_same(parts, whole, t, rtol=1e-5, atol=1e-5)
    whole, parts = (run_mined(t, settings(10, chunk=size)).total for size in (10_000, chunk))
    assert_same(parts, whole, t, rtol=1e-5, atol=1e-5)


def test_uld_without_pairs_is_the_cross_entropy_alone_with_a_graph():
    t = tensors(3)
    none = torch.zeros(0, dtype=torch.int64)
    loss = run_uld(t, settings(10), 12, pairs=(none, none))
    assert_same(loss.total, 0.7 * cross_entropy(t["student"] @ t["student_head"].T, t["labels"], reduction="sum"), t)
    empty = t | {"student": t["student"][:0], "labels": t["labels"][:0]}
    zero = run_uld(empty, settings(10), 12, pairs=(none, none)).total
    assert zero.item() == 0
    zero.backward()


def test_uld_needs_no_gradient_in_evaluation_and_only_what_is_asked_for():
    t = tensors(3)
    with torch.no_grad():
        quiet = run_uld(t, settings(10), 12).total
    torch.testing.assert_close(quiet, run_uld(t, settings(10), 12).total.detach())
    frozen = t | {"student_head": t["student_head"].detach()}
    expected, _ = dense_uld(t, (10, 12), PAIRS)
    found = torch.autograd.grad(run_uld(frozen, settings(10), 12).total, t["student"])
    torch.testing.assert_close(found, torch.autograd.grad(expected, t["student"]))


def test_uld_in_bfloat16_keeps_the_gradients_dtype():
    t = tensors(3, torch.bfloat16)
    loss = run_uld(t, settings(10), 12).total
    assert loss.dtype == torch.float32
    loss.backward()
    assert t["student"].grad.dtype == t["student_head"].grad.dtype == torch.bfloat16
    wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in t.items()}
    torch.testing.assert_close(loss.double(), dense_uld(wide, (10, 12), PAIRS)[0], rtol=2e-2, atol=2e-2)


# student -> teacher; the student's entries 3 and 6 have no teacher token, row 10 is padding
BACKWARD = torch.tensor([5, 0, 11, -1, 2, 8, -1, 1, 4, 10, -1])
POSITIONS = torch.tensor([0, 1, -1, 4, -1, 5, 8])


def run_mined(t, options, positions=POSITIONS, items=ONE, backward=BACKWARD):
    rows, bias = mined_teacher_head(t["teacher_head"], backward)
    return mined(
        t["student"], t["student_head"], t["teacher"], rows, bias, positions, t["labels"], items, options
    )  # fmt: skip


def dense_mined(t, columns, tau=2.0, alpha=0.3):
    """With the dense target logits of the definition."""
    z_s, z_t = t["student"] @ t["student_head"].T, t["teacher"].detach() @ t["teacher_head"].detach().T
    total = 0
    for i, j in enumerate(POSITIONS.tolist()):
        target = torch.full((columns,), -1e5, dtype=z_s.dtype)
        if j < 0:
            target[t["labels"][i]] = 100
        else:
            for entry, token in enumerate(BACKWARD[:columns].tolist()):
                if token >= 0:
                    target[entry] = z_t[j, token]
        p = torch.softmax(target / tau, -1)
        log_q = torch.log_softmax(z_s[i, :columns] / tau, -1)
        total = total + (torch.special.xlogy(p, p) - p * log_q).sum()
    return (1 - alpha) * cross_entropy(z_s, t["labels"], reduction="sum") + alpha * total, total


def test_mined_value_and_gradients_agree_with_dense_targets():
    t, items = tensors(4), torch.tensor(9.0)
    loss = run_mined(t, settings(10), items=items)
    expected, total = dense_mined(t, 10)
    assert_same(loss.total, expected / items, t)
    torch.testing.assert_close(loss.parts["mined"][0], total.detach())
    assert [part.item() for part in loss.parts["soft_targets"]] == [5, 7]


def test_mined_in_float32_leaves_the_students_logits_alone():
    t = tensors(4, torch.float32)
    expected, total = dense_mined({k: v.double() if v.is_floating_point() else v for k, v in t.items()}, 10)
    loss = run_mined(t, settings(10))
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-5)
    assert total > 0.1


def test_mined_of_one_tokenizer_is_vanilla_forward_kl():
    t = tensors(5, sizes=((7, 3, 11), (7, 4, 11)))
    identity = torch.arange(11)
    identity[10] = -1
    loss = run_mined(t, settings(10), torch.arange(7), torch.tensor(7.0), identity)
    forward = LossSettings("forward_kl", DivergenceOptions(temperature=2.0), 0.3, 10, 512)
    states = [t[name] for name in ("student", "student_head", "teacher", "teacher_head")]
    assert_same(loss.total, vanilla_kd(*states, t["labels"], torch.tensor(7.0), forward).total, t)


@pytest.mark.parametrize("positions", [torch.full((7,), -1), torch.arange(7)])
def test_mined_with_targets_of_one_kind_only(positions, monkeypatch):
    t = tensors(4)
    monkeypatch.setitem(globals(), "POSITIONS", positions)
    assert_same(run_mined(t, settings(10), positions).total, dense_mined(t, 10)[0], t)


def test_mined_of_a_micro_batch_without_labels_is_zero_with_a_graph():
    t = tensors(4)
    empty = t | {"student": t["student"][:0], "labels": t["labels"][:0]}
    loss = run_mined(empty, settings(10), POSITIONS[:0])
    assert loss.total.item() == 0
    loss.total.backward()
    assert t["student_head"].grad.abs().sum() == 0


@pytest.mark.parametrize("objective", ["uld", "mined"])
def test_a_bias_is_a_column_of_the_head_that_reads_a_one(objective):
    t = tensors(4)
    generator = torch.Generator().manual_seed(9)
    own, theirs = (torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in (11, 13))
    wide = {name: torch.cat([t[name], torch.ones(len(t[name]), 1)], 1) for name in ("student", "teacher")}
    wide["student_head"] = torch.cat([t["student_head"], own[:, None]], 1)
    wide["teacher_head"] = torch.cat([t["teacher_head"], theirs[:, None]], 1)
    wide["labels"] = t["labels"]
    if objective == "uld":
        states = [t[name] for name in ("student", "student_head", "teacher", "teacher_head")]
        biases = {"student_bias_V": own, "teacher_bias_V": theirs}
        found = uld(*states, *PAIRS, t["labels"], ONE, settings(10), 12, **biases)
        expected = run_uld(wide, settings(10), 12)
    else:
        rows, bias = mined_teacher_head(t["teacher_head"], BACKWARD, theirs)
        states = [t[name] for name in ("student", "student_head", "teacher")]
        found = mined(*states, rows, bias, POSITIONS, t["labels"], ONE, settings(10), student_bias_V=own)
        expected = run_mined(wide, settings(10))
    assert_same(found.total, expected.total, t | {"own": own, "theirs": theirs})
    assert torch.autograd.grad(found.total, own)[0].abs().sum() > 0
