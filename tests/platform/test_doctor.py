import importlib.metadata
import io
import json
import socket

import pytest
from rich.console import Console
from tenfold.platform import doctor
from tenfold.platform.cluster import Capacity
from tenfold.platform.cluster_capacity import NodeShape
from tenfold.platform.doctor import Check, as_dict, checks, render
from tenfold.platform.hardware import available_memory, cpu_bf16_flags, cpu_flags, supports_bf16


@pytest.fixture
def examine(monkeypatch, tmp_path):
    """Return a function that runs all checks but Ray's and gives the finding of one name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def run(name, **options):
        return {check.name: check for check in checks(start_ray=False, **options)}[name]

    return run


def several_nodes(tracking_uri, storage, nodes=2, autoscaler="none"):
    shapes = (NodeShape(2, 0),) * nodes
    have = Capacity(2.0 * nodes, 0, 2**30, nodes, autoscaler=autoscaler, shapes=shapes)
    return doctor._several_nodes(doctor._Subject(storage, tracking_uri, True, have))


def test_every_check_answers_and_is_announced_before(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    begun = []
    found = checks(start_ray=False, on_begin=begun.append)
    assert [check.name for check in found] == begun
    assert len(begun) == len(set(begun)) == 14
    assert all(check.detail for check in found)
    assert all(check.advice for check in found if check.status == "warn")
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(monkeypatch, examine):
    def break_down(subject):
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "_memory", break_down)
    assert examine("memory") == Check(
        "memory", "fail", "KeyError: 'surprise'", "This check itself broke; see the cause"
    )
    assert examine("python").status == "ok"


def test_an_unwritable_storage_fails_with_the_path(examine):
    found = examine("storage", storage="/proc/tenfold")
    assert found.status == "fail"
    assert "/proc/tenfold" in found.detail


def test_a_tracking_server_that_is_down_fails_with_advice(examine):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    found = examine("tracking", tracking_uri=uri)
    assert found.status == "fail"
    assert uri in found.detail
    assert "mlflow server" in found.detail


def test_a_relative_database_is_named_with_its_full_path(examine, tmp_path):
    assert f"{tmp_path}/mlflow.db" in examine("tracking").detail


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o644, "warn")])
def test_a_token_that_others_can_read_is_a_warning(mode, status, examine, tmp_path, monkeypatch):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    found = examine("ray token")
    assert found.status == status
    assert (found.advice == f"chmod 600 {token}") == (status == "warn")


def test_authentication_that_is_off_is_a_warning(examine, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert examine("ray token").status == "warn"


def test_the_cluster_that_would_be_used_is_named(examine, monkeypatch):
    assert "would start a cluster on this machine" in examine("ray").detail
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "would join head:6379" in examine("ray").detail


def test_a_wrong_version_is_a_warning_that_names_the_tested_range(examine, monkeypatch):
    version = importlib.metadata.version("pytest")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["pytest<1", 'rich<1; extra == "other"'])
    found = examine("packages")
    assert found.status == "warn"
    assert f"pytest {version} (tested: <1)" in found.detail


def test_a_missing_package_is_a_failure_unless_it_is_optional(examine, monkeypatch):
    absent = ["no-such-package-1", 'no-such-package-2; extra == "gpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: absent)
    found = examine("packages")
    assert found.status == "fail"
    assert found.detail == "missing: no-such-package-1"


def test_a_missing_compiler_is_only_a_warning(examine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examine("compiler")
    assert found.status == "warn"
    assert "zero2_offload" in found.advice


@pytest.mark.parametrize(("free", "status"), [(2**29, "fail"), (2 * 2**30, "warn"), (8 * 2**30, "ok")])
def test_little_memory_is_said(free, status, examine, monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: free)
    assert examine("memory").status == status


def test_several_nodes_with_files_of_one_node_are_a_warning():
    found = several_nodes("sqlite:///mlflow.db", "runs")
    assert found.status == "warn"
    assert "SQLite" in found.detail
    assert "local folder" in found.detail
    assert "mlflow server" in found.advice


def test_one_node_that_may_grow_counts_as_several():
    assert several_nodes("sqlite:///mlflow.db", "memory://runs", nodes=1, autoscaler="unknown").status == "warn"
    assert several_nodes("sqlite:///mlflow.db", "runs", nodes=1).status == "ok"


def test_several_nodes_with_a_server_and_a_bucket_are_fine():
    assert several_nodes("http://head:5000", "memory://runs").status == "ok"


def test_the_worst_status_decides_and_the_findings_are_plain_data():
    found = [Check("a", "ok", "fine"), Check("b", "warn", "hm", "do it"), Check("c", "ok", "fine")]
    assert as_dict(found)["status"] == "warn"
    assert as_dict([*found, Check("d", "fail", "bad")])["status"] == "fail"
    assert as_dict([])["status"] == "ok"
    text = json.dumps(as_dict(found))
    assert json.loads(text)["checks"][1] == {"name": "b", "status": "warn", "detail": "hm", "advice": "do it"}


def test_the_table_shows_details_as_they_are_with_advice():
    output = io.StringIO()
    found = [Check("packages", "warn", "ray[default] 1.0 [odd]", "pip install 'ray[default]'")]
    Console(file=output, width=100).print(render(found))
    assert "ray[default] 1.0 [odd]" in output.getvalue()
    assert "do: pip install 'ray[default]'" in output.getvalue()


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")),
        ("flags\t\t: fpu avx2 avx512f", ()),
        ("Features\t: fp asimd bf16 i8mm", ("bf16",)),
        ("model name\t: bf16 in a name", ()),
    ],
)
def test_native_bf16_is_read_from_the_processor_flags(line, native, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
    assert cpu_bf16_flags(cpuinfo) == native


def test_a_system_without_cpuinfo_has_no_flags(tmp_path):
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_bf16_on_the_processor_follows_its_flags():
    assert supports_bf16(use_gpu=False) == bool(cpu_bf16_flags())


def test_a_container_limit_bounds_the_available_memory(tmp_path):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory(tmp_path) == 2000000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 2000000
