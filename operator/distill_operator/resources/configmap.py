"""The ConfigMap that shows the job's own manifest to its pods: the workers read exactly what the user wrote."""

import json

from distill_api import protocol
from distill_operator.resources.pod_template import Json, Owner, config_map_name, metadata

FILE = protocol.JOB_FILE.rpartition("/")[2]


def config_map(job: Owner) -> Json:
    """Return the ConfigMap of a job or a Teacher."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, config_map_name(job)),
        "data": data(
            {
                "apiVersion": job.api_version,
                "kind": job.kind,
                "metadata": {
                    "name": job.metadata.name,
                    "namespace": job.metadata.namespace,
                    "uid": job.metadata.uid,
                    # By these the trainers of a job that was deleted and applied again know who is younger.
                    **({"creationTimestamp": created} if (created := job.metadata.creation_timestamp) else {}),
                },
                "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
            }
        ),
    }


def data(manifest: Json) -> dict[str, str]:
    """Return the data of a ConfigMap that holds a manifest."""
    # JSON is YAML, and no reader takes 1e-6 for a string.
    return {FILE: json.dumps(manifest, indent=2, sort_keys=True)}


def manifest(config_map: Json) -> Json | None:
    """Return the manifest that data() wrote; None where somebody made something else of it."""
    try:
        found: Json = json.loads(config_map["data"][FILE])
        return found if isinstance(found["spec"], dict) else None
    except (KeyError, TypeError, ValueError):
        return None
