"""The ConfigMap that shows the job's own manifest to its pods: the workers read exactly what the user wrote."""

import json

from distill_api import wire
from distill_operator.children.pod import Json, Owner, config_map_name, metadata


def config_map(job: Owner) -> Json:
    manifest = {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {
            "name": job.metadata.name,
            "namespace": job.metadata.namespace,
            "uid": job.metadata.uid,
        },
        "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
    }
    file = wire.JOB_FILE.rpartition("/")[2]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, config_map_name(job)),
        # JSON is YAML, and no reader takes 1e-6 for a string.
        "data": {file: json.dumps(manifest, indent=2, sort_keys=True)},
    }
