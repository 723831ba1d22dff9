"""Several processes that train one model: JAX's distributed runtime, started when asked for.

The launcher asks through the environment. Read in this order, the first that is there counts:

====================  ====================================================================
explicit              ``JAX_COORDINATOR_ADDRESS`` (``host:port`` of process 0),
                      ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
SLURM (``srun``)      ``SLURM_STEP_NUM_TASKS``, ``SLURM_PROCID``, ``SLURM_LOCALID``
Open MPI (``mpirun``) ``OMPI_COMM_WORLD_SIZE``, ``…_RANK``, ``…_LOCAL_RANK``
MPICH, Intel MPI      ``PMI_SIZE``, ``PMI_RANK``, ``MPI_LOCALRANKID``
TPU pod               ``TPU_WORKER_HOSTNAMES`` with several hosts
====================  ====================================================================

Where JAX cannot find the coordinator by itself, ``JAX_COORDINATOR_ADDRESS`` names it under any
launcher. Under SLURM and MPI each process takes the one GPU with its local rank, unless
``JAX_LOCAL_DEVICE_IDS`` (such as ``0,1,2,3``) says which.
"""

import dataclasses
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """What the environment says about the processes of a job.

    Attributes:
        launcher: Who said so: ``explicit``, ``slurm``, ``mpi`` or ``tpu``.
        num_processes: Processes of the job; None: JAX finds out.
        process_id: This process, from 0; None: JAX finds out.
        coordinator_address: ``host:port`` of process 0; None: JAX finds out.
        local_process_id: This process among those of its host; None: all local devices are its.
    """

    launcher: str
    num_processes: int | None = None
    process_id: int | None = None
    coordinator_address: str | None = None
    local_process_id: int | None = None


def detect_processes(environment: Mapping[str, str]) -> ProcessGroup | None:
    """Read the job's processes from the environment.

    Args:
        environment: As ``os.environ``.

    Returns:
        The group, or None when there is one process only.

    Raises:
        ValueError: The variables are incomplete or make no sense; names them.
    """
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    group = _explicit(environment, coordinator)
    group = group or _ranked(
        environment,
        coordinator,
        "slurm",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    )
    group = group or _ranked(
        environment,
        coordinator,
        "mpi",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    )
    group = group or _ranked(
        environment, coordinator, "mpi", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"
    )
    if group is not None:
        return group if group.num_processes != 1 else None
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return ProcessGroup("tpu", coordinator_address=coordinator)
    if coordinator is not None:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={coordinator} is set, but neither JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID nor the variables of SLURM or MPI say which process this is"
        )
    return None


def initialise_distributed() -> bool:
    """Join the other processes of the job, if the environment says that there are any.

    To be called before anything asks JAX for its devices. On CPUs, collectives between processes
    use JAX's default implementation, Gloo.

    Returns:
        Whether this is one of several processes.

    Raises:
        ValueError: The environment is incomplete; names the variables.
        RuntimeError: The processes did not find each other, or JAX is already in use.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    group = detect_processes(os.environ)
    if group is None:
        return False
    local = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else group.local_process_id
    try:
        jax.distributed.initialize(
            coordinator_address=group.coordinator_address,
            num_processes=group.num_processes,
            process_id=group.process_id,
            local_device_ids=None if local is None else [local],
            cluster_detection_method="deactivate" if group.launcher == "explicit" else None,
        )
    except ValueError as error:
        raise ValueError(
            f"{group.launcher}: {group.num_processes} processes were started, but JAX cannot find "
            f"the coordinator ({error}): set JAX_COORDINATOR_ADDRESS to host:port of process 0"
        ) from error
    return True


def any_process(condition: bool) -> bool:
    """Whether a condition holds on at least one process. All processes must call it together.

    Args:
        condition: This process's answer.

    Returns:
        The same answer on every process.
    """
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.asarray(condition))))


def from_process_zero(value: int) -> int:
    """What process 0 holds. All processes must call it together.

    Args:
        value: This process's number; only that of process 0 matters. Between ±2**31.

    Returns:
        The number of process 0, on every process.
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def _explicit(environment: Mapping[str, str], coordinator: str | None) -> ProcessGroup | None:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in environment]
    if not given:
        return None
    if len(given) < len(names) or coordinator is None:
        wanted = ("JAX_COORDINATOR_ADDRESS", *names)
        missing = ", ".join(name for name in wanted if name not in environment)
        raise ValueError(f"{', '.join(given)} is set, but {missing} is not")
    count, index = (_integer(environment, name) for name in names)
    _check_rank(*names, count, index)
    return ProcessGroup("explicit", count, index, coordinator)


def _ranked(
    environment: Mapping[str, str],
    coordinator: str | None,
    launcher: str,
    count_name: str,
    rank_name: str,
    local_name: str,
) -> ProcessGroup | None:
    if count_name not in environment or rank_name not in environment:
        return None
    count, rank = _integer(environment, count_name), _integer(environment, rank_name)
    _check_rank(count_name, rank_name, count, rank)
    local = _integer(environment, local_name) if local_name in environment else None
    return ProcessGroup(launcher, count, rank, coordinator, local)


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name}={environment[name]!r}: expected an integer") from None


def _check_rank(count_name: str, rank_name: str, count: int, rank: int) -> None:
    if not 0 <= rank < count:
        raise ValueError(
            f"{rank_name}={rank} with {count_name}={count}: expected 0 ≤ {rank_name} < {count_name}"
        )
