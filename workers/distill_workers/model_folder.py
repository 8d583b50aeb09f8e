"""The folder of a model's files: on a mounted volume, or downloaded from the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from distill_workers.failures import ConfigurationError

FILES = [
    "*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja", "*.py",
    "README.md", "LICENSE*", "NOTICE*",
]  # fmt: skip
"""Patterns of the files that are downloaded of a model: its weights, its tokenizer, code that runs only where the job
trusts it, and the terms that an exported model takes over."""
WEIGHTS = "*.safetensors"


def model_folder(model: str, field: str, *, weights: bool = True) -> Path:
    """Return the local folder of a model; a hub id is downloaded, without its weights if they are not needed. Raises
    ConfigurationError, which names `field`."""
    if model.startswith(("/", "./", "../", "~")):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"{field}: {model} is no Hugging Face checkpoint (no config.json there); "
                "mount the volume that holds it through the role's template (distill run: --volume "
                f"{folder.parent}=FOLDER), or give a hub id"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[name for name in FILES if weights or name != WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"{field}: {model} could not be had from the Hugging Face hub: {' '.join(str(error).split())[:500]}; "
            "give a model that exists there (for a gated one set HF_TOKEN: in podTemplate for main, or for distill run "
            "in the environment), or a path"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model. Raises ConfigurationError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; copy the model again") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} is no JSON object; copy the model again")
    return found
