"""What the HTTP application asks of GATES, on files as clients send them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tenfold.methods.gates.method import GATES
from tenfold.methods.gates.synthetic import synthetic_section
from tenfold.platform.errors import DataError
from tenfold.serve.spatial.analyser import SectionLimits

LIMITS = SectionLimits(max_cells=1000, max_genes=1000, max_values=10**6, max_bytes=10**8)
PARAMS = {"n_domains": 3, "epochs": 3, "refine": "majority", "labels": "domain", "num_genes": 60}


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    path = tmp_path_factory.mktemp("upload") / "file.h5ad"
    synthetic_section(120, num_genes=60, num_domains=3, density=0.3).write_h5ad(path)
    return {"file": path}


@pytest.fixture(scope="module")
def results(upload, tmp_path_factory):
    folder, news = tmp_path_factory.mktemp("results"), []
    GATES.spatial_analyser().run(upload, PARAMS, folder, news.append)
    return folder, news


def test_a_good_section_is_described(upload):
    found = GATES.spatial_analyser().check(upload, PARAMS, LIMITS)
    assert (found["n_obs"], found["n_vars"], found["sections"]) == (120, 60, 1)


def test_problems_are_one_a_line_and_begin_with_the_field(upload):
    with pytest.raises(DataError, match=r"^n_domains = 500"):
        GATES.spatial_analyser().check(upload, {**PARAMS, "n_domains": 500}, LIMITS)
    with pytest.raises(DataError, match=r"^alpha = 0\.5: .*one graph"):
        GATES.spatial_analyser().check(upload, {**PARAMS, "method": "stagate", "alpha": 0.5}, LIMITS)
    with pytest.raises(DataError, match="120 cells"):
        GATES.spatial_analyser().check(upload, PARAMS, SectionLimits(100, 1000, 10**6, 10**8))


def test_a_job_writes_what_clients_and_the_page_read(results):
    folder, news = results
    document = json.loads((folder / "result.json").read_text())
    assert document["n_domains"] == 3
    assert document["embedding"]["shape"] == [120, 30]
    assert {"ari", "pas"} <= document["metrics"].keys()
    with np.load(folder / "view.npz", allow_pickle=False) as view:
        assert {name: view[name].dtype.str[1:] for name in view} == {
            "x": "f4",
            "y": "f4",
            "domain": "i2",
            "y_up": "b1",
            "probability": "f4",
            "refined": "i2",
            "umap": "f4",
        }
        with (folder / "domains.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert [int(row["domain"]) for row in rows] == view["domain"].tolist()
    epochs = [(item["epoch"], item["epochs"]) for item in news if "epoch" in item]
    assert epochs == [(1, 3), (2, 3), (3, 3)]


def test_a_gene_is_read_by_name_with_its_own_values(results, upload):
    import anndata

    folder, _ = results
    analyser = GATES.spatial_analyser()
    assert len(analyser.genes(folder)) == 60
    counts = anndata.read_h5ad(upload["file"])
    share = counts.X.toarray() / np.asarray(counts.X.sum(axis=1)) * 1e4
    expected = np.log1p(share[:, list(counts.var_names).index("gene7")])
    np.testing.assert_allclose(analyser.gene(folder, "gene7"), expected, rtol=1e-5)
    with pytest.raises(DataError, match="gene7"):
        analyser.gene(folder, "gen7")


@pytest.mark.parametrize("color", ["domain", "refined", "truth", "gene7"])
def test_plots_are_png_files(results, color):
    folder, _ = results
    assert GATES.spatial_analyser().plot(folder, color, None, 50).startswith(b"\x89PNG")


def test_a_plot_of_something_unknown_is_refused(results):
    folder, _ = results
    with pytest.raises(DataError, match="not among the 60 genes"):
        GATES.spatial_analyser().plot(folder, "nothing", None, 50)


def test_a_saved_model_labels_an_upload_at_once(upload, tmp_path):
    import anndata
    from tenfold.methods.gates import tl

    adata = anndata.read_h5ad(upload["file"])
    tl.gates(adata, 3, epochs=3, options={"hidden_dims": [16, 4]}, save=tmp_path / "model")
    analyser = GATES.spatial_analyser()
    assert analyser.describe_model(tmp_path / "model")["n_domains"] == 3
    document = analyser.predict(upload, Path(tmp_path / "model"), {})
    assert [row["domain"] for row in document["domains"]] == adata.obs["gates_domain"].tolist()


def test_tables_are_taken_as_well(tmp_path):
    section = synthetic_section(60, num_genes=40, num_domains=2, density=0.3)
    counts, places, labels = (tmp_path / name for name in ("counts.csv", "coordinates.csv", "labels.tsv"))
    section.to_df().astype(int).to_csv(counts)
    lines = [f"{name},{x},{y}" for name, (x, y) in zip(section.obs_names, section.obsm["spatial"], strict=True)]
    places.write_text("cell,x,y\n" + "\n".join(lines) + "\n")
    labels.write_text("\n".join(f"{a}\t{b}" for a, b in zip(section.obs_names, section.obs["domain"], strict=True)))
    files = {"counts": counts, "coordinates": places, "labels": labels}
    GATES.spatial_analyser().run(files, {"n_domains": 2, "epochs": 2}, tmp_path / "out", lambda news: None)
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["n_obs"] == 60
    assert "ari" in document["metrics"]
