"""Where the numbers of a run are written besides metrics.jsonl and /metrics: what outlives its pods."""

from typing import Annotated

from pydantic import Field

from distill_api.base import Model, ShortText
from distill_api.rules import matching

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
]


class WandB(Model):
    """A run of Weights & Biases, named as the job."""

    project: ShortText = Field(description="Project that the run goes to.")
    entity: ShortText | None = Field(None, description="Team or user; absent is the owner of the key.")
    key_secret: SecretName | None = Field(
        None,
        description="Secret of the job's namespace whose key WANDB_API_KEY is the API key. Without a key the run is "
        "kept offline in the run folder, for `wandb sync`.",
    )


class MLflow(Model):
    """A run of MLflow, named as the job. Credentials are MLFLOW_TRACKING_ variables, by trainer.template.env."""

    uri: TrackingUri = Field(description="The tracking server, or file:///PATH.")
    experiment: ShortText = Field(description="Experiment that the run goes to; made where there is none.")


class Tracking(Model):
    """Copies of metrics.jsonl for other tools. One that cannot be written to is counted, and never ends a run."""

    tensorboard: bool = Field(True, description="Event files in the folder tensorboard of the run.")
    wandb: WandB | None = Field(None, description="Weights & Biases.")
    mlflow: MLflow | None = Field(None, description="MLflow.")
