"""What the environment says about the processes of a job."""

import pytest

from train.distributed import ProcessGroup, detect_processes, initialise_distributed

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "host:1234"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (SLURM, None),  # an allocation without srun is one process
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            {
                **SLURM,
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
            },
            ProcessGroup("slurm", 8, 5, None, 1),
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            ProcessGroup("mpi", 2, 1, None, 0),
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", **COORDINATOR}, ProcessGroup("mpi", 4, 3, "host:1234")),
        (
            {**COORDINATOR, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ProcessGroup("explicit", 2, 1, "host:1234"),
        ),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ProcessGroup("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_detection(environment, expected):
    assert detect_processes(environment) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        (COORDINATOR, "JAX_PROCESS_ID"),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS is not",
        ),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "'two'"),
        (
            {**COORDINATOR, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "-1"}, "PMI_RANK=-1"),
    ],
)
def test_nonsense_is_an_error_that_names_the_variables(environment, message):
    with pytest.raises(ValueError, match=message):
        detect_processes(environment)


def test_one_process_starts_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", {})
    assert initialise_distributed() is False
