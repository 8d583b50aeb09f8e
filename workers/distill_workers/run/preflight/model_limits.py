"""What a model's config.json bounds: the positions of a sequence, and the token ids that have an embedding row."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_workers.model_folder import read_config
from distill_workers.run.preflight.check import ModelsDisagree

CONTEXT_ARGUMENT = "--context-length"
"""With which a user tells SGLang another length than that of config.json."""

LARGER_RATIO = 1.1
"""Parameters of a student over its teacher's above which that is said: heads and embeddings of one family differ."""


@dataclass(frozen=True)
class Limits:
    """The bounds of one model; None where its files do not say."""

    positions: int | None
    """Tokens of a sequence, prompt and response."""
    rows: int | None
    """Of the embedding: token ids from 0 on."""


def limits(folder: Path, engine_args: list[str]) -> Limits:
    """Return the limits by a model's files, and by the arguments of its SGLang servers. Raises ConfigurationError."""
    config = read_config(folder / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    positions = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # As SGLang reads it: with the original length beside it, max_position_embeddings is the scaled one.
    if positions and "original_max_position_embeddings" not in rope and rope.get("rope_type") != "llama3":
        positions = int(positions * (rope.get("factor") or 1))
    return Limits(_stated_context(engine_args) or positions, config.get("vocab_size"))


def teacher_limits(teacher: NamedTeacherSource) -> Limits | None:
    """Return the limits of a teacher by its files, or else by the config.json beside its own tokenizer; None where
    neither is on this machine."""
    folder = next((folder for folder in _folders(teacher) if (folder / "config.json").is_file()), None)
    return None if folder is None else limits(folder, teacher.engine_args)


def _folders(teacher: NamedTeacherSource) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    if teacher.model is not None:
        yield Path(teacher.model).expanduser()
    if teacher.tokenizer is not None:
        yield Path(teacher.tokenizer).expanduser()
        if not teacher.tokenizer.startswith(("/", ".", "~")):
            # A hub id, whose tokenizer was read when the trainer started.
            cached = try_to_load_from_cache(teacher.tokenizer, "config.json")
            if isinstance(cached, str):
                yield Path(cached).parent


def longest_response(spec: Spec) -> int:
    """Return the tokens of the longest response that the student may write, in training or in an evaluation."""
    of_evaluations = (e.max_response_tokens for e in spec.evaluation if e.max_response_tokens is not None)
    return max(spec.rollout.max_response_tokens, *of_evaluations, 0)


def parameters(folder: Path) -> int | None:
    """Return the number of a model's parameters, by the headers of its safetensors files; None without any."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            count += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return count or None


def swapped_sizes(student: Path, teacher: Path, name: str) -> str:
    """Return a note about a student with more parameters than its teacher, as where the two were swapped; else
    nothing."""
    mine, theirs = parameters(student), parameters(teacher)
    if mine is None or theirs is None or mine <= LARGER_RATIO * theirs:
        return ""
    return (
        f"TeacherIsLarger: the student has {mine:,} parameters and teacher {name} has {theirs:,}; are student.model "
        "and the teacher's model swapped?"
    )


def check_context_length(spec: Spec, student: Limits, teacher: Limits | None, name: str) -> None:
    """Raise ModelsDisagree where the longest prompt and response do not fit one of the models.

    SGLang scores a sequence that is shorter than its context, and generates up to it: a teacher needs one more.
    """
    rollout = spec.rollout
    longest = longest_response(spec)
    tokens = rollout.max_prompt_tokens + longest
    found = [("the student", student.positions, tokens)]
    if teacher is not None:
        found.append((f"teacher {name}", teacher.positions, tokens + 1))
    if any(positions is not None and positions < needed for _, positions, needed in found):
        has = " and ".join(f"{who} has {positions}" for who, positions, _ in found if positions is not None)
        one = "" if teacher is None else ", of which a teacher needs one more than it scores"
        raise ModelsDisagree(
            f"ContextLength: rollout.maxPromptTokens {rollout.max_prompt_tokens} and a response of up to {longest} "
            f"tokens are {tokens}, but {has} positions (max_position_embeddings){one}; lower maxPromptTokens or "
            "maxResponseTokens, or choose models that take longer sequences"
        )


def check_embedding_rows(tokenizer: Any, student: Limits) -> None:
    """Raise ModelsDisagree where the student's tokenizer has a token that the embedding has no row for."""
    if student.rows is None:
        return
    text, last = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if last >= student.rows:
        raise ModelsDisagree(
            f"EmbeddingRows: the student's tokenizer has the token {text!r} with id {last}, and its embedding has "
            f"{student.rows} rows (vocab_size), so that token cannot be computed; give the student the tokenizer that "
            "it was trained with, or resize its embedding"
        )


def _stated_context(arguments: list[str]) -> int | None:
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == CONTEXT_ARGUMENT:
            value = value or (arguments[at + 1] if at + 1 < len(arguments) else "")
            return int(value) if value.isdigit() else None
    return None
