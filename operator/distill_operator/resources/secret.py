"""The Secret with the key of a job or a Teacher, without which SGLang's administration and Ray let nobody in.

It is created once and never read: the operator has no right to read Secrets, so nothing here is compared or repaired.
"""

from distill_api import names
from distill_operator.resources.pod_template import Json, Owner, metadata


def key_secret(job: Owner) -> Json:
    """Return the Secret without the key itself, which is drawn when the Secret is created."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(job, names.key_secret(job.metadata.name, job.metadata.uid)),
        "type": "Opaque",
        "immutable": True,
    }
