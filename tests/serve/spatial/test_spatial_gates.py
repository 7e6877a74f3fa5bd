"""GATES itself behind the application: upload, poll, result, plot, gene."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(start_spatial_server, tmp_path_factory):
    data = {"storage": str(tmp_path_factory.mktemp("storage")), "method": "gates", "replicas": {"processes": 1}}
    with start_spatial_server(data) as (client, _, _):
        yield client


@pytest.fixture(scope="module")
def section(make_section):
    return make_section(300, 60)


@pytest.fixture(scope="module")
def done(client, section, submit, wait_for):
    answer = submit(client, section, {"n_domains": 3, "epochs": 30, "refine": "majority", "labels": "domain"})
    assert answer.status_code == 202, answer.text
    return wait_for(client, answer.json()["job_id"], seconds=120)


def test_a_section_becomes_domains_with_their_metrics(client, done):
    assert done["status"] == "done", done
    assert (done["progress"]["epoch"], done["progress"]["epochs"]) == (30, 30)
    assert done["loss"] > 0
    result = client.get(f"/v1/jobs/{done['job_id']}/result").json()
    assert (result["n_obs"], result["n_domains"]) == (300, 3)
    assert result["embedding"]["shape"] == [300, 30]
    assert client.get(f"/v1/jobs/{done['job_id']}/{result['embedding']['url']}").content.startswith(b"PK")
    assert {"ari", "pas"} <= result["metrics"].keys()
    assert client.get(f"/v1/jobs/{done['job_id']}/result?format=csv").text.splitlines()[1].startswith("cell0,")


def test_the_page_gets_places_domains_and_a_umap(client, done, unpack_view):
    arrays, ids, count = unpack_view(client.get(f"/v1/jobs/{done['job_id']}/view").content)
    assert count == len(ids) == 300
    assert arrays.keys() == {"x", "y", "umap", "domain", "refined", "probability"}
    labelled = arrays["domain"] >= 0  # cells without counts have no domain
    assert set(arrays["domain"][labelled]) == {0, 1, 2}
    assert labelled.mean() > 0.9
    assert np.isfinite(arrays["umap"].reshape(300, 2)[labelled]).all()


def test_plots_and_genes_can_be_asked_for(client, done):
    genes = client.get(f"/v1/jobs/{done['job_id']}/genes").json()["genes"]
    values = np.frombuffer(client.get(f"/v1/jobs/{done['job_id']}/genes/{genes[0]}").content, "<f4")
    assert len(values) == 300
    assert values.max() > 0
    for color in ("domain", "refined", "truth", genes[0]):
        image = client.get(f"/v1/jobs/{done['job_id']}/plot.png", params={"color": color, "dpi": 40})
        assert image.content[:4] == b"\x89PNG", color
    near = client.get(f"/v1/jobs/{done['job_id']}/genes/{genes[0]}x").json()["error"]
    assert "did you mean" in near["message"]


def test_what_gates_does_not_know_is_refused_before_work_starts(client, section, submit):
    for params, field in (
        ({"method": "nope"}, "method"),
        ({"n_domains": 301}, "n_domains"),
        ({"layer": "raw"}, "layers['raw']"),
        ({"spatial_key": "umap"}, "obsm['umap']"),
    ):
        answer = submit(client, section, params)
        assert answer.status_code == 422, params
        assert field in [problem["field"] for problem in answer.json()["error"]["errors"]], answer.text


def with_own_columns(adata):
    adata.obs["section"] = ["left" if x < 8 else "right" for x in adata.obsm["spatial"][:, 0]]
    adata.obs["truth"] = adata.obs["domain"]


def test_an_upload_has_no_section_names_but_those_of_its_sample_key(client, make_section, submit, wait_for):
    path = make_section(200, 40, seed=3, change=with_own_columns)
    for more, values in (({}, None), ({"sample_key": "section"}, {"left", "right"})):
        job_id = submit(client, path, {"n_domains": 3, "epochs": 2, **more}).json()["job_id"]
        assert wait_for(client, job_id, seconds=120)["status"] == "done"
        rows = client.get(f"/v1/jobs/{job_id}/result").json()["domains"]
        assert {row.get("section") for row in rows} == (values or {None})
        header = client.get(f"/v1/jobs/{job_id}/result?format=csv").text.splitlines()[0].split(",")
        assert ("section" in header) == (values is not None)
        assert client.get(f"/v1/jobs/{job_id}/plot.png?dpi=40").status_code == 200


def test_notes_name_the_part_of_the_form_and_no_place_on_the_server(client, make_section, submit, wait_for):
    path = make_section(200, 40, seed=4, change=with_own_columns)
    answer = submit(client, path, {"n_domains": 3, "epochs": 2}).json()
    wait_for(client, answer["job_id"], seconds=120)
    result = client.get(f"/v1/jobs/{answer['job_id']}/result").json()
    for notes in (answer["summary"]["notes"], result["notes"]):
        assert "file: obs['truth'] is taken for the true domains" in notes
        assert any("sample_key" in note for note in notes)
        assert not any("/" in note for note in notes), notes
