"""The processes of the pods of the embedded cluster, as this machine numbers them.

A pod is known by the cgroup of its processes and by the HOSTNAME of its first one, so no API server is needed to find
them: it may be what is away.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_CONTAINER = re.compile(r"/pod([0-9a-f-]{36})/([0-9a-f]{64})")
_FIRST = 1
_MAIN = re.compile(
    r" -m distill_(?:operator|workers\.(?!probe))|^(?:sglang::|ray::Engine)|^\S+/(?:raylet/raylet|gcs/gcs_server) "
    r"| -m ray\.util\.client\.server "
)


@dataclass(frozen=True)
class PodProcess:
    """One process of a pod."""

    pid: int
    """On this machine."""
    inner: int
    """In its container."""
    pod: str
    uid: str
    """Of the pod."""
    command: str

    def __str__(self) -> str:
        return f"{self.pid}[{self.inner}] {self.command[:60]}"


def pod_processes(name: str, proc: Path = Path("/proc")) -> list[PodProcess]:
    """Return the living processes of all pods whose name matches, in the order of their numbers."""
    containers: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    pods: dict[tuple[str, str], str] = {}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            container = _CONTAINER.search((folder / "cgroup").read_text())
            if container is None:
                continue
            status = (folder / "status").read_text()
            numbers = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
            if numbers is None or re.search(r"^State:\s+[ZX]", status, re.MULTILINE):
                continue
            key, inner = (container[1], container[2]), int(numbers[1])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            containers[key].append((int(folder.name), inner, command))
            # Of the first alone: SGLang and Ray write their titles over the environment of others.
            if inner == _FIRST:
                variables = (folder / "environ").read_bytes().split(b"\0")
                host = next((v.decode() for v in variables if v.startswith(b"HOSTNAME=")), "")
                pods[key] = host.removeprefix("HOSTNAME=")
        except OSError:
            continue  # it has ended meanwhile
    found = [
        PodProcess(pid, inner, pods[key], key[0], command)
        for key, members in containers.items()
        if re.fullmatch(name, pods.get(key, ""))
        for pid, inner, command in members
        if not command.startswith("/pause")
    ]
    return sorted(found, key=lambda process: process.pid)


def main_processes(found: list[PodProcess]) -> list[PodProcess]:
    """Return those that do the work of their pods: without probes, dashboards and their like."""
    return [process for process in found if process.inner == _FIRST or _MAIN.search(process.command)]
