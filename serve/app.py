"""From configuration to a Ray Serve application: `import_path: tenfold.serve.app:build`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError
from tenfold.serve.config import ServeConfig, parse_config

if TYPE_CHECKING:
    from ray.serve import Application

HEALTH_PERIOD_SECONDS = 5
# Beside generation requests a replica has to answer health checks and model lists.
SPARE_REQUESTS = 16


def build(args: dict[str, Any]) -> Application:
    """Build the language-model application from the `args` of a Serve configuration file.

    Raises:
        ConfigError: the configuration is wrong, or names an engine that is not installed.
    """
    config = parse_config(args)
    return _build_vllm(config) if config.engine == "vllm" else _build_own(config)


def _build_own(config: ServeConfig) -> Application:
    from ray import serve
    from ray.serve.config import BackpressureConfig
    from tenfold.serve.language_models import LanguageModels

    limits, replicas = config.limits, config.replicas
    # The replicas refuse with OpenAI's error body; Serve's own limit is behind it.
    ongoing = len(config.models) * (limits.max_running + limits.max_waiting) + SPARE_REQUESTS
    deployment: Any = serve.deployment(
        serve.ingress()(LanguageModels),
        name="LanguageModels",
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=limits.retry_after_s),
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=replicas.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        **replicas.scaling(limits.max_running),
    )
    return deployment.bind(config.model_dump(mode="json", exclude_unset=True))


def _build_vllm(config: ServeConfig) -> Application:
    try:
        import vllm  # noqa: F401
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise ConfigError(
            f"engine: vllm is not installed ({error}); pip install 'tenfold[gpu]', or use engine: transformers"
        ) from error
    from tenfold.platform.models.loading import resolve

    replicas = config.replicas
    llm_configs = [
        LLMConfig(
            model_loading_config={
                "model_id": model.name,
                "model_source": str(resolve(model.source)),
            },
            deployment_config={
                "autoscaling_config": {"min_replicas": replicas.min, "max_replicas": replicas.max or replicas.min}
            },
            engine_kwargs={
                "dtype": model.dtype,
                "max_model_len": model.max_context,
                "trust_remote_code": model.trust_remote_code,
                "tensor_parallel_size": int(replicas.gpus) or 1,
            },
        )
        for model in config.models
    ]
    return build_openai_app({"llm_configs": llm_configs})
