"""What clients send that cannot be used: each gets a status and a sentence that says what to change."""

import json
import re
import socket
import time
import zlib

import h5py
import httpx
import numpy as np
import pytest
import scipy.sparse as sp
from tenfold.serve.spatial import upload


def errors_of(answer, status=422):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert "/tmp" not in error["message"], "a path of the server"
    return error.get("errors", [])


def counts_of(adata):
    adata.X = adata.X.toarray()
    return adata.X


def without_coordinates(adata):
    del adata.obsm["spatial"]


def with_nan(adata):
    counts_of(adata)[3, 5] = np.nan


def negative(adata):
    counts_of(adata)[3, 5] = -2


def normalised(adata):
    counts = counts_of(adata)
    adata.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def nan_place(adata):
    adata.obsm["spatial"][2, 0] = np.nan


def all_zero(adata):
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (without_coordinates, "obsm['spatial']", "missing"),
        (with_nan, "X", "nan"),
        (negative, "X", "negative"),
        (normalised, "X", "counts"),
        (nan_place, "obsm['spatial']", "finite"),
        (all_zero, "X", "counts"),
        (lambda adata: adata[:, :1].copy(), "X", "2 genes"),
    ],
)
def test_a_section_that_cannot_be_analysed_is_422_with_the_field(client, make_section, submit, change, field, words):
    problems = errors_of(submit(client, make_section(change=change)))
    assert field in [problem["field"] for problem in problems]
    assert words in " ".join(problem["message"] for problem in problems).lower()


def test_all_problems_of_a_section_are_told_at_once(client, make_section, submit):
    def both(adata):
        with_nan(adata)
        without_coordinates(adata)

    fields = {problem["field"] for problem in errors_of(submit(client, make_section(change=both)))}
    assert fields == {"X", "obsm['spatial']"}


def test_more_domains_than_cells_are_422(client, make_section, submit):
    (problem,) = errors_of(submit(client, make_section(20), {"n_domains": 21}))
    assert problem["field"] == "n_domains"
    assert "n_domains = 21, but" in problem["message"]


@pytest.mark.parametrize("case", ["repeated", "empty cells", "isolated"])
def test_what_is_odd_but_usable_is_analysed_and_noted(client, make_section, submit, wait_for, case):
    def change(adata):
        if case == "repeated":
            adata.obs_names = ["same"] * adata.n_obs
            adata.var_names = ["gene"] * adata.n_vars
        elif case == "empty cells":
            counts_of(adata)[:4] = 0
        else:
            adata.obsm["spatial"][0] = 1e6

    answer = submit(client, make_section(change=change), {"n_domains": 2})
    assert answer.status_code == 202, answer.text
    assert wait_for(client, answer.json()["job_id"])["status"] == "done"
    if case in ("repeated", "empty cells"):
        assert answer.json()["summary"]["notes"]


def test_a_truncated_file_is_422(client, make_section, submit, tmp_path):
    whole = make_section().read_bytes()
    for share in (0.1, 0.6, 0.95):
        path = tmp_path / "cut.h5ad"
        path.write_bytes(whole[: int(len(whole) * share)])
        (problem,) = errors_of(submit(client, path))
        assert problem["field"] == "file"


def test_damaged_files_never_hurt_the_server(client, make_section, submit, tmp_path):
    whole = bytearray(make_section().read_bytes())
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.h5ad"
    for _ in range(12):
        damaged = whole.copy()
        for place in generator.integers(8, len(damaged), 60):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        answer = submit(client, path, {"n_domains": 2, "epochs": 1})
        assert answer.status_code in (202, 422, 429), answer.text
        if answer.status_code == 202:
            client.delete(f"/v1/jobs/{answer.json()['job_id']}")
    assert client.get("/healthz").status_code == 200


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(client, make_section, submit):
    path = make_section()
    with h5py.File(path, "r+") as file:
        file.create_dataset(
            "obsm/bomb", shape=(150, 2 * 10**9), dtype="f4", chunks=(150, 10**6), compression="gzip", fillvalue=0
        )
    assert path.stat().st_size < 2_000_000
    start = time.perf_counter()
    problems = errors_of(submit(client, path))
    assert re.match(r"obsm/bomb: needs 12\d{11} bytes or more when decompressed", problems[0]["message"])
    assert time.perf_counter() - start < 60  # 1.2 TB would take many minutes


def test_an_npz_bomb_is_refused_before_it_is_unpacked(client, tmp_path):
    np.savez_compressed(
        tmp_path / "counts.npz",
        data=np.zeros(60_000_000, np.int8),
        indices=np.zeros(1, np.int32),
        indptr=np.zeros(2, np.int32),
        shape=np.array([1, 1]),
        format=np.array("csr"),
    )
    assert (tmp_path / "counts.npz").stat().st_size < 200_000
    files = {
        "counts": ("counts.npz", (tmp_path / "counts.npz").read_bytes()),
        "coordinates": ("places.csv", "c0,1,2"),
    }
    assert errors_of(client.post("/v1/jobs", files=files))[0]["field"] == "counts"


def test_an_object_array_is_refused_and_never_unpickled(client, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    np.savez(tmp_path / "counts.npz", data=np.array([Trap()], dtype=object), allow_pickle=True)
    files = {"counts": ("c.npz", (tmp_path / "counts.npz").read_bytes()), "coordinates": ("p.csv", "c0,1,2")}
    assert errors_of(client.post("/v1/jobs", files=files))[0]["field"] == "counts"
    assert not (tmp_path / "trapped").exists()


def test_counts_of_strings_are_422(client, make_section, submit):
    path = make_section()
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.full((150, 40), "one", dtype=object)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    assert errors_of(submit(client, path))


@pytest.mark.parametrize("name", ["section.rds", "section", "section.h5ad.exe", "section.csv", "section.zip"])
def test_a_file_of_another_kind_is_415_and_names_what_is_taken(client, make_section, submit, name):
    errors_of(answer := submit(client, make_section(), name=name), 415)
    assert "must end in .h5ad" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("section.h5ad", b"cell,g1\nc1,2\n"), ("section.h5ad", b"PK\x03\x04xxxx"), ("section.h5ad", b"")],
)
def test_a_wrong_ending_is_seen_in_the_first_bytes(client, name, content):
    (problem,) = errors_of(client.post("/v1/jobs", files={"file": (name, content)}))
    assert problem["field"] == "file"


def test_a_binary_file_under_a_tables_name_is_422(client, make_section):
    files = {"counts": ("counts.csv", make_section().read_bytes()), "coordinates": ("places.csv", "c0,1,2")}
    (problem,) = errors_of(client.post("/v1/jobs", files=files))
    assert problem == {"field": "counts", "message": "ends in .csv, but is not text; send it under its real name"}


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ("{", "params"),
        ("[1]", "params"),
        ('{"n_domains": 0}', "params"),
        ('{"n_domains": "many"}', "params.n_domains"),
        ('{"n_domains": 2.5}', "params.n_domains"),
        ('{"alpha": 2}', "params.alpha"),
        ('{"alpha": NaN}', "params.alpha"),
        ('{"epochs": 2001}', "params.epochs"),
        ('{"epochs": "5"}', "params.epochs"),
        ('{"seed": -1}', "params.seed"),
        ('{"method": "../../etc"}', "params.method"),
        ('{"radius": -4.0}', "params"),
        ("[" * 100_000, "params"),
    ],
)
def test_wrong_options_are_422_and_named(client, make_section, params, field):
    answer = client.post("/v1/jobs", files={"file": ("s.h5ad", make_section().read_bytes())}, data={"params": params})
    assert errors_of(answer)[0]["field"] == field


def test_several_wrong_options_are_all_named_and_misspelt_ones_get_a_suggestion(client, make_section, submit):
    problems = errors_of(submit(client, make_section(), {"n_domain": 3, "alpha": -1, "epochs": 0}))
    assert {problem["field"] for problem in problems} == {"params.n_domain", "params.alpha", "params.epochs"}
    message = next(problem["message"] for problem in problems if problem["field"] == "params.n_domain")
    assert "did you mean n_domains?" in message


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ({}, "file"),
        ({"counts": ("c.csv", "a,b\n")}, "coordinates"),
        ({"coordinates": ("c.csv", "a,1,2\n")}, "counts"),
        ({"file": ("s.h5ad", b"\x89HDF\r\n\x1a\n"), "labels": ("l.csv", "a,b\n")}, "file"),
        ({"section": ("s.h5ad", b"x")}, "section"),
    ],
)
def test_missing_and_unknown_parts_are_422_and_named(client, files, field):
    answer = client.post("/v1/jobs", files=files or {"params": (None, "{}")})
    assert errors_of(answer)[0]["field"] == field


def test_a_part_that_comes_twice_is_422(client):
    files = [("file", ("a.h5ad", b"\x89HDF\r\n\x1a\n")), ("file", ("b.h5ad", b"x"))]
    assert "twice" in errors_of(client.post("/v1/jobs", files=files))[0]["message"]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain; boundary=x", ""])
def test_a_body_that_is_no_form_is_415(client, kind):
    headers = {"content-type": kind} if kind else {}
    errors_of(client.post("/v1/jobs", content=b"{}", headers=headers), 415)


def test_a_form_that_ends_in_the_middle_is_400(client):
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="s.h5ad"\r\n\r\n\x89HDF\r\n\x1a\n and so on'
    answer = client.post("/v1/jobs", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    errors_of(answer, 400)


def test_an_announced_length_beyond_the_limit_is_413_at_once(client, monkeypatch):
    monkeypatch.setattr(upload, "DRAIN_SECONDS", 600.0)  # the answer must not wait for that
    request = client.build_request("POST", "/v1/jobs", files={"file": ("big.h5ad", bytes(3_000_000))})
    answer = client.send(request)
    errors_of(answer, 413)
    # The announced number: had the server counted what came, it would have said another one.
    expected = f"the body has {request.headers['content-length']} bytes or more, this server takes 2000000"
    assert expected in answer.json()["error"]["message"]


def test_an_upload_of_unknown_length_is_cut_off_at_the_limit_and_leaves_nothing(client, server):
    sent = 0

    def pieces():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="s.h5ad"\r\n\r\n'
        for _ in range(2000):
            sent += 2**20
            yield bytes(2**20)

    answer = None
    try:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = client.post("/v1/jobs", content=pieces(), headers=headers)
    except httpx.TransportError:
        pass  # the server hung up on a client that did not stop
    assert answer is None or answer.status_code == 413
    assert sent < 200 * 2**20
    assert not list((server[1].store.root / "incoming").iterdir())


def test_a_client_that_leaves_in_the_middle_leaves_nothing(client, server):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(
            b"POST /spatial/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="s.h5ad"\r\n\r\nhalf'
        )
        time.sleep(0.2)
    deadline = time.monotonic() + 60
    while list((server[1].store.root / "incoming").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_slow_upload_is_408(start_spatial_server, tmp_path):
    data = {"storage": str(tmp_path), "limits": {"upload_s": 0.3}, "replicas": {"processes": 1}}

    def slow():
        yield b"--x\r\n"
        time.sleep(1)
        yield b"\r\n"

    with start_spatial_server(data) as (client, _, _):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        errors_of(client.post("/v1/jobs", content=slow(), headers=headers), 408)


@pytest.mark.parametrize(("method", "words"), [("crash", "crashed"), ("eat", "memory"), ("hang", "longer than 5 s")])
def test_a_file_that_kills_its_reader_is_422_and_others_go_on(
    client, server, make_section, submit, monkeypatch, method, words
):
    section = make_section()
    with monkeypatch.context() as patch:
        if method == "hang":  # only this one: a new reader first imports for seconds
            patch.setattr(server[1], "limits", server[1].limits.model_copy(update={"check_s": 5.0}))
        (problem,) = errors_of(submit(client, section, {"method": method}))
    assert words in problem["message"]
    assert client.get("/healthz").status_code == 200
    assert submit(client, section, {"n_domains": 2, "epochs": 1}).status_code in (202, 429)


def test_a_reader_that_died_while_idle_is_replaced_without_anyone_noticing(client, server, make_section, submit):
    pools = [pool for pool in server[1]._isolation._pools if pool._processes]
    assert pools
    for pool in pools:
        for process in list(pool._processes.values()):
            process.kill()
            process.join()
    deadline = time.monotonic() + 60
    while not all(pool._broken for pool in pools):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert submit(client, make_section(), {"n_domains": 0}).status_code == 422
    answer = submit(client, make_section(), {"n_domains": 10_000})
    assert errors_of(answer)[0]["field"] == "n_domains"


def test_sections_beyond_the_limits_are_422(client, make_section, submit):
    (problem,) = errors_of(submit(client, make_section(2001, 10)))
    assert "2001 cells; at most 2000" in problem["message"]


def test_a_text_bomb_in_the_params_field_is_422(client):
    (problem,) = errors_of(client.post("/v1/jobs", data={"params": "x" * 70_000}, files={"x": ("x", b"")}))
    assert "is longer than" in problem["message"]


def test_a_compressed_body_is_not_unpacked(client):
    body = zlib.compress(json.dumps({}).encode())
    errors_of(client.post("/v1/jobs", content=body, headers={"content-encoding": "gzip"}), 415)
