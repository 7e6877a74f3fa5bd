import json

import pytest
from tenfold.platform import node_counts
from tenfold.platform.errors import ClusterError
from tenfold.platform.node_counts import Event, NodeCount, NodeRecord, figure, node_types


@pytest.fixture
def cluster(monkeypatch):
    """Let the dashboard answer with these nodes, one answer a look; after the last it is gone."""
    answers = []

    def answer(address):
        if not answers:
            raise ClusterError(f"{address} is gone")
        found = answers.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(node_counts, "node_types", answer)
    monkeypatch.setattr(node_counts, "RETRY_SECONDS", 0)
    return answers


def test_a_dashboard_that_does_not_answer_is_an_error_that_says_what_to_do(free_port):
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ClusterError, match=rf"dashboard {address}: .*ray dashboard cluster\.yaml.*RAY_AUTH_MODE=token"
    ):
        node_types(address)


def test_only_changes_are_kept_and_said(cluster):
    cluster += [{}, {}, {"a": "spot"}, {"a": "spot", "b": "spot"}, {"a": "spot", "b": "spot"}, {"b": "spot", "c": "x"}]
    said = []
    record = NodeRecord("http://head", said.append)
    for _ in range(6):
        record.look()
    assert [count.nodes for count in record.counts] == [{}, {"spot": 1}, {"spot": 2}, {"spot": 1, "x": 1}]
    assert [line.split(" s  ")[1] for line in said] == [
        "0 worker node(s)",
        "1 worker node(s): 1 spot",
        "2 worker node(s): 2 spot",
        "2 worker node(s): 1 spot, 1 x",
    ]
    assert record.types == {"a": "spot", "b": "spot", "c": "x"}


def test_an_answer_that_fails_now_and_then_does_not_end_the_record(cluster):
    cluster += [ClusterError("busy"), ClusterError("busy"), {"a": "spot"}]
    assert NodeRecord("http://head", lambda line: None).look().nodes == {"spot": 1}


def test_a_record_is_saved_with_its_events(cluster, tmp_path):
    cluster += [{}, {"a": "spot"}]
    record = NodeRecord("http://head", lambda line: None)
    record.look()
    record.mark("job submitted")
    record.look()
    data, picture = record.save(tmp_path / "new")
    content = json.loads(data.read_text())
    assert [count["nodes"] for count in content["counts"]] == [{}, {"spot": 1}]
    assert content["events"][0]["text"] == "job submitted"
    assert content["seconds"] >= content["counts"][-1]["seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("end", [KeyboardInterrupt(), None], ids=["ctrl-c", "cluster-gone"])
def test_looking_ends_with_a_saved_record(cluster, tmp_path, end):
    cluster += [{"a": "spot"}, *([end] if end else [])]
    record = NodeRecord("http://head", lambda line: None)
    if end:
        record.keep_looking(tmp_path, 0)
    else:
        with pytest.raises(ClusterError, match="gone"):
            record.keep_looking(tmp_path, 0)
    assert json.loads((tmp_path / "nodes.json").read_text())["counts"][0]["nodes"] == {"spot": 1}


def test_the_plot_stacks_node_types_and_shows_when_they_changed():
    counts = [NodeCount(0.0, {}), NodeCount(10.0, {"a": 1}), NodeCount(20.0, {"a": 1, "b": 2}), NodeCount(30.0, {})]
    [axes] = figure(counts, [Event(5.0, "job submitted")], 40.0).axes
    lower, upper = (area.get_paths()[0].get_extents() for area in axes.collections)
    assert (lower.y0, lower.y1) == (0, 1)
    assert upper.y1 == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["job submitted"]
    assert axes.get_ylim()[1] > 3


def test_a_cluster_without_workers_can_be_drawn():
    [axes] = figure([NodeCount(0.0, {})], [], 0.0).axes
    assert not axes.collections


def test_the_command_says_where_the_record_is(tenfold, cluster, tmp_path):
    cluster += [{"a": "spot"}, KeyboardInterrupt()]
    code, output, errors = tenfold("nodes", "--address", "http://head", "--folder", tmp_path / "out")
    assert code == 0, errors
    assert "1 worker node(s): 1 spot" in output
    assert str(tmp_path / "out" / "nodes.png") in output
    assert (tmp_path / "out" / "nodes.png").is_file()
