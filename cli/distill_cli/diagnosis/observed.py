"""What `distill doctor` observes of a cluster, and the rights of the user that it asks about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_api.base import GROUP, PLURAL

Json = dict[str, Any]
CRD_NAME = f"{PLURAL}.{GROUP}"


@dataclass(frozen=True)
class Right:
    """A request that the commands make with the user's rights; `need` is what does not work without it.

    One that is `required` fails the check; the others are warnings.
    """

    verb: str
    group: str
    resource: str
    need: str
    required: bool = False
    subresource: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}" + (f"/{self.subresource}" if self.subresource else "")


_RESULTS = "report, export and compare of jobs"

RIGHTS = (
    Right("create", GROUP, PLURAL, "submit", required=True),
    Right("patch", GROUP, PLURAL, "submit, suspend and resume", required=True),
    Right("get", GROUP, PLURAL, "watch", required=True),
    Right("list", GROUP, PLURAL, "list", required=True),
    Right("list", "", "pods", "logs"),
    Right("get", "", "pods", "logs", subresource="log"),
    Right("get", "", "pods", "samples, and the stage times of watch", subresource="proxy"),
    Right("list", "", "events", "the events of watch"),
    Right("create", "", "pods", _RESULTS),
    Right("get", "", "pods", _RESULTS),
    Right("delete", "", "pods", _RESULTS),
    # A stream is a GET, for which newer servers ask for the right to create as well.
    Right("get", "", "pods", _RESULTS, subresource="exec"),
    Right("create", "", "pods", _RESULTS, subresource="exec"),
    Right("get", "", "persistentvolumeclaims", _RESULTS),
    Right("list", "batch", "jobs", _RESULTS),
)


@dataclass(frozen=True)
class Observed:
    """A cluster as the user's rights show it; None stands for what may not be read."""

    server: str
    version: Json
    """The answer of /version."""
    namespace_name: str
    namespace: Json | None
    namespace_exists: bool
    crd: Json | None
    crd_readable: bool
    groups: Mapping[str, Sequence[str]]
    """The API groups that are served, with their versions."""
    operators: Sequence[Json] | None
    """The Deployments of this project's operator, in any namespace."""
    kuberays: Sequence[Json] | None
    """The Deployments of KubeRay's operator, in any namespace."""
    nodes: Sequence[Json] | None
    storage_classes: Sequence[Json] | None
    monitors: Sequence[str]
    """The resources of monitoring.coreos.com that are served."""
    rights: Mapping[Right, bool] = field(default_factory=dict)
    own_version: str | None = None
    """The version of this program; None in a source folder."""
