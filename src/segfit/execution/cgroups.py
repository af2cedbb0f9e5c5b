"""Linux's control groups: the folders that may limit this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["group_folders", "group_text"]


def group_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that may limit what `controller` counts, and those above them.

    Both versions of control groups are followed. `root` is where the system's ``proc`` and ``sys`` are.
    """
    for line in group_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / (controllers and controller)):
            folder = mount / group.lstrip("/")
            yield from (mount, *(above for above in (folder, *folder.parents) if mount in above.parents))


def group_text(path: Path) -> str:
    """Return the content of a small file, nothing if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
