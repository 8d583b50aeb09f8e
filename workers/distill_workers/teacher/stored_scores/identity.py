"""The identity of stored scores: what a teacher's log-probs depend on by more than rounding, besides the tokens."""

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

from distill_api.spec.job_spec import NamedTeacherSource, Spec

WEIGHTS = ("*.safetensors", "*.bin")
BLOCKS, BLOCK_BYTES = 256, 4096
"""Blocks of a weight file that are read, evenly spaced: a merged adapter leaves the ends of a file as they were."""


@dataclass(frozen=True)
class ScoreIdentity:
    """All that two scores of the same tokens must have in common to stand for each other."""

    teacher: str
    """The last part of the model's path where `weights` are known, else all of it, or the hub id; else the Teacher, or
    URL and model of the endpoint."""
    weights: str
    """`weights_digest`; empty where the teacher's files are not on this machine."""
    precision: str
    """Of a teacher that the job serves, as are engine_args; empty for others."""
    engine_args: tuple[str, ...]
    top_k: int | None
    student_tokens: int
    """Tokens of the student's tokenizer: likeliest tokens beyond them are none."""

    def __str__(self) -> str:
        served = " ".join(filter(None, [self.precision, *self.engine_args]))
        known = f", weights {self.weights[:8]}" if self.weights else ""
        return f"{self.teacher} ({served}{known}, topK {self.top_k}, {self.student_tokens} tokens)".replace("(, ", "(")

    @property
    def digest(self) -> str:
        """A SHA-256 of all fields, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()

    @classmethod
    def of_fields(cls, fields: Any) -> Self:
        """Return the identity with the values of `dataclasses.asdict`. Raises TypeError, LookupError."""
        return cls(**{**fields, "engine_args": tuple(fields["engine_args"])})


def identity_of(spec: Spec, teacher: NamedTeacherSource, student_tokens: int) -> ScoreIdentity:
    """Return the identity of the scores that a job takes from one of its teachers."""
    top_k = spec.objective.teacher_top_k
    if teacher.model is None:
        url = f"{teacher.endpoint.url} " if teacher.endpoint is not None and teacher.endpoint.model else ""
        return ScoreIdentity(url + teacher.title, "", "", (), top_k, student_tokens)
    folder = Path(teacher.model).expanduser()
    weights = weights_digest(folder)
    own = (weights, spec.dtype, tuple(teacher.engine_args))
    return ScoreIdentity(folder.name if weights else teacher.model, *own, top_k, student_tokens)


def weights_digest(folder: Path) -> str:
    """Return a SHA-256 of a model's config.json, and of size and BLOCKS blocks of each of its weight files; empty where
    there are none."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    if not files:
        return ""
    config = folder / "config.json"
    found = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for file in files:
        size = file.stat().st_size
        found.update(f"/{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for place in range(BLOCKS):
                stream.seek(max(size - BLOCK_BYTES, 0) * place // (BLOCKS - 1))
                found.update(stream.read(BLOCK_BYTES))
    return found.hexdigest()
