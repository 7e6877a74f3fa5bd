"""The simulation of two output spaces, at a small size: what the paper shows, and that it is repeatable."""

import json

import pytest
import torch
from tenfold.methods.dskd.space_discrepancy import figure, simulate
from tenfold.platform.losses.divergence import DIVERGENCES
from typer.testing import CliRunner

SMALL = {"classes": 300, "steps": 300}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shared_head_brings_the_student_closer_in_divergence_and_structure(seed):
    separate, shared = (simulate("forward_kl", head, **SMALL, seed=seed) for head in ("separate", "shared"))
    assert shared.end < 0.2 * separate.end
    assert shared.structure < separate.structure - 0.02
    assert separate.teacher == shared.teacher
    assert separate.end < 0.2 * separate.start


def test_the_start_is_the_papers_draw_and_the_first_divergence_by_definition():
    result = simulate("forward_kl", "separate", states=2000, classes=5, steps=0)
    teacher, student = torch.tensor(result.teacher), torch.tensor(result.student)
    assert teacher.std().item() == pytest.approx(2, rel=0.05)
    assert student.mean().item() == pytest.approx(3, abs=0.1)
    assert student.std().item() == pytest.approx(1, rel=0.05)
    assert result.start == result.end

    one = simulate("forward_kl", "shared", states=1, classes=3, steps=0)
    draw = torch.Generator().manual_seed(0)
    torch.randn(1, 2, generator=draw), torch.randn(3, 2, generator=draw), torch.randn(1, 2, generator=draw)
    head = torch.randn(3, 2, generator=draw)
    p, q = ((torch.tensor(states) @ head.T).softmax(-1) for states in (one.teacher, one.student))
    assert one.end == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_the_shared_head_learns_from_the_students_side_alone():
    def two_steps(teacher_side):
        draw = torch.Generator().manual_seed(0)
        teacher = 2 * torch.randn(4, 2, generator=draw)
        torch.randn(6, 2, generator=draw)
        student, head = torch.randn(4, 2, generator=draw) + 3, torch.randn(6, 2, generator=draw)
        for _ in range(2):
            student, head = student.detach().requires_grad_(), head.detach().requires_grad_()
            q, p = (student @ head.T).softmax(-1), (teacher @ teacher_side(head).T).softmax(-1)
            (q * (q.log() - p.log())).sum(-1).mean().backward()
            student, head = student.detach() - 0.5 * student.grad, head.detach() - 0.5 * head.grad
        return student

    result = simulate("reverse_kl", "shared", states=4, classes=6, steps=2, learning_rate=0.5)
    found = torch.tensor(result.student)
    torch.testing.assert_close(found, two_steps(torch.Tensor.detach))
    assert (found - two_steps(lambda head: head)).abs().max() > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_falls_and_the_seed_decides_everything(divergence):
    first, again = (simulate(divergence, "shared", states=20, classes=50, steps=50) for _ in range(2))
    assert first == again
    assert first.end < first.start
    assert simulate(divergence, "shared", states=20, classes=50, steps=50, seed=1) != first


def test_the_command_prints_a_table_and_writes_picture_and_numbers(tmp_path):
    import typer
    from tenfold.methods.dskd.space_discrepancy import _command

    app = typer.Typer()
    app.command()(_command)
    arguments = ["--states", "10", "--classes", "20", "--steps", "3", "--output", str(tmp_path / "new" / "toy")]
    chosen = ["--divergence", "tvd", "--divergence", "forward_kl"]
    result = CliRunner().invoke(app, [*arguments, *chosen], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert "10 states, 20 classes, 3 steps" in result.output
    found = json.loads((tmp_path / "new" / "toy.json").read_text())
    assert [(one["divergence"], one["head"]) for one in found] == [
        (name, head) for name in ("tvd", "forward_kl") for head in ("separate", "shared")
    ]
    assert (tmp_path / "new" / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found[0]['end']:.3f}" in result.output
    every = CliRunner().invoke(app, arguments)
    assert every.exit_code == 0
    names = [one["divergence"] for one in json.loads((tmp_path / "new" / "toy.json").read_text())]
    assert list(dict.fromkeys(names)) == list(DIVERGENCES)


def test_unknown_heads_and_divergences_are_refused():
    with pytest.raises(ValueError, match="needs separate or shared"):
        simulate("forward_kl", "both")
    with pytest.raises(ValueError, match="Unknown divergence"):
        simulate("kl", "shared", steps=0)


def test_the_picture_has_a_plot_for_each_head():
    results = [simulate("tvd", head, states=5, classes=5, steps=0) for head in ("separate", "shared")]
    assert [len(axis.collections) for axis in figure(results).axes] == [2, 2]
