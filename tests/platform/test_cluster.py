import logging
import os
import socket
import stat
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tenfold.platform import cluster, doctor
from tenfold.platform.cluster import Capacity, check_capacity, cluster_address, connect
from tenfold.platform.cluster_capacity import NodeShape, local_capacity, read_autoscaling_config
from tenfold.platform.errors import ClusterError


def nodes(*sizes: tuple[float, float]) -> Capacity:
    shapes = tuple(NodeShape(cpus, gpus) for cpus, gpus in sizes)
    return Capacity(sum(s.cpus for s in shapes), sum(s.gpus for s in shapes), 2**30, len(shapes), shapes=shapes)


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Hide what runs on this machine: no RAY_ADDRESS, and an empty folder in place of /tmp/ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_a_run_that_fits_returns_what_it_was_checked_against():
    have = nodes((4, 0), (4, 1))
    assert check_capacity(4, 2, 0, available=have) is have
    assert check_capacity(2, 0.5, 0.5, available=have) is have


def test_more_gpus_than_there_are_is_an_error_with_both_numbers_and_what_to_change():
    with pytest.raises(ClusterError) as caught:
        check_capacity(4, 1, 1, available=nodes((8, 0)))
    message = str(caught.value)
    assert "4 worker(s) with 1 CPU and 1 GPU each (4 CPU and 4 GPU together)" in message
    assert "the cluster has 8 CPU and 0 GPU on 1 node(s)" in message
    assert "compute.gpus_per_worker=0" in message


def test_too_many_workers_is_an_error_that_names_how_many_fit():
    with pytest.raises(ClusterError, match=r"so 2 such worker\(s\) fit\. Use compute\.workers=2 or a bigger cluster"):
        check_capacity(3, 1, 0, available=nodes((2, 0)))


def test_a_worker_larger_than_any_node_does_not_fit_although_the_total_would_do():
    with pytest.raises(ClusterError, match=r"has 4 CPU.*so 0 such worker.*compute\.cpus_per_worker=2"):
        check_capacity(1, 3, 0, available=nodes((2, 0), (2, 0)))


def test_trials_at_the_same_time_count_together():
    have = nodes((4, 0))
    check_capacity(2, 1, 0, concurrent=2, available=have)
    with pytest.raises(ClusterError, match=r"3 runs at a time of 2 worker\(s\).*sweep\.max_concurrent=2"):
        check_capacity(2, 1, 0, concurrent=3, available=have)


def test_fractions_of_a_core_do_not_suffer_from_rounding():
    check_capacity(10, 0.1, 0, available=nodes((1, 0)))


def test_a_known_autoscaler_counts_with_its_largest_size(tmp_path):
    config = tmp_path / "cluster.yaml"
    config.write_text(
        "max_workers: 3\nhead_node_type: head\navailable_node_types:\n"
        "  head: {resources: {CPU: 1}}\n"
        "  cpu: {resources: {CPU: 8}, max_workers: 10}\n"
        "  gpu: {resources: {CPU: 4, GPU: 2}, max_workers: 2}\n"
    )
    fixed, growth, limit = read_autoscaling_config(config)
    have = Capacity(
        1, 0, 2**30, 1, {"CPU": 25.0, "GPU": 4.0}, "known", (NodeShape(1, 0),), fixed, growth, growth_nodes=limit
    )
    assert have.most(lambda shape: shape.cpus) == 1 + 3 * 8
    assert have.most(lambda shape: shape.gpus) == 2 * 2
    check_capacity(25, 1, 0, available=have)
    check_capacity(4, 1, 1, available=have)
    with pytest.raises(ClusterError, match=r"may grow to 25 CPU, 4 GPU, so 25 such"):
        check_capacity(26, 1, 0, available=have)
    with pytest.raises(ClusterError, match=r"so 4 such"):
        check_capacity(5, 1, 1, available=have)


@pytest.mark.parametrize("text", ["head_node_type: h\navailable_node_types: {h: {}}", "a: [", "", "- 1"])
def test_an_autoscaler_file_without_sizes_means_unknown(tmp_path, text):
    config = tmp_path / "cluster.yaml"
    config.write_text(text)
    assert read_autoscaling_config(config) is None
    assert read_autoscaling_config(tmp_path / "absent.yaml") is None


def test_an_autoscaler_of_unknown_limits_warns_instead_of_refusing(caplog):
    have = Capacity(2, 0, 2**30, 1, autoscaler="unknown", shapes=(NodeShape(2, 0),))
    assert check_capacity(8, 1, 1, available=have) is have
    assert "limits are not known" in caplog.text


def test_the_capacity_of_this_machine_is_known_without_starting_ray():
    import ray

    have = local_capacity()
    assert 1 <= have.cpus <= os.cpu_count()
    assert local_capacity(3).cpus == 3
    assert not ray.is_initialized()


def test_asking_for_capacity_without_a_connection_is_an_error():
    with pytest.raises(ClusterError, match="connect"):
        cluster.capacity()


def test_an_address_where_nothing_listens_is_an_error_that_names_it(free_port):
    assert cluster.CONNECT_SECONDS < 10
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=rf"'{address}': nothing listens there.*ray start --head"):
        connect(address=address)
    assert time.monotonic() - begin < 60


def test_an_address_that_is_no_ray_cluster_is_an_error(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match="not a Ray cluster"):
            connect(address=f"127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("http://head:8265", "ray job submit --address http://head:8265"),
        ("ray://head:10001", "Ray Client"),
        ("head-node", "needs host:port"),
    ],
)
def test_addresses_of_another_kind_are_refused_with_advice(address, advice, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=advice):
        connect()


def test_without_an_address_a_local_cluster_would_be_started(no_cluster):
    assert cluster_address() is None


def test_an_argument_wins_over_the_environment(no_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address() == "head:6379"
    assert cluster_address("other:6379") == "other:6379"
    assert cluster_address("local") is None


def test_a_cluster_that_runs_here_is_found_and_a_dead_one_is_not(no_cluster, free_port):
    with socket.create_server(("127.0.0.1", 0)) as alive:
        no_cluster.write_text(f"127.0.0.1:{alive.getsockname()[1]}")
        assert cluster_address() == no_cluster.read_text()
    no_cluster.write_text(f"127.0.0.1:{free_port()}")
    assert cluster_address() is None


def test_auto_without_a_cluster_is_an_error(no_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match="ray start --head"):
        connect()


def test_the_token_becomes_private(tmp_path, monkeypatch):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster._protect_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_only_known_lines_of_ray_are_dropped():
    def record(text):
        return logging.LogRecord("ray", logging.WARNING, "", 0, text, None, None)

    assert not cluster._is_news(record("Token authentication is enabled for this Ray cluster. Set RAY_AUTH_MODE=..."))
    assert cluster._is_news(record("Token authentication is disabled for this Ray cluster."))


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_says_what_it_has_and_ends():
    import ray

    try:
        connect(address="local", num_cpus=2, include_dashboard=False)
        assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
        address = ray.get_runtime_context().gcs_address
        connect(num_cpus=5)  # connected already: nothing happens
        have = check_capacity(2, 1, 0)
        assert (have.cpus, have.nodes, have.autoscaler) == (2, 1, "none")
        assert [(fact.address, fact.cpus, fact.is_head) for fact in cluster.node_facts()] == [("127.0.0.1", 2.0, True)]
        with pytest.raises(ClusterError, match=r"GPU each .* the cluster has 2 CPU"):
            check_capacity(1, 1, have.gpus + 1)
        with pytest.raises(ClusterError, match=r"compute\.workers=2"):
            check_capacity(3, 1, 0)
        assert ray.get(ray.remote(lambda: 42).remote()) == 42
        found = doctor._ray(doctor._Subject("runs", "sqlite:///mlflow.db", start_ray=True))
        assert (found.status, "1 node(s), 2 CPU" in found.detail) == ("ok", True)
        assert ray.is_initialized()
    finally:
        cluster.shutdown()
    assert not ray.is_initialized()
    assert cluster.LOOPBACK_VARIABLE not in os.environ
    with pytest.raises(ClusterError, match="nothing listens"):
        connect(address=address)
