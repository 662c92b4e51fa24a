"""The options of `metagen train` that say on what it runs: devices, processes, and whether sums have a fixed order."""

import dataclasses
import os

from metagen_jax.processes import connect, connect_cluster

ORDERED = "--xla_gpu_exclude_nondeterministic_ops=true"  # GPUs have kernels that add in the order of arrival


@dataclasses.dataclass(frozen=True)
class Distributed:
    """What a run is spread over. It changes nothing of what is learned, up to the order of sums over tasks."""

    devices: int | None = None
    """at most so many devices, over which the tasks of a meta-step are spread; all there are if not given"""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same in each of several processes that train one run together"""
    processes: int | None = None
    """how many processes there are"""
    index: int | None = None
    """which of them this is, from 0; process 0 has the run's folder"""
    cluster: bool = False
    """take the three above from the cluster that started this process: Slurm, Open MPI, Kubernetes, a TPU pod"""


def join(distributed: Distributed, *, deterministic: bool = False) -> None:
    """Become what the options say, before anything that has to do with devices.

    Raises:
        ValueError: options that do not go together, or the other processes were not found.
    """
    if deterministic and ORDERED not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ORDERED}".strip()
    d = distributed
    three = {"coordinator": d.coordinator, "processes": d.processes, "index": d.index}
    missing = [name for name, value in three.items() if value is None]
    if d.cluster:
        if len(missing) < len(three):
            raise ValueError(
                "--distributed.cluster finds coordinator, processes and index by itself; give none of them"
            )
        connect_cluster()
    elif d.coordinator is not None and d.processes is not None and d.index is not None:
        connect(d.coordinator, d.processes, d.index)
    elif len(missing) < len(three):
        raise ValueError(
            "several processes need --distributed.coordinator, --distributed.processes and --distributed.index; "
            f"missing: {', '.join(missing)}"
        )
