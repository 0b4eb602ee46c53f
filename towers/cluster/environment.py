"""environment: the cluster that TF_CONFIG names."""

import json
import os


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
