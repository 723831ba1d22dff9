"""What memory a process can still get, on hosts made of files."""

from pathlib import Path

import jax
import pytest

from train import compilation
from train.host_memory import available_host_memory
from train.sharding import make_mesh

GIB = 2**30


@pytest.fixture
def host(tmp_path: Path):
    """Makes a host with 20 GiB of 24 left, and files of its control groups."""

    def make(group: str, files: dict[str, int | str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        text = f"MemTotal: {24 * 2**20} kB\nMemFree: 9 kB\nMemAvailable:  {20 * 2**20} kB\n"
        (tmp_path / "proc/meminfo").write_text(text)
        (tmp_path / "proc/self/cgroup").write_text(f"7:cpu,cpuacct:/a\n{group}\n")
        for name, content in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return make


def version_2(folder: str, limit: int | str, used: int, droppable: int) -> dict[str, int | str]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {droppable}\nactive_file 3",
    }


def test_what_is_available_and_not_what_there_is(host) -> None:
    assert available_host_memory(host("0::/", {})) == 20 * GIB


def test_a_kernel_without_control_groups(host) -> None:
    root = host("0::/", {})
    (root / "proc/self/cgroup").unlink()
    assert available_host_memory(root) == 20 * GIB


def test_a_group_leaves_its_limit_less_what_it_uses(host) -> None:
    """Of which files' content can be dropped; the group around it has less left."""
    inner = version_2("job/step", 16 * GIB, 6 * GIB, 2 * GIB)
    outer = version_2("job", 18 * GIB, 8 * GIB, GIB)
    assert available_host_memory(host("0::/job/step", inner | outer)) == 11 * GIB


def test_a_group_without_a_limit_leaves_all(host) -> None:
    assert available_host_memory(host("0::/job", version_2("job", "max", GIB, 0))) == 20 * GIB


def test_a_group_that_is_full_leaves_nothing(host) -> None:
    assert available_host_memory(host("0::/job", version_2("job", GIB, GIB + 1, 0))) == 0


def test_a_group_of_version_1_with_the_name_that_the_host_has_for_it(host) -> None:
    files = {
        "memory/memory.limit_in_bytes": 4 * GIB,
        "memory/memory.usage_in_bytes": 2 * GIB,
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}",
    }
    assert available_host_memory(host("4:memory:/docker/1f", files)) == 3 * GIB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) is None


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs have memory of their own")
def test_the_report_of_cpus_shares_what_is_available(make_config, monkeypatch) -> None:
    monkeypatch.setattr(compilation, "available_host_memory", lambda: 6 * GIB)
    mesh = make_mesh(make_config(mesh__data=2))
    compiled = compilation.compile_ahead(lambda x: x + 1, jax.numpy.ones(8))
    assert compilation.memory_report(compiled, mesh).available == 3 * GIB
