"""The live spec: the few fields of the job that may change while it runs, as they stand now.

The job's file is a ConfigMap mounted as a folder: the kubelet brings it up to date within a minute or so of a change.
"""

import logging
import os
from pathlib import Path

from distill_api.job import InvalidManifest, load_job
from distill_api.protocol import JOB_FILE, Variable

log = logging.getLogger(__name__)


def rollout_replicas(default: int) -> int:
    """Return spec.rollout.replicas of the job's file, or `default` where the file cannot be read."""
    try:
        return load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))).spec.rollout.replicas
    except InvalidManifest as error:
        log.warning("the number of engines stays %d: %s", default, error)
        return default
