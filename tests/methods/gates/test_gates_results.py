import csv
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from tenfold.methods.gates.config import GATESConfig
from tenfold.methods.gates.results import result_document, storable, write_results
from tenfold.platform.errors import DataError


def analysed(key="gates"):
    adata = anndata.AnnData(sp.csr_matrix(np.eye(4, 3, dtype=np.float32)))
    adata.obs_names = ["69x4486", "b", "empty", "d"]
    adata.obsm["spatial"] = np.arange(8.0).reshape(4, 2)
    adata.obsm[f"X_{key}"] = np.array([[1, 2], [3, 4], [np.nan, np.nan], [5, 6]], dtype=np.float32)
    adata.obs[f"{key}_domain"] = pd.Categorical(["2", "0", None, "0"], categories=["0", "1", "2"])
    adata.obs[f"{key}_domain_prob"] = [0.98, 1.0, np.nan, 0.12345678]
    adata.uns[key] = storable(
        {"metrics": {"pas": 0.03, "ari": float("nan")}, "notes": ["one"], "graphs": {"spatial": {"edges": 3}}}
    )
    return adata


def test_the_json_is_that_of_the_specification(tmp_path):
    path = write_results(analysed(), tmp_path / "new" / "run", ["json"])["json"]
    assert path == tmp_path / "new" / "run" / "result.json"
    assert json.loads(path.read_text()) == {
        "n_obs": 4,
        "n_domains": 2,
        "domains": [
            {"id": "69x4486", "domain": "2", "p": 0.98},
            {"id": "b", "domain": "0", "p": 1.0},
            {"id": "empty", "domain": None, "p": None},
            {"id": "d", "domain": "0", "p": 0.123457},
        ],
        "embedding": {"shape": [4, 2], "url": "embedding.npz"},
        "metrics": {"pas": 0.03, "ari": None},
        "graphs": {"spatial": {"edges": 3}},
        "notes": ["one"],
    }


def test_the_url_of_the_embedding_is_the_callers_choice():
    assert result_document(analysed(), embedding_url="/v1/x")["embedding"]["url"] == "/v1/x"


def test_the_table_has_a_row_per_cell_and_the_columns_that_exist(tmp_path):
    adata = analysed()
    adata.obs["gates_domain_refined"] = pd.Categorical(["0", "0", None, "0"])
    adata.obs["section"] = ["s", "s", "t", "t"]
    path = write_results(adata, tmp_path, ["csv"])["csv"]
    with path.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["id", "domain", "p", "refined", "section"]
    assert rows[1] == ["69x4486", "2", "0.98", "0", "s"]
    assert rows[3] == ["empty", "", "", "", "t"]
    assert len(rows) == 5


def test_the_archive_is_read_without_unpickling(tmp_path):
    path = write_results(analysed(), tmp_path, ["npz"])["npz"]
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["embedding"], analysed().obsm["X_gates"])
        assert arrays["embedding"].dtype == np.float32
        assert arrays["ids"].tolist() == ["69x4486", "b", "empty", "d"]
        assert arrays["domains"].tolist() == ["2", "0", "", "0"]


def test_the_anndata_comes_back_as_it_was(tmp_path):
    adata = analysed()
    again = anndata.read_h5ad(write_results(adata, tmp_path, ["h5ad"])["h5ad"])
    pd.testing.assert_frame_equal(again.obs, adata.obs)
    np.testing.assert_array_equal(again.obsm["X_gates"], adata.obsm["X_gates"])
    assert (again.X != adata.X).nnz == 0
    assert again.uns["gates"]["graphs"]["spatial"]["edges"] == 3


def test_all_formats_are_written_by_default_and_nothing_else_is_left(tmp_path):
    written = write_results(analysed(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "domains.csv",
        "embedding.npz",
        "result.h5ad",
        "result.json",
    ]
    assert sorted(written) == ["csv", "h5ad", "json", "npz"]


def test_another_prefix_and_no_embedding(tmp_path):
    adata = analysed("spagcn")
    del adata.obsm["X_spagcn"], adata.obs["spagcn_domain_prob"], adata.uns["spagcn"]
    written = write_results(adata, tmp_path, key="spagcn")
    assert sorted(written) == ["csv", "h5ad", "json"]
    document = json.loads(written["json"].read_text())
    assert document["embedding"] is None
    assert document["metrics"] == {}
    assert document["domains"][0] == {"id": "69x4486", "domain": "2"}


def test_a_failed_write_leaves_the_old_result_and_names_the_culprit(tmp_path):
    path = write_results(analysed(), tmp_path, ["h5ad"])["h5ad"]
    before = path.read_bytes()
    adata = analysed()
    adata.uns["users"] = {"odd": object()}
    with pytest.raises(DataError, match=r"cannot be stored as h5ad(.|\n)*odd"):
        write_results(adata, tmp_path, ["h5ad"])
    assert [file.name for file in tmp_path.iterdir()] == ["result.h5ad"]
    assert path.read_bytes() == before


def test_unknown_formats_and_missing_results_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"formats: xlsx unknown\. Choose among json, csv, h5ad, npz"):
        write_results(analysed(), tmp_path, ["xlsx"])
    with pytest.raises(DataError, match=r"obs\['other_domain'\] is missing"):
        write_results(analysed(), tmp_path, key="other")
    assert list(tmp_path.iterdir()) == []


VALUES = {
    "nothing": None,
    "flag": True,
    "number": 3,
    "text": "x",
    "numpy": np.float32(2.5),
    "path": Path("a/b"),
    "losses": [1.0, 0.5],
    "gaps": [1.0, None],
    "none": [],
    "pair": (1, 2),
    "names": ("a", "b"),
    "set": {"b", "a"},
    "mixed": [1, "a", None, {"b": None, "c": 2}],
    "matrix": [[1, 2], [3, 4]],
    "objects": np.array(["a", "b"], dtype=object),
    "frame": pd.DataFrame({"x": [1, 2]}, index=["a", "b"]),
    "series": pd.Series(["a", "b"], dtype="category"),
    "sparse": sp.csr_matrix(np.eye(2)),
    "deep": {"a/b": {"c": None, 1: 2}},
    "model": GATESConfig(sections=[{"path": "a"}, {"path": "b"}]),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_kind_of_value_survives_the_file(tmp_path, name):
    adata = anndata.AnnData(np.zeros((1, 1), dtype=np.float32))
    adata.uns["gates"] = storable({name: VALUES[name]})
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert (name in anndata.read_h5ad(tmp_path / "a.h5ad").uns.get("gates", {})) == (name != "nothing")


def test_storable_keeps_what_values_mean():
    plain = storable(VALUES)
    assert plain["path"] == "a/b"
    assert plain["losses"].tolist() == [1.0, 0.5]
    np.testing.assert_array_equal(plain["gaps"], [1.0, np.nan])
    assert plain["names"].tolist() == ["a", "b"]
    assert plain["set"].tolist() == ["a", "b"]
    assert plain["mixed"] == {"0": 1, "1": "a", "3": {"c": 2}}
    assert plain["frame"]["x"].tolist() == [1, 2]
    assert plain["deep"] == {"a_b": {"1": 2}}
    assert plain["model"]["sections"]["1"]["path"] == "b"
    assert plain["model"]["hidden_dims"].tolist() == [512, 30]
