"""The whole way on Ray Serve: beside the language models' place, with replicas, workers and the supervisor killed."""

import os
import signal
import time

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def client(storage, analyser_path, free_port):
    from ray import serve
    from tenfold.platform import cluster
    from tenfold.serve.spatial.app import build

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = analyser_path
    cluster.connect(num_cpus=3)
    port = free_port()
    args = {
        "storage": str(storage),
        "method": "kmeans_analyser:KMeansAnalyser",
        "jobs": {"max_attempts": 2, "stale_s": 2, "heartbeat_s": 0.5, "cpus": 0.5},
        "limits": {"max_jobs_per_client": 8},
        "replicas": {"min": 2, "cpus": 0.5, "processes": 1},
    }
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name="spatial", route_prefix="/spatial")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/spatial", timeout=60) as made:
            yield made
    finally:
        serve.shutdown()
        cluster.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def section(make_section):
    return make_section()


@pytest.fixture
def hold(storage):
    """Keep jobs running; returns what lets them end."""
    file = storage / "hold"
    file.touch()
    yield lambda: file.unlink(missing_ok=True)
    file.unlink(missing_ok=True)


@pytest.fixture
def started(client, section, submit, hold):
    """Return started(seed) -> id of a job that runs, and goes on until it is let go."""

    def start(seed):
        job_id = submit(client, section, {"seed": seed, "epochs": 1}).json()["job_id"]
        wait_until(lambda: stage_of(client, job_id) == "hold")
        return job_id

    return start


def stage_of(client, job_id):
    return client.get(f"/v1/jobs/{job_id}").json()["progress"].get("stage")


def processes(title):
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(title):
    (process, *_) = processes(title)
    os.kill(process.pid, signal.SIGKILL)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_section_goes_in_and_domains_come_out(client, section, submit, wait_for):
    answer = submit(client, section, {"n_domains": 3})
    assert answer.status_code == 202, answer.text
    assert answer.json()["status_url"] == f"/spatial/v1/jobs/{answer.json()['job_id']}"
    job_id = answer.json()["job_id"]
    assert wait_for(client, job_id, seconds=120)["status"] == "done"
    # Two replicas take turns; both know the job.
    for _ in range(8):
        assert client.get(f"/v1/jobs/{job_id}/result").json()["n_domains"] == 3
    assert client.get("/").status_code == 200
    assert client.get("", follow_redirects=True).url.path == "/spatial/"
    assert client.get("/healthz").json()["status"] == "ok"


def test_the_death_of_all_replicas_takes_no_job_with_it(client, started, hold, wait_for):
    job_id = started(1)
    for process in processes("ServeReplica:spatial"):
        os.kill(process.pid, signal.SIGKILL)

    def answers():
        try:
            return client.get(f"/v1/jobs/{job_id}").status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(answers, seconds=60)
    hold()
    status = wait_for(client, job_id, seconds=120)
    assert (status["status"], status["attempt"]) == ("done", 1)


def test_a_killed_worker_has_its_job_done_again_under_the_same_id(client, started, hold, wait_for):
    job_id = started(2)
    kill("ray::spatial-job")
    hold()
    status = wait_for(client, job_id, seconds=120)
    assert (status["status"], status["attempt"]) == ("done", 2)


def test_a_job_that_kills_every_worker_fails_after_the_attempts_allowed(client, section, submit, wait_for):
    job_id = submit(client, section, {"method": "die"}).json()["job_id"]
    status = wait_for(client, job_id, seconds=120)
    assert status["status"] == "failed"
    assert status["error"]["code"] == "worker_lost"
    assert "lost 2 times" in status["error"]["message"]


def test_a_killed_supervisor_is_restarted_and_goes_on(client, started, hold, wait_for):
    job_id = started(3)
    kill("ray::Supervisor")
    wait_until(lambda: client.get(f"/v1/jobs/{job_id}").json()["attempt"] == 2)
    hold()
    assert wait_for(client, job_id, seconds=120)["status"] == "done"


def test_a_supervisor_that_is_gone_is_made_anew_when_a_job_shows_no_life(client, started, hold, wait_for):
    import ray
    from tenfold.serve.spatial.supervisor import NAMESPACE

    job_id = started(4)
    (name,) = [actor["name"] for actor in ray.util.list_named_actors(True) if actor["namespace"] == NAMESPACE]
    ray.kill(ray.get_actor(name, NAMESPACE))
    wait_until(lambda: client.get(f"/v1/jobs/{job_id}").json()["attempt"] == 2)
    hold()
    assert wait_for(client, job_id, seconds=120)["status"] == "done"


def test_a_cancelled_job_frees_its_worker(client, section, submit, wait_for):
    job_id = submit(client, section, {"seed": 5, "epochs": 2000}).json()["job_id"]
    wait_for(client, job_id, "running")
    wait_until(lambda: processes("ray::spatial-job"))
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    wait_until(lambda: not processes("ray::spatial-job"))
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"


def test_300_mib_where_256_are_allowed_are_413_through_the_proxy(client, storage):
    answer = client.post("/v1/jobs", files={"file": ("big.h5ad", bytes(300 * MEBIBYTE))})
    assert answer.status_code == 413
    assert f"this server takes {256 * MEBIBYTE}" in answer.json()["error"]["message"]
    wait_until(lambda: not list((storage / "incoming").iterdir()))


def test_a_replica_with_another_configuration_replaces_the_supervisor(client, storage):
    import ray
    from tenfold.serve.spatial.config import parse_spatial_config
    from tenfold.serve.spatial.supervisor import RayJobs, identity_of

    data = {"storage": str(storage), "method": "kmeans_analyser:KMeansAnalyser", "limits": {"ttl_s": 1000}}
    jobs = RayJobs(parse_spatial_config(data))
    jobs.start()
    assert ray.get(jobs._supervisor().identity.remote()) == identity_of(
        parse_spatial_config(data).model_dump(mode="json", exclude_unset=True)
    )


def test_requests_and_jobs_reach_the_metrics_port(client):
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    names = ("tenfold_spatial_requests", "tenfold_spatial_request_seconds", "tenfold_spatial_jobs")

    def exported():
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        return all(f"ray_{name}" in text for name in names) and "/v1/jobs/{job_id}" in text

    wait_until(exported)
