"""The label of a folder of stored scores, teacher.json: whose they are, for people and where the teacher is gone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from distill_workers.teacher.stored_scores.identity import ScoreIdentity
from distill_workers.teacher.stored_scores.segment import publish

LABEL = "teacher.json"


@dataclass(frozen=True)
class Label:
    """What teacher.json says."""

    identity: ScoreIdentity
    models: tuple[str, ...]
    """Paths and hub ids by which jobs have named the teacher. Not part of the identity: files may be moved."""


def folder_of(root: Path, identity: ScoreIdentity) -> Path:
    """Return the folder of the scores of an identity, in that of all stores."""
    return root / identity.digest[:32]


def stored_labels(root: Path) -> list[Label]:
    """Return the labels of all stores; one that is damaged, or not ours to read, is left out. Raises OSError."""
    try:
        folders = sorted(root.iterdir())
    except FileNotFoundError:
        return []
    return [label for folder in folders if (label := _label(folder)) is not None]


def write_label(root: Path, identity: ScoreIdentity, model: str) -> None:
    """Make the folder of an identity with a label that has `model`, unless it has that. Raises OSError."""
    folder = folder_of(root, identity)
    folder.mkdir(parents=True, exist_ok=True)
    found = _label(folder)
    models = found.models if found is not None else ()
    if found is None or model not in (*models, ""):
        fields = {**asdict(identity), "models": [*models, *filter(None, [model])]}
        publish(folder / LABEL, [json.dumps(fields, indent=1).encode()])


def _label(folder: Path) -> Label | None:
    """Return the label of a folder; None where it has none, or one that is not its own."""
    try:
        fields = json.loads((folder / LABEL).read_text(encoding="utf-8"))
        models = tuple(str(model) for model in fields.pop("models", ()))
        identity = ScoreIdentity.of_fields(fields)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return Label(identity, models) if folder_of(folder.parent, identity) == folder else None
