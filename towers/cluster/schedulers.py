"""schedulers: who is there, as TF_CONFIG or a resolver says."""

import json
import os
from typing import Any, TypeVar

import tensorflow as tf

_OWN = ("chief", "master")  # jobs of which this process may be


Named = TypeVar("Named", bound="Scheduled")


class Scheduled:
    """A cluster whose workers a scheduler has started.

    It is made of their addresses, and of that of this process or None.
    """

    @classmethod
    def from_environment(
        cls: type[Named], timeout: float = 60, heartbeat: float = 5.0
    ) -> Named:
        """The cluster that the environment variable TF_CONFIG names.

        TF_CONFIG is JSON: `{"cluster": {"chief": [...], "worker": [...]}, "task":
        {"type": "chief", "index": 0}}`. What follows "worker" are the workers,
        and "chief", or "master", if it is there, is where this process is.
        Kubeflow's TFJob sets it on Kubernetes. Of other schedulers see
        examples/slurm.sh and examples/kubernetes.yaml.

        >>> os.environ["TF_CONFIG"] = '{"cluster": {}}'
        >>> towers.Cluster.from_environment()
        Traceback (most recent call last):
          ...
        ValueError: TF_CONFIG names no workers: {"cluster": {}}. Expected
        {"cluster": {"worker": ["host:port", ...]}}.
        >>> del os.environ["TF_CONFIG"]

        Args:
          timeout, heartbeat: as for `Cluster`.

        Raises:
          ValueError: TF_CONFIG is missing, or names no workers, or says that
            this process is one of them.
          TimeoutError: as for `Cluster`.
        """
        workers, own = named_workers()
        return _cluster_of(cls, workers, own, timeout, heartbeat)

    @classmethod
    def from_resolver(
        cls: type[Named],
        resolver: Any,
        timeout: float = 60,
        heartbeat: float = 5.0,
    ) -> Named:
        """The cluster that a resolver of `tf.distribute` names.

        Its job "worker" are the workers, and "chief", or "master", if it is there,
        is where this process is.

        >>> spec = tf.train.ClusterSpec({"worker": ["a:2222"], "ps": ["b:2222"]})
        >>> resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec)
        >>> towers.Cluster.from_resolver(resolver)
        Traceback (most recent call last):
          ...
        ValueError: `resolver`, a SimpleClusterResolver, names the job 'ps'.
        Expected 'worker', and 'chief' or 'master' for this process; towers have
        no others: parameters are where a Placement says.

        Args:
          resolver: any `tf.distribute.cluster_resolver.ClusterResolver`.
          timeout, heartbeat: as for `Cluster`.

        Raises:
          TypeError: `resolver` is none.
          ValueError: it names no workers, or other jobs, or several chiefs, or
            says that this process is a worker.
          TimeoutError: as for `Cluster`.
        """
        workers, own = resolved_workers(resolver)
        return _cluster_of(cls, workers, own, timeout, heartbeat)


def _cluster_of(
    cls: Any, workers: list[str], own: str | None, *seconds: float
) -> Any:
    return cls(workers, own, *seconds)


def resolved_workers(resolver: Any) -> tuple[list[str], str | None]:
    """Addresses of the workers, and that of this process, if it is named.

    Raises:
      TypeError, ValueError: as `Scheduled.from_resolver`.
    """
    kind = type(resolver).__name__
    if not isinstance(resolver, tf.distribute.cluster_resolver.ClusterResolver):
        raise TypeError(
            "`resolver` must be one of tf.distribute.cluster_resolver; got a "
            f"{kind}. For a list of addresses use Cluster(addresses)."
        )
    spec = resolver.cluster_spec()
    jobs = {job: _addresses(spec, job) for job in spec.jobs} if spec else {}
    whose = f"`resolver`, a {kind},"
    for job in jobs:
        if job != "worker" and job not in _OWN:
            raise ValueError(
                f"{whose} names the job {job!r}. Expected 'worker', and 'chief' "
                "or 'master' for this process; towers have no others: parameters "
                "are where a Placement says."
            )
    if not jobs.get("worker"):
        raise ValueError(
            f"{whose} names no workers: {jobs}. Expected a job 'worker', with "
            '"host:port" of each.'
        )
    if resolver.task_type == "worker":  # some know it now only
        raise ValueError(
            f"{whose} says that this process is worker {resolver.task_id}. Start "
            "workers by `python -m towers worker --port=...`, and make the "
            "Cluster in the chief only."
        )
    own = [address for job in _OWN for address in jobs.get(job, [])]
    if len(own) > 1:
        raise ValueError(
            f"{whose} names {len(own)} chiefs, {', '.join(own)}. Expected one, "
            "where this process is."
        )
    return jobs["worker"], own[0] if own else None


def _addresses(spec: tf.train.ClusterSpec, job: str) -> list[str]:
    """Those of a job's tasks, some of which may be left out."""
    return [spec.task_address(job, index) for index in spec.task_indices(job)]


def named_workers() -> tuple[list[str], str | None]:
    """Addresses of the workers, and that of this process, if it is named.

    Raises:
      ValueError: TF_CONFIG is missing, or names no workers, or says that this
        process is one of them.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text)
        jobs = dict(config["cluster"])
        task = dict(config.get("task") or {})
        workers = jobs.get("worker") or []
        if isinstance(workers, dict):
            workers = [workers[key] for key in sorted(workers, key=int)]
    except (ValueError, TypeError, KeyError):
        jobs, workers, task = {}, [], {}
    if not workers:
        raise ValueError(
            f"TF_CONFIG names no workers: {text or 'it is not set'}. "
            'Expected {"cluster": {"worker": ["host:port", ...]}}.'
        )
    if task.get("type") == "worker":
        raise ValueError(
            "TF_CONFIG says that this process is a worker. Start workers "
            "by `python -m towers worker --port=...`, and make the Cluster "
            "in the chief only."
        )
    own = jobs.get("chief") or jobs.get("master") or [None]
    if isinstance(own, dict):
        own = list(own.values())
    return workers, own[0]
