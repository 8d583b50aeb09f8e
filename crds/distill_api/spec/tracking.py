"""Experiment trackers: where the metrics of a run are written besides metrics.jsonl and /metrics."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, ShortText
from distill_api.rules import WITHOUT_CREDENTIALS, matching

SecretName = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$",
        "must be the name of a Secret: lower-case letters, digits, dashes and dots, with none of these two at an end",
    ),
]
TrackingUri = Annotated[
    str,
    Field(max_length=1024),
    matching(
        r"^(https?://|file:///)[^\s]+$", "must begin with http:// or https://, or file:/// for a folder of the volume"
    ),
    WITHOUT_CREDENTIALS,
]


class WandB(Model):
    """A run of Weights & Biases, named as the job."""

    project: ShortText = Field(description="Project of the run.")
    entity: ShortText | None = Field(None, description="Team or user of the run; by default the owner of the API key.")
    key_secret: SecretName | None = Field(
        None,
        description="Name of a Secret of this namespace whose key WANDB_API_KEY is the API key. Without it the run is "
        "written offline into the run folder, for `wandb sync`.",
    )


class MLflow(Model):
    """A run of MLflow, named as the job. Credentials are MLFLOW_TRACKING_ variables, set in trainer.template."""

    uri: TrackingUri = Field(
        description="URI of the tracking server, or file:///PATH for a folder of the output volume."
    )
    experiment: ShortText = Field(description="Experiment of the run; it is created where there is none of this name.")


class Tracking(Model):
    """Copies of metrics.jsonl for experiment trackers. A tracker's errors are counted, and never end a run."""

    tensorboard: bool = Field(
        True, description="Write TensorBoard event files into the folder tensorboard of the run folder."
    )
    wandb: WandB | None = Field(None, description="Copy the metrics to a run of Weights & Biases.")
    mlflow: MLflow | None = Field(None, description="Copy the metrics to a run of MLflow.")
