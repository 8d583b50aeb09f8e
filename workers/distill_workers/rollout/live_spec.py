"""What the job asks for by now, of the little that may change while it runs.

The job's file is a ConfigMap mounted as a folder: the kubelet brings it up to date within a minute or so of a change.
"""

import logging
import os
from pathlib import Path

from distill_api.job import InvalidManifest, load_job
from distill_api.protocol import JOB_FILE, Variable

log = logging.getLogger(__name__)


def rollout_replicas(otherwise: int) -> int:
    """spec.rollout.replicas as it stands in the file; `otherwise` where that cannot be read."""
    try:
        return load_job(Path(os.environ.get(Variable.JOB_FILE, JOB_FILE))).spec.rollout.replicas
    except InvalidManifest as error:
        log.warning("the number of engines stays %d: %s", otherwise, error)
        return otherwise
