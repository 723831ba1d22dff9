"""What memory a process can still get from its host."""

import re
from collections.abc import Iterator
from pathlib import Path

# Of control groups of version 2 and 1: the folder that holds them; in a group's folder the files of
# its limit and of what it uses; and the line of `memory.stat` with the part of that which can be
# dropped, content of files.
_VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_host_memory(root: Path = Path("/")) -> int | None:
    """What the host has left for this process, or one of its control groups if that is less.

    Args:
        root: Where ``proc`` and ``sys`` are; for tests.

    Returns:
        Bytes; None where the system does not say, as those that are not Linux.
    """
    try:
        host = re.search(r"^MemAvailable: *(\d+) kB$", (root / "proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return None if host is None else min([1024 * int(host[1]), *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group leaves that this process is in, the outer ones included."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, *names, droppable = _VERSION_1 if controllers else _VERSION_2
        group = Path(path.lstrip("/"))
        # In a container the host's name of its group may lead nowhere: then its parents do.
        for each in (group, *group.parents):
            place = root / "sys/fs/cgroup" / folder / each
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                statistics = (place / "memory.stat").read_text()
            except OSError:
                continue
            if limit.isdigit():  # else "max"
                dropped = re.search(rf"^{droppable} (\d+)$", statistics, re.M)
                yield max(int(limit) - int(used) + int(dropped[1] if dropped else 0), 0)
