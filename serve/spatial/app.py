"""From configuration to a Ray Serve application: `import_path: tenfold.serve.spatial.app:build`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError
from tenfold.serve.spatial.config import parse_spatial_config
from tenfold.serve.spatial.room import check_room

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from tenfold.serve.spatial.service import SpatialService

HEALTH_PERIOD_SECONDS = 5
DRAIN_SECONDS = 60  # for uploads that are under way
RETRY_AFTER_SECONDS = 5


class SpatialAnalysis:
    """One replica: the HTTP side of the application. Jobs do not run in it.

    Args:
        config: the content of a `SpatialConfig`.

    Raises:
        ConfigError: the API keys cannot be read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from tenfold.serve.spatial.service import SpatialService
        from tenfold.serve.spatial.supervisor import RayJobs

        logging.getLogger("tenfold").setLevel(logging.INFO)
        parsed = parse_spatial_config(config)
        self.service: SpatialService = SpatialService(parsed, RayJobs(parsed))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Serve calls this once after the constructor."""
        from tenfold.serve.spatial.api import create_app

        return create_app(self.service)


def build(args: dict[str, Any]) -> Application:
    """Build the spatial application from the `args` of a Serve configuration file.

    Raises:
        ConfigError: the configuration is wrong, or a package is not installed.
        ClusterError: a job would fit on no node of the cluster; only found out where this process is connected to
            one, as Serve's own is when it deploys.
    """
    config = parse_spatial_config(args)
    try:
        import python_multipart  # noqa: F401
    except ImportError as error:
        raise ConfigError("the spatial application needs python-multipart; pip install 'tenfold[spatial]'") from error
    import ray
    from ray import serve
    from ray.serve.config import BackpressureConfig

    if ray.is_initialized():
        check_room(config.jobs)
    replicas = config.replicas
    deployment: Any = serve.deployment(
        serve.ingress()(SpatialAnalysis),
        name="SpatialAnalysis",
        max_ongoing_requests=replicas.max_ongoing,
        max_queued_requests=replicas.max_ongoing,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_SECONDS),
        ray_actor_options={"num_cpus": replicas.cpus},
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        **replicas.scaling(max(1, replicas.max_ongoing // 4)),
    )
    return deployment.bind(config.model_dump(mode="json", exclude_unset=True))
