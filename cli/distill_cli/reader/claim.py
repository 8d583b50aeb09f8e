"""Where a claim can be mounted once more, by its access modes and the pods that mount it. Pure."""

from collections.abc import Sequence
from typing import Any

from distill_cli.failure import CommandFailed

Json = dict[str, Any]


def node_for(claim: Json, pods: Sequence[Json]) -> str | None:
    """Return the node on which a pod can mount the claim beside those that do; None where each will do.

    Raises CommandFailed where no other pod can mount it now.
    """
    name = claim["metadata"]["name"]
    modes = claim.get("status", {}).get("accessModes") or claim["spec"].get("accessModes", [])
    holders = [pod for pod in pods if _holds(pod, name)]
    if "ReadWriteMany" in modes or not holders:
        return None
    if "ReadWriteOncePod" in modes:
        raise CommandFailed(
            f"claim {name} is ReadWriteOncePod, and pod {holders[0]['metadata']['name']} mounts it: wait until it ends"
        )
    return str(holders[0]["spec"]["nodeName"])


def _holds(pod: Json, claim: str) -> bool:
    over = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    volumes = pod["spec"].get("volumes", [])
    mounted = any((v.get("persistentVolumeClaim") or {}).get("claimName") == claim for v in volumes)
    return mounted and not over and bool(pod["spec"].get("nodeName"))
