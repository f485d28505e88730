"""Launchers of Hydra's multirun for studies: processes on this machine, and tasks on a Ray cluster.

Hydra looks for plugins in this namespace package alone. A task function gives back why its run failed, or nothing, and
never raises; so a run that fails, and a worker that is lost, leave the others alone.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class _StudyLauncher(Launcher):
    """Composes the jobs' configurations and wraps what they give back."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        load = self.hydra_context.config_loader.load_sweep_config
        configs = [load(self.config, list(overrides)) for overrides in job_overrides]
        configs = [
            OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"]) for config in configs
        ]
        returned = self.results(configs)
        completed = JobStatus.COMPLETED
        return [
            JobReturn(overrides=overrides, cfg=config, status=completed, _return_value=value)
            for overrides, config, value in zip(job_overrides, configs, returned, strict=True)
        ]

    @abstractmethod
    def results(self, configs: Sequence[DictConfig]) -> list[Any]:
        """What the task function gives back for each configuration."""


class LocalLauncher(_StudyLauncher):
    """At most `workers` tasks at a time, each in a thread; a study's tasks are processes of their own."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def results(self, configs: Sequence[DictConfig]) -> list[Any]:
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(self.task_function, configs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class RayLauncher(_StudyLauncher):
    """A Ray task each. Ray starts a task again whose worker or node is lost; one that it gives up fails alone.

    Args:
        init: arguments of `ray.init`.
        remote: arguments of `ray.remote`.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = init, remote

    def results(self, configs: Sequence[DictConfig]) -> list[Any]:
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # a line for each run, not one for all that look alike
        import ray

        def plain(config: DictConfig) -> dict[str, Any]:
            return {str(name): value for name, value in OmegaConf.to_container(config, resolve=True).items()}  # type: ignore[union-attr]

        remote = plain(self.remote)  # before `ray.init`, which may not be given what it doesn't know
        ray.init(**plain(self.init))
        try:
            task = ray.remote(**remote)(self.task_function)
            return [self._result(ray, each) for each in [task.remote(config) for config in configs]]
        finally:
            ray.shutdown()

    @staticmethod
    def _result(ray: Any, task: Any) -> Any:
        try:
            return ray.get(task)
        except ray.exceptions.RayError as error:
            return f"Ray gave it up: {str(error).strip().splitlines()[0]}"
