"""The stores of a job's teachers, also of one whose files are gone: nothing but its scores is left then."""

from dataclasses import replace
from pathlib import Path, PurePath

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_workers.failures import ConfigurationError
from distill_workers.teacher.protocol import Observer
from distill_workers.teacher.stored_scores.identity import ScoreIdentity, identity_of
from distill_workers.teacher.stored_scores.label import stored_labels
from distill_workers.teacher.stored_scores.store import ScoreStore

FOLDER = "teacher_scores"
"""Beside the run folders on the output volume; no job can have a name with an underscore."""


def stores_of_job(spec: Spec, student_tokens: int, observer: Observer) -> dict[str, ScoreStore]:
    """Return the store of each teacher of a job, by name; none where it scores everything anew.

    Without a live teacher its files may be gone too: then it is the one whose scores were stored under its path. Raises
    ConfigurationError where those are several, or where no more than the last part of a path is the same; and OSError.
    """
    how = spec.objective.teacher_logprobs
    if how is TeacherLogprobs.LIVE:
        return {}
    root, read_only = Path(spec.output.path) / FOLDER, how is TeacherLogprobs.PRECOMPUTED
    stores = {}
    for teacher in spec.all_teachers:
        identity, model = identity_of(spec, teacher, student_tokens), teacher.model or ""
        if read_only and model and not identity.weights:
            identity = _stored_identity(root, identity, teacher, model)
        stores[teacher.name] = ScoreStore(root, teacher.name, identity, observer, model=model, read_only=read_only)
    return stores


def _stored_identity(root: Path, identity: ScoreIdentity, teacher: NamedTeacherSource, model: str) -> ScoreIdentity:
    """Return the identity under which the scores of a teacher without files are stored.

    A path that is the same in its last part alone may be another teacher's (`org1/foo` and `org2/foo`, each exported
    `model`), and nothing would tell. A volume that is mounted elsewhere costs a word in the job, which is free to
    change there.
    """
    alike = [
        label
        for label in stored_labels(root)
        if replace(label.identity, teacher="", weights="") == replace(identity, teacher="", weights="")
    ]
    found = [label.identity for label in alike if model in label.models]
    if len(found) > 1:
        raise ConfigurationError(
            f"{root} has {len(found)} stores of teacher {model} with different weights, and no "
            f"{teacher.path}.model/config.json is here to tell which is meant: mount the teacher's files, or "
            "remove the other stores (teacher.json in each says whose it is)"
        )
    if found:
        return found[0]
    others = sorted({m for label in alike for m in label.models if PurePath(m).name == PurePath(model).name})
    if others:
        raise ConfigurationError(
            f"{teacher.path}.model: {root} has no scores of {model}, whose files are not here, but has those of "
            f"{', '.join(others)}, which may be another teacher: if it is the same, write that path here or mount the "
            "files; else run the job once with objective.teacherLogprobs cached"
        )
    return identity
