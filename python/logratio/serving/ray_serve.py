"""Serve a bundle with Ray Serve: replicas of the server's application on the hosts of a cluster.

Needs ``ray[serve]``, and logratio with the extra ``serve`` on every host.
"""

import asyncio
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from logratio.bundle import BundleError
from logratio.extras import require
from logratio.serving.limits import Limits
from logratio.serving.reranker import Reranker

_HEALTH_SECONDS = 10.0
_LIMITS = Limits()


class RaySettings(BaseModel):
    """Settings of the replicas, as `serve run` takes them: ``name=value``.

    Attributes:
        bundle: Folder written by `logratio export`, which every host can read.
        replicas: Number of processes; each loads the bundle.
        cpus: CPUs that Ray reserves for a replica, and threads per run of the graph.
        gpus: GPUs that Ray reserves for a replica.
        provider: ONNX Runtime execution provider, such as CUDAExecutionProvider; None: the CPU.
        expect: As in `Reranker.load`.
        allowed_signers: As in `Reranker.load`.
        cache: As in `Reranker.load`.
        base: As in `Reranker.load`.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.
    """

    model_config = ConfigDict(extra="forbid")
    bundle: str
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    provider: str | None = None
    expect: str | None = None
    allowed_signers: str | None = None
    cache: str | None = None
    base: str | None = None
    strict: bool = False


class BundleReplica:
    """One replica: a loaded bundle, and the application of `create_app`.

    API keys are read from the variable `LOGRATIO_API_KEYS` of the replica.
    """

    def __init__(self, settings: RaySettings) -> None:
        """Load the bundle with all checks; Ray sends requests only afterwards."""
        from logratio.serving.keys import read_keys
        from logratio.serving.server import create_app

        self._reranker = Reranker.load(
            settings.bundle,
            providers=[settings.provider] if settings.provider else None,
            threads=settings.cpus,
            expect=settings.expect,
            allowed_signers=settings.allowed_signers,
            cache=settings.cache,
            base=settings.base,
        )
        keys = read_keys(None)
        self._app = create_app(self._reranker, _LIMITS, strict=settings.strict, keys=keys or None)
        groups = map(self._reranker.golden_group, self._reranker.manifest.golden)
        self._shortest = min(groups, key=lambda group: sum(map(len, group.ids)))

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Ray calls this after the constructor."""
        return self._app

    async def check_health(self) -> None:
        """Score the shortest golden group; Ray replaces the replica if that fails or hangs.

        Raises:
            BundleError: The graph gives no finite rewards.
        """
        (scores,) = await asyncio.to_thread(self._reranker.score_groups, [self._shortest])
        if not all(math.isfinite(score.reward) for score in scores):
            raise BundleError("the graph gives no finite rewards")


def application(settings: RaySettings) -> Any:
    """Build the application for Ray Serve.

    Args:
        settings: The settings of the replicas.

    Returns:
        What ``serve.run`` takes.

    Raises:
        MissingExtraError: ray is not installed.
        ImportError: ray is installed without ``ray[serve]``.

    Example:
        ::

            from ray import serve
            from logratio.serving.ray_serve import RaySettings, application

            serve.run(application(RaySettings(bundle="/models/bundle", replicas=2)))
    """
    serve = require("ray.serve", "ray")
    deployment = serve.deployment(
        serve.ingress()(BundleReplica),
        name="logratio",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # The scheduler of a replica orders and refuses requests, so Ray must not hold them back.
        max_ongoing_requests=_LIMITS.queue,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_LIMITS.seconds,
        graceful_shutdown_timeout_s=_LIMITS.shutdown_seconds,
    )
    return deployment.bind(settings)
