"""The output of a run: the volume of its run folder."""

from pydantic import Field

from distill_api.base import Model
from distill_api.fields import AbsolutePath, ObjectName


class OutputVolume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: ObjectName = Field(
        description="Name of the PersistentVolumeClaim; ReadWriteMany where several pods mount it."
    )


class Output(Model):
    """The output of a run: checkpoints, the exported model and metrics.jsonl, in the folder path/NAME of a volume."""

    volume: OutputVolume | None = Field(
        None, description="Volume mounted at path. Required on a cluster; `distill run` uses the local folder."
    )
    path: AbsolutePath = Field("/output", description="Mount path of the output volume.")
