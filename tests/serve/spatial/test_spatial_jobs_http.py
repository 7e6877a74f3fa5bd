"""Jobs over HTTP, from the upload to the results, in one process and without Ray."""

import io
import json
import shlex
import subprocess
import time
from pathlib import Path

import anndata
import httpx
import numpy as np
import pytest


@pytest.fixture(scope="module")
def section(make_section):
    return make_section()


@pytest.fixture(scope="module")
def done(client, section, submit, wait_for):
    """A job that is done; returns its status."""
    job_id = submit(client, section, {"n_domains": 3, "seed": 1}).json()["job_id"]
    return wait_for(client, job_id, "done")


def test_an_upload_becomes_a_job_with_an_address(client, section, submit, wait_for):
    answer = submit(client, section, {"n_domains": 3, "seed": 1})
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert body["status_url"] == answer.headers["location"] == f"/spatial/v1/jobs/{body['job_id']}"
    assert body["summary"]["n_obs"] == 150
    assert wait_for(client, body["job_id"])["status"] == "done"


def test_a_status_shows_progress_options_and_times(done):
    assert done["progress"] == {"stage": "write", "epoch": 5, "epochs": 5, "loss": 20.0}
    assert done["loss"] == 20.0
    assert done["params"] == {"n_domains": 3, "seed": 1}
    assert done["files"] == {"file": "section.h5ad"}
    assert done["created"] <= done["started"] <= done["finished"] < done["expires"]
    assert done["attempt"] == 1


def test_the_results_come_in_four_formats(client, done):
    address = done["result_url"].removeprefix("/spatial")
    document = client.get(address).json()
    assert (document["n_obs"], document["n_domains"]) == (150, 3)
    lines = client.get(address, params={"format": "csv"}).text.split()
    assert lines[0] == "id,domain,p"
    assert [line.split(",")[0] for line in lines[1:]] == [f"cell{index}" for index in range(150)]
    embedding = np.load(io.BytesIO(client.get(address, params={"format": "npz"}).content), allow_pickle=False)
    assert embedding["X"].shape == (150, 10)
    h5ad = client.get(address, params={"format": "h5ad"})
    assert h5ad.content[:8] == b"\x89HDF\r\n\x1a\n"
    assert h5ad.headers["content-disposition"].startswith("attachment; filename=")


def test_an_unknown_format_is_422_and_names_those_there_are(client, done):
    error = client.get(f"/v1/jobs/{done['job_id']}/result", params={"format": "xls"})
    assert error.status_code == 422
    assert "json, csv, npz, h5ad" in error.json()["error"]["message"]


def test_a_plot_is_a_png_with_the_dots_that_were_asked_for(client, done):
    address = f"/v1/jobs/{done['job_id']}/plot.png"
    widths = []
    for dpi in (50, 100):
        image = client.get(address, params={"dpi": dpi, "color": "gene3", "size": 4}).content
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        widths.append(int.from_bytes(image[16:20], "big"))
    assert widths == [150, 300]


@pytest.mark.parametrize("query", [{"dpi": 5000}, {"dpi": "x"}, {"size": -1}, {"color": "no-such-gene"}])
def test_a_wrong_plot_option_is_422_and_named(client, done, query):
    answer = client.get(f"/v1/jobs/{done['job_id']}/plot.png", params=query)
    assert answer.status_code == 422
    assert answer.json()["error"]["errors"][0]["field"] in (next(iter(query)), "gene")


def test_the_view_holds_what_the_page_draws(client, done, section, unpack_view):
    arrays, ids, count = unpack_view(client.get(f"/v1/jobs/{done['job_id']}/view").content)
    spatial = anndata.read_h5ad(section).obsm["spatial"].astype(np.float32)
    assert count == len(ids) == 150
    np.testing.assert_array_equal(np.column_stack([arrays["x"], arrays["y"]]), spatial)
    document = client.get(f"/v1/jobs/{done['job_id']}/result").json()
    assert [row["domain"] for row in document["domains"]] == [str(value) for value in arrays["domain"]]
    assert [row["id"] for row in document["domains"]] == ids
    assert arrays["umap"].size == 300


def test_genes_are_listed_and_come_as_floats(client, done, section):
    names = client.get(f"/v1/jobs/{done['job_id']}/genes").json()["genes"]
    adata = anndata.read_h5ad(section)
    assert names == list(adata.var_names)
    body = client.get(f"/v1/jobs/{done['job_id']}/genes/{names[5]}").content
    np.testing.assert_array_equal(np.frombuffer(body, "<f4"), adata[:, names[5]].X.toarray().ravel())
    unknown = client.get(f"/v1/jobs/{done['job_id']}/genes/nothing")
    assert unknown.status_code == 422
    assert "is unknown" in unknown.json()["error"]["message"]


def test_the_same_file_and_options_are_the_same_job_under_any_name(client, done, section, submit):
    again = submit(client, section, {"seed": 1, "n_domains": 3}, name="copy.h5ad").json()
    assert (again["job_id"], again["status"]) == (done["job_id"], "done")


def test_other_options_or_another_file_are_another_job(client, done, section, submit, make_section):
    ids = {done["job_id"]}
    ids.add(submit(client, section, {"n_domains": 4, "seed": 1}).json()["job_id"])
    ids.add(submit(client, make_section(seed=5), {"n_domains": 3, "seed": 1}).json()["job_id"])
    assert len(ids) == 3


def test_tables_are_a_section_too(client, wait_for):
    generator = np.random.default_rng(0)
    counts = generator.poisson(2.0, (60, 8))
    header = "cell," + ",".join(f"g{index}" for index in range(8))
    rows = [f"c{index}," + ",".join(map(str, row)) for index, row in enumerate(counts)]
    places = [f"c{index},{index % 8},{index // 8}" for index in range(60)]
    files = {
        "counts": ("counts.csv", "\n".join([header, *rows])),
        "coordinates": ("places.csv", "\n".join(places)),
    }
    job_id = client.post("/v1/jobs", files=files, data={"params": '{"n_domains": 2}'}).json()["job_id"]
    assert wait_for(client, job_id)["status"] == "done"
    assert client.get(f"/v1/jobs/{job_id}/result").json()["n_obs"] == 60


def test_a_cancelled_job_stops_and_another_upload_begins_it_again(client, section, submit, wait_for, server):
    from kmeans_analyser import HOLD

    params = {"epochs": 500, "seed": 77}
    _, service, jobs = server
    hold = service.store.root / HOLD
    hold.touch()
    try:
        job_id = submit(client, section, params).json()["job_id"]
        wait_for(client, job_id, "running")
        assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
        status = client.get(f"/v1/jobs/{job_id}").json()
        assert status["status"] == "cancelled"
        refused = client.get(f"/v1/jobs/{job_id}/result")
        assert refused.status_code == 409
        assert "was cancelled" in refused.json()["error"]["message"]
        # No job gets to its end here, and the one thread begins another job: it has stopped the first one.
        other = submit(client, section, {"epochs": 1, "seed": 78}).json()["job_id"]
        wait_for(client, other, "running")
    finally:
        hold.unlink()
    wait_for(client, other, "done")
    assert not list(service.store.folder(job_id).glob("attempt-*"))
    jobs.paused = True  # or it may have begun before it is looked at
    try:
        assert submit(client, section, params).json() | {"summary": 0, "status_url": 0} == {
            "job_id": job_id,
            "status": "queued",
            "status_url": 0,
            "summary": 0,
        }
    finally:
        jobs.paused = False
    wait_for(client, job_id, "running")
    client.delete(f"/v1/jobs/{job_id}")


def test_deleting_a_finished_job_removes_it_and_its_files(client, section, submit, wait_for, server):
    job_id = submit(client, section, {"seed": 90}).json()["job_id"]
    wait_for(client, job_id, "done")
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert not server[1].store.folder(job_id).exists()


def test_a_job_that_fails_says_why_and_has_no_results(client, section, submit, wait_for):
    job_id = submit(client, section, {"method": "fail"}).json()["job_id"]
    status = wait_for(client, job_id)
    assert status["status"] == "failed"
    assert status["error"] == {
        "message": "X has only zeros. Send counts",
        "code": "invalid_data",
        "errors": [{"field": "X", "message": "X has only zeros. Send counts"}],
    }
    assert client.get(f"/v1/jobs/{job_id}/result").status_code == 409


def test_results_of_a_job_that_waits_are_409(client, section, submit, jobs):
    jobs.paused = True
    try:
        job_id = submit(client, section, {"seed": 300}).json()["job_id"]
        for path in ("result", "plot.png", "view", "genes", "genes/gene1"):
            answer = client.get(f"/v1/jobs/{job_id}/{path}")
            assert answer.status_code == 409
            assert "is queued" in answer.json()["error"]["message"]
        client.delete(f"/v1/jobs/{job_id}")
    finally:
        jobs.paused = False


def test_more_jobs_than_a_client_may_have_are_429_with_when_to_come_back(client, section, submit, jobs):
    jobs.paused = True
    try:
        waiting = [submit(client, section, {"seed": 400 + index}) for index in range(2)]
        assert [answer.status_code for answer in waiting] == [202, 202]
        refused = submit(client, section, {"seed": 402})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "3"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # The same job again is no new one.
        assert submit(client, section, {"seed": 400}).json()["job_id"] == waiting[0].json()["job_id"]
        for answer in waiting:
            client.delete(f"/v1/jobs/{answer.json()['job_id']}")
        assert submit(client, section, {"seed": 402}).status_code == 202
    finally:
        jobs.paused = False


@pytest.mark.parametrize("job_id", ["0" * 32, "nothing", "..", "%2e%2e%2f%2e%2e", "x" * 500])
def test_an_unknown_job_is_404(client, job_id):
    for path in ("", "/result", "/plot.png", "/view", "/genes"):
        answer = client.get(f"/v1/jobs/{job_id}{path}")
        assert answer.status_code == 404
        assert "error" in answer.json()
    assert client.delete(f"/v1/jobs/{job_id}").status_code in (404, 405)


def test_health_models_and_limits_are_told(client):
    assert client.get("/healthz").json() == {"status": "ok", "models": ["seven"]}
    assert client.get("/v1/models").json()["data"] == [{"id": "seven", "n_domains": 1, "domain": "7"}]
    limits = client.get("/v1/limits").json()
    assert limits["max_upload_bytes"] == 2_000_000
    assert limits["files"]["file"] == [".h5ad"]


def test_a_saved_model_labels_a_section_at_once(client, section):
    files = {"file": ("section.h5ad", section.read_bytes())}
    answer = client.post("/v1/predict", files=files, data={"model_id": "seven"})
    assert answer.status_code == 200
    assert {row["domain"] for row in answer.json()["domains"]} == {"7"}


def test_predict_refuses_unknown_models_and_large_sections(client, section, make_section):
    files = {"file": ("section.h5ad", section.read_bytes())}
    unknown = client.post("/v1/predict", files=files, data={"model_id": "sevem"})
    assert unknown.status_code == 404
    assert "did you mean seven?" in unknown.json()["error"]["message"]
    assert client.post("/v1/predict", files=files).json()["error"]["param"] == "model_id"
    large = {"file": ("section.h5ad", make_section(300).read_bytes())}
    answer = client.post("/v1/predict", files=large, data={"model_id": "seven"})
    assert answer.status_code == 422
    assert "at most 200" in answer.json()["error"]["message"]


def test_results_expire_and_are_deleted(start_spatial_server, tmp_path, section, submit, wait_for):
    data = {"storage": str(tmp_path), "limits": {"ttl_s": 0.5}, "replicas": {"processes": 1}}
    with start_spatial_server(data) as (client, service, jobs):
        job_id = submit(client, section).json()["job_id"]
        deadline = time.monotonic() + 120
        while client.get(f"/v1/jobs/{job_id}").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert service.store.state(job_id).status == "done"
        assert service.store.sweep(ttl_s=0.5, upload_s=1) == 0
        assert not service.store.folder(job_id).exists()
        # The next one must still be there when it is looked at.
        service.limits = service.limits.model_copy(update={"ttl_s": 3600.0})
        jobs.paused = True  # or it may have begun before it is looked at
        again = submit(client, section).json()
        assert (again["job_id"], again["status"]) == (job_id, "queued")
        jobs.paused = False
        assert wait_for(client, job_id, "done")


def test_with_keys_only_their_holders_see_their_jobs(start_spatial_server, tmp_path, section, submit, wait_for):
    (tmp_path / "keys").write_text("one\ntwo\n")
    data = {"storage": str(tmp_path / "jobs"), "api_keys": {"file": str(tmp_path / "keys")}}
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    with start_spatial_server({**data, "replicas": {"processes": 1}}) as (client, _, _):
        assert submit(client, section).status_code == 401
        assert client.get("/v1/limits").status_code == 401
        assert client.get("/healthz").status_code == 200
        job_id = submit(client, section, headers=one).json()["job_id"]
        wait_for(client, job_id, "done", headers=one)
        assert client.get(f"/v1/jobs/{job_id}", headers=two).status_code == 404
        assert client.get(f"/v1/jobs/{job_id}/result", headers=two).status_code == 404
        assert client.delete(f"/v1/jobs/{job_id}", headers=two).status_code == 404
        assert submit(client, section, headers=two).json()["job_id"] != job_id


def test_a_job_without_signs_of_life_makes_the_replica_look_after_its_supervisor(
    start_spatial_server, tmp_path, section, submit
):
    data = {"storage": str(tmp_path), "jobs": {"stale_s": 0.3, "heartbeat_s": 0.05}, "replicas": {"processes": 1}}
    with start_spatial_server(data) as (client, service, jobs):
        jobs.paused = True
        job_id = submit(client, section).json()["job_id"]
        service.store.claim(job_id, 3)
        assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "running"
        before = jobs.wakes
        time.sleep(0.4)
        client.get(f"/v1/jobs/{job_id}")
        assert jobs.wakes == before + 1


def test_the_page_and_its_parts_are_served_with_a_strict_policy(client):
    assert client.get("", follow_redirects=True).url.path == "/spatial/"
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/..%2fapi.py").status_code == 404
    assert "http://" not in client.get("/").text + client.get("/page/page.js").text


def test_errors_have_the_form_of_the_language_models(client):
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert client.put("/v1/jobs").status_code == 405


def test_jobs_without_the_slash_after_the_prefix_lead_to_the_page(client):
    answer = httpx.get(str(client.base_url).rstrip("/"), follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"].endswith("/spatial/")


def test_the_commands_of_the_documentation_work(client, make_section, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "spatial.md").read_text()
    commands = [line.strip() for line in page.splitlines() if line.startswith("    curl ")]
    (tmp_path / "section.h5ad").write_bytes(make_section(seed=21).read_bytes())
    (tmp_path / "counts.csv").write_text("cell,g1,g2,g3\n" + "".join(f"c{i},{i},{i % 3},1\n" for i in range(30)))
    (tmp_path / "places.csv").write_text("".join(f"c{i},{i % 6},{i // 6}\n" for i in range(30)))
    base = str(client.base_url).rstrip("/")
    job_id, answers = "", []
    for command in commands:
        words = shlex.split(command.replace("http://127.0.0.1:8000/spatial", base).replace("JOB_ID", job_id))
        answers.append(subprocess.run([*words, "-sS", "--fail"], cwd=tmp_path, capture_output=True, check=True).stdout)
        if not job_id:
            job_id = json.loads(answers[0])["job_id"]
            deadline = time.monotonic() + 120
            while client.get(f"/v1/jobs/{job_id}").json()["status"] != "done":
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert len(commands) == 6
    assert json.loads(answers[1])["status"] == "done"
    assert (tmp_path / "domains.csv").read_text().startswith("id,domain")
    assert (tmp_path / "tissue.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(answers[5])["summary"]["n_obs"] == 30


def test_the_json_result_is_what_the_analyser_wrote(client, done):
    text = client.get(f"/v1/jobs/{done['job_id']}/result").text
    assert json.loads(text)["domains"][0]["id"] == "cell0"
