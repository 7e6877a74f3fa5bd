import json
from pathlib import Path

import pytest
import yaml
from tenfold.platform.errors import ConfigError
from tenfold.serve.spatial.analyser import SectionLimits, load_analyser
from tenfold.serve.spatial.config import parse_spatial_config
from tenfold.serve.spatial.params import field_errors, parse_params
from tenfold.serve.spatial.supervisor import identity_of

STORAGE = "/somewhere"


def test_the_smallest_configuration_has_the_limits_of_the_specification():
    limits = parse_spatial_config({"storage": STORAGE}).limits
    assert limits.max_upload_bytes == 256 * 2**20
    assert limits.max_epochs == 2000
    assert limits.predict_cells == 20_000


def test_limits_of_a_section_follow_the_options():
    limits = parse_spatial_config({"storage": STORAGE, "limits": {"max_cells": 5, "max_genes": 6}}).limits
    assert limits.section() == SectionLimits(5, 6, limits.max_values, limits.max_unpacked_bytes)
    assert limits.section(max_cells=3).max_cells == 3
    assert limits.section(max_cells=9).max_cells == 5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "storage: missing"),
        ({"storage": "jobs"}, "not an absolute path"),
        ({"storage": STORAGE, "limit": {}}, "did you mean limits?"),
        ({"storage": STORAGE, "limits": {"ttl_s": 0}}, "greater than 0"),
        ({"storage": STORAGE, "models": [{"id": "a", "path": "a"}]}, "not an absolute path"),
        ({"storage": STORAGE, "models": [{"id": "a/b", "path": "/a"}]}, "pattern"),
        ({"storage": STORAGE, "models": [{"id": "a", "path": "/a"}, {"id": "a", "path": "/b"}]}, "have the id a"),
        ({"storage": STORAGE, "jobs": {"stale_s": 5.0}}, "3 x heartbeat_s"),
        ({"storage": STORAGE, "replicas": {"min": 3, "max": 2}}, "max = 2 is less than min = 3"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(data, words):
    with pytest.raises(ConfigError) as error:
        parse_spatial_config(data)
    assert words in str(error.value)


def test_the_home_folder_may_be_written_as_a_tilde():
    assert parse_spatial_config({"storage": "~/jobs"}).storage == str(Path.home() / "jobs")


def test_an_analyser_that_is_none_is_a_configuration_error():
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_analyser("json:nothing")
    with pytest.raises(ConfigError, match="unknown"):
        load_analyser("no-such-method")
    with pytest.raises(ConfigError, match="does not analyse tissue sections"):
        load_analyser("dskd")


def test_the_shipped_serve_file_deploys_the_application_beside_the_language_models():
    from ray.serve.schema import ServeDeploySchema
    from tenfold.serve.spatial.app import build

    file = Path(__file__).parents[3] / "serve" / "serve.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert {application.route_prefix for application in schema.applications} == {"/", "/spatial"}
    (application,) = [found for found in schema.applications if found.route_prefix == "/spatial"]
    assert application.import_path == "tenfold.serve.spatial.app:build"
    config = parse_spatial_config(application.args)
    # On two cores: the language models' replica, this one, and a job.
    assert 1 + config.replicas.cpus + config.jobs.cpus <= 2
    assert build(application.args)._bound_deployment.name == "SpatialAnalysis"


def test_options_reach_the_deployment():
    from tenfold.serve.spatial.app import build

    data = {"storage": STORAGE, "replicas": {"min": 2, "max": 4, "cpus": 1.5, "max_ongoing": 40}}
    deployment = build(data)._bound_deployment
    assert deployment.max_ongoing_requests == 40
    assert deployment.ray_actor_options["num_cpus"] == 1.5
    assert deployment.backpressure_config.status_code == 429
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 4)


def test_a_supervisor_is_known_by_all_of_its_configuration():
    assert identity_of({"storage": "/a"}) == identity_of({"storage": "/a"})
    assert identity_of({"storage": "/a"}) != identity_of({"storage": "/a", "limits": {"ttl_s": 1.0}})


def test_options_of_a_job_keep_their_types_and_leave_out_what_is_not_set():
    text = json.dumps({"n_domains": "auto", "radius": 2, "alpha": 0, "preprocess": False, "labels": "layer"})
    params = parse_params(text, max_epochs=10)
    assert params == {"n_domains": "auto", "radius": 2.0, "alpha": 0.0, "preprocess": False, "labels": "layer"}
    assert parse_params("", max_epochs=10) == {}


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("n_domains: too many", "n_domains", "too many"),
        ("obsm['spatial'] is missing; add it", "obsm['spatial']", "obsm['spatial'] is missing; add it"),
        ("obsm['spatial']: has nan", "obsm['spatial']", "has nan"),
        ("X holds -2 at place 3: send counts", "X", "X holds -2 at place 3: send counts"),
        ("/jobs/in/file.h5ad: truncated", "file", "truncated"),
        ("/jobs/in/file.h5ad, line 3: no number", "file", "file, line 3: no number"),
        ("It is no section", "file", "It is no section"),
    ],
)
def test_an_analysers_sentence_is_put_beside_its_field_without_the_servers_paths(line, field, message):
    files = {"file": Path("/jobs/in/file.h5ad")}
    assert [tuple(found) for found in field_errors(Exception(line), files)] == [(field, message)]


def test_each_line_of_an_analysers_error_is_one_problem():
    found = field_errors(Exception("X: has nan\n\nobsm['spatial'] is missing"), {})
    assert [problem.field for problem in found] == ["X", "obsm['spatial']"]
