"""What `distill doctor` looked at, what it asks for, and what a check says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from distill_api.base import GROUP, PLURAL

Json = dict[str, Any]
CRD_NAME = f"{PLURAL}.{GROUP}"
INSTALL_CHART = "install the chart (make install, or helm upgrade --install)"


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` is empty where all is well."""

    check: str
    level: Level
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Right:
    """A request that the user's commands make; without it `need` is lost."""

    verb: str
    group: str
    resource: str
    need: str
    must: bool = False
    subresource: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}" + (f"/{self.subresource}" if self.subresource else "")


RIGHTS = (
    Right("create", GROUP, PLURAL, "submit", must=True),
    Right("patch", GROUP, PLURAL, "submit, suspend and resume", must=True),
    Right("get", GROUP, PLURAL, "watch", must=True),
    Right("list", GROUP, PLURAL, "list", must=True),
    Right("list", "", "pods", "logs"),
    Right("get", "", "pods", "logs", subresource="log"),
    Right("get", "", "pods", "samples, and the stage times of watch", subresource="proxy"),
    Right("list", "", "events", "the events of watch"),
)


@dataclass(frozen=True)
class Seen:
    """A cluster, as far as it could be looked at; None for what may not be read."""

    server: str
    version: Json
    """Answer of /version."""
    namespace_name: str
    namespace: Json | None
    namespace_exists: bool
    crd: Json | None
    crd_readable: bool
    groups: Mapping[str, Sequence[str]]
    """API groups that are served, with their versions."""
    operators: Sequence[Json] | None
    """Deployments of our operator, in any namespace."""
    kuberays: Sequence[Json] | None
    nodes: Sequence[Json] | None
    storage_classes: Sequence[Json] | None
    monitors: Sequence[str]
    """Resources of monitoring.coreos.com that are served."""
    rights: Mapping[Right, bool] = field(default_factory=dict)
    own_version: str | None = None
    """Of this program; None from a source folder."""
