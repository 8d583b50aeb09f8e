"""The ConfigMap that shows the job's own manifest to its pods: the workers read exactly what the user wrote."""

import json

from distill_api import names, wire
from distill_api.job import DistillationJob
from distill_operator.children.pod import Json, metadata


def config_map(job: DistillationJob) -> Json:
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
        "metadata": metadata(job, names.config_map(job.metadata.name)),
        # JSON is YAML, and no reader takes 1e-6 for a string.
        "data": {file: json.dumps(manifest, indent=2, sort_keys=True)},
    }
