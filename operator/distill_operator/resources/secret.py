"""The Secret that holds the key of a job: SGLang's administration and Ray ask for it.

It is made once and never read: the operator holds no right to read Secrets, so nothing here is compared or put right.
"""

from distill_api import names
from distill_operator.resources.pod_template import Json, Owner, metadata


def key_secret(job: Owner) -> Json:
    """Without the key itself, which is drawn when the Secret is made."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(job, names.key_secret(job.metadata.name, job.metadata.uid)),
        "type": "Opaque",
        "immutable": True,
    }
