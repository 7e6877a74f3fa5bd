"""The Ray Serve deployment around the language-model application."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tenfold.serve.config import parse_config

if TYPE_CHECKING:
    from fastapi import FastAPI


class LanguageModels:
    """One replica: all models of the configuration in one process.

    Args:
        config: the content of a `ServeConfig`.

    Raises:
        ModelError: a model is missing or damaged.
        ConfigError: the limits do not fit a model, or the API keys cannot be read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import torch
        from tenfold.serve.service import LanguageService

        logging.getLogger("tenfold").setLevel(logging.INFO)
        parsed = parse_config(config)
        if parsed.replicas.gpus:
            device = "cuda"
        else:
            device = "cpu"
            torch.set_num_threads(max(1, int(parsed.replicas.cpus)))
        self.service = LanguageService.load(parsed, device=device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Serve calls this once after the constructor."""
        from tenfold.serve.api import create_app

        return create_app(self.service)

    def check_health(self) -> None:
        """Fail when a generation thread is dead, so that Serve replaces this replica."""
        self.service.check()

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return what the batches of each model looked like since the start."""
        return {
            name: {
                **vars(model.engine.statistics),
                "running": model.engine.admission.num_running,
                "waiting": model.engine.admission.num_waiting,
            }
            for name, model in self.service.models.items()
        }
