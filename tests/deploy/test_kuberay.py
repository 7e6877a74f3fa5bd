"""Manifests for KubeRay (ray.io/v1): only fields that its types have, and the shape of cluster.yaml."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "deploy" / "kuberay"

Quantity = Annotated[str, Field(pattern=r"^\d+(Gi|Mi|m)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$")]


class Port(Strict):
    containerPort: Annotated[int, Field(gt=0, lt=65536)]
    name: Annotated[str, Field(max_length=15)]


class Resources(Strict):
    limits: dict[str, Quantity]
    requests: dict[str, Quantity]


class VolumeMount(Strict):
    name: str
    mountPath: Annotated[str, Field(pattern="^/")]
    readOnly: bool = False


class Claim(Strict):
    claimName: str


class SecretVolume(Strict):
    secretName: str


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim | None = None
    secret: SecretVolume | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class Container(Strict):
    name: str
    image: str
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[VolumeMount]


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP"]
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: str
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["token"]
    secretName: str


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: Annotated[int, Field(gt=0)]


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["HTTPMode"]
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    backoffLimit: Annotated[int, Field(ge=0)]
    rayClusterSpec: ClusterSpec


class ServiceSpec(Strict):
    serveConfigV2: str
    rayClusterConfig: ClusterSpec


class Manifest(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: str
    metadata: Metadata


class RayCluster(Manifest):
    kind: Literal["RayCluster"]
    spec: ClusterSpec


class RayJob(Manifest):
    kind: Literal["RayJob"]
    spec: JobSpec


class RayService(Manifest):
    kind: Literal["RayService"]
    spec: ServiceSpec


MODELS = {"raycluster": RayCluster, "rayjob": RayJob, "rayservice": RayService}


def read(name):
    return yaml.safe_load((KUBERAY / f"{name}.yaml").read_text(encoding="utf-8"))


def cluster_of(name):
    spec = MODELS[name].model_validate(read(name)).spec
    return {"raycluster": spec, "rayjob": getattr(spec, "rayClusterSpec", None)}.get(name) or spec.rayClusterConfig


@pytest.mark.parametrize("name", MODELS)
def test_a_manifest_has_known_fields_only(name):
    content = read(name)
    MODELS[name].model_validate(content)
    content["spec"]["misspelt"] = 1
    with pytest.raises(ValidationError, match="misspelt"):
        MODELS[name].model_validate(content)


@pytest.mark.parametrize("name", MODELS)
def test_rays_own_autoscaler_reads_the_groups(name):
    """Ray makes the autoscaler's node types from the manifest; the operator fills in group names and the rest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _node_type_from_group_spec

    cluster = cluster_of(name)
    head = _node_type_from_group_spec(cluster.headGroupSpec.model_dump(), is_head=True)
    assert head["resources"]["CPU"] == 0
    assert head["resources"].get("GPU", 0) == 0
    found = {
        group.groupName: _node_type_from_group_spec(group.model_dump(), is_head=False)
        for group in cluster.workerGroupSpecs
    }
    in_cloud = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))["available_node_types"]
    del in_cloud["head"]
    assert [group.replace("-", "_") for group in found] == list(in_cloud)  # spot stands first
    for group, kind in found.items():
        wanted = in_cloud[group.replace("-", "_")]
        assert (kind["min_workers"], kind["max_workers"]) == (0, wanted["max_workers"])
        assert {key: kind["resources"].get(key, 0) for key in ("CPU", "GPU")} == {"GPU": 0} | wanted["resources"]


@pytest.mark.parametrize("name", MODELS)
def test_pods_are_guaranteed_their_resources_and_mount_what_there_is(name):
    cluster = cluster_of(name)
    for template in [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]:
        volumes = {volume.name for volume in template.spec.volumes}
        for container in template.spec.containers:
            assert container.resources.limits == container.resources.requests
            assert {mount.name for mount in container.volumeMounts} == volumes
            assert "/shared" in {mount.mountPath for mount in container.volumeMounts}


@pytest.mark.parametrize("name", MODELS)
def test_the_token_is_a_reference_to_a_secret(name):
    assert cluster_of(name).authOptions == AuthOptions(mode="token", secretName="tenfold-ray-token")


def test_all_manifests_have_the_same_cluster():
    def without_keys(cluster):
        content = cluster.model_dump()
        for group in [content["headGroupSpec"], *content["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "api-keys"]
            for container in pod["containers"]:
                container["volumeMounts"] = [
                    mount for mount in container["volumeMounts"] if mount["name"] != "api-keys"
                ]
        return content

    assert cluster_of("rayjob") == cluster_of("raycluster")
    assert without_keys(cluster_of("rayservice")) == without_keys(cluster_of("raycluster"))


def test_the_job_runs_a_command_of_ours_in_shared_storage():
    program, command, experiment, *options = MODELS["rayjob"].model_validate(read("rayjob")).spec.entrypoint.split()
    assert (program, command, experiment) == ("tenfold", "run", "dskd/demo")
    assert "storage=/shared/runs" in options


def test_the_service_has_the_applications_of_serve_yaml_and_asks_for_keys():
    from ray.serve.schema import ServeDeploySchema

    shipped = yaml.safe_load((REPOSITORY / "serve" / "serve.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(MODELS["rayservice"].model_validate(read("rayservice")).spec.serveConfigV2)
    assert len(ServeDeploySchema.model_validate(config).applications) == 2
    for application in config["applications"]:
        assert application["args"].pop("api_keys") == {"file": "/etc/tenfold/api_keys"}
    for applications in (config["applications"], shipped["applications"]):
        applications[1]["args"].pop("storage")  # /shared there, the home folder here
    assert config["applications"] == shipped["applications"]
    assert config["http_options"]["port"] == shipped["http_options"]["port"]
