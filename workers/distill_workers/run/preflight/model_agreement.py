"""What a student's files and its teacher's must agree on, and how a response ends: read before any server is asked.

A student that ends its turn by a token which neither its engine nor its teacher takes for an end writes on to its full
length, and is taught what no teacher ever says (ms-swift#9526). Two chat templates that differ by a space or a system
prompt cost the teacher tenths of a nat on every token (tinker's reports). Both look like training.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_api.teacher.student import engines_score
from distill_workers.data.rendering import WithArguments, template_arguments
from distill_workers.failures import ConfigurationError
from distill_workers.model_folder import model_folder, read_config
from distill_workers.run.preflight.chat_template import same_special_tokens, same_template, same_thinking
from distill_workers.run.preflight.check import ModelsDisagree
from distill_workers.run.preflight.model_limits import (
    check_context_length,
    check_embedding_rows,
    limits,
    swapped_sizes,
)
from distill_workers.teacher.cross_tokenizer.turn import turn_of

__all__ = [
    "Agreement",
    "Ends",
    "ModelsDisagree",
    "check_models",
    "ends",
    "load_tokenizer",
    "same_template",
    "size_notes",
    "stop_ids",
    "teacher_tokenizers",
]

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
"""One of these holds a vocabulary. Without, transformers makes up a tokenizer of no tokens for some architectures."""


@dataclass(frozen=True)
class Ends:
    """The token ids by which a model's responses end."""

    ids: frozenset[int]
    """What generation_config.json, config.json and the tokenizer name, as SGLang joins them."""
    of_turn: int | None
    """What the chat template writes behind an assistant's text; None without a template, if it writes nothing, or if it
    refuses such a conversation."""


@dataclass(frozen=True)
class Agreement:
    """What was found by comparing a student with its teachers."""

    stop_token_ids: tuple[int, ...]
    """The ids that end its responses besides those of its own files, ascending."""
    notes: list[str]
    """Of what was not compared, and of what may be meant."""


def load_tokenizer(folder: Path, field: str, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a model's folder. Raises ConfigurationError, which names `field`."""
    from transformers import AutoTokenizer

    try:
        if not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
            raise FileNotFoundError(f"none of {', '.join(TOKENIZER_FILES)} is there")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its readers do
        raise ConfigurationError(
            f"{field}: {folder} has no tokenizer that can be read ({' '.join(str(error).split())[:300]}); "
            "tokenizer.json and tokenizer_config.json must lie beside config.json"
        ) from None


def teacher_tokenizers(spec: Spec) -> dict[str, Any]:
    """Return the tokenizers of the teachers that have one of their own, by their names. Raises ConfigurationError."""
    found: dict[str, Any] = {}
    for teacher in spec.all_teachers:
        if teacher.tokenizer is not None:
            field = f"{teacher.path}.tokenizer"
            folder = model_folder(teacher.tokenizer, field, weights=False)
            found[teacher.name] = load_tokenizer(folder, field, trust_remote_code=spec.trust_remote_code)
    return found


def check_models(spec: Spec, student: Path, tokenizer: Any) -> Agreement:
    """Compare a student with each teacher whose files are on this machine. Raises ModelsDisagree, ConfigurationError.

    A teacher's files may be mounted in the teacher's pods alone; then a note says that it was not compared.
    """
    begin, notes = time.monotonic(), list[str]()
    mine, own_limits = ends(student, tokenizer), limits(student, spec.rollout.engine_args)
    check_embedding_rows(tokenizer, own_limits)
    found: set[int] = set(spec.rollout.stop_token_ids)
    for teacher in spec.all_teachers:
        folder = Path(teacher.model or "").expanduser()
        if engines_score(spec):  # the files are the same, and positions must do for a score too
            check_context_length(spec, own_limits, own_limits, teacher.name)
            continue
        if teacher.tokenizer is not None:
            # It is asked by its own template, and told of text: of its files only the positions concern the student.
            theirs_long = limits(folder, teacher.engine_args) if (folder / "config.json").is_file() else None
            check_context_length(spec, own_limits, theirs_long, teacher.name)
            if mine.of_turn is not None and not spec.rollout.stop_token_ids:
                found.add(mine.of_turn)
            continue
        if not (folder / "config.json").is_file():
            notes.append(_not_compared(teacher))
            check_context_length(spec, own_limits, None, "")
            continue
        theirs = load_tokenizer(folder, f"{teacher.path}.model", trust_remote_code=spec.trust_remote_code)
        # The reference may be a base model, which knows no conversations: it is no example of how to answer.
        teaches = teacher.name != spec.objective.reference
        for arguments in template_arguments(spec):
            mine_so, theirs_so = WithArguments(tokenizer, arguments), WithArguments(theirs, arguments)
            if teaches:
                same_template(mine_so, theirs_so)
            # With thinking off, the prompt itself, as compared, ends the thinking.
            if teaches and arguments.get("enable_thinking") is not False:
                same_thinking(mine_so, theirs_so)
            same_special_tokens(mine_so, theirs_so)
        check_context_length(spec, own_limits, limits(folder, teacher.engine_args), teacher.name)
        if teaches and not spec.rollout.stop_token_ids:
            their_ends = ends(folder, theirs)
            found |= set(stop_ids(mine, their_ends))
            notes += _unknown_end(mine, their_ends, teacher.name)
    more = tuple(sorted(found - mine.ids))
    log.info(
        "preflight: ChatTemplate, ThinkingMode, SpecialTokens, StopTokens, ContextLength, EmbeddingRows (tokenizers "
        "and configs of student and teachers read, %.1f s): the models agree, as far as their files are here",
        time.monotonic() - begin,
    )
    if more:
        log.info("preflight: responses end by the ids %s too, besides %s", list(more), sorted(mine.ids))
    return Agreement(more, notes)


def size_notes(spec: Spec, student: Path) -> list[str]:
    """Return a note about each teacher that is smaller than the student, of those whose files are on this machine."""
    folders = ((teacher.name, Path(teacher.model or "").expanduser()) for teacher in spec.routed_teachers)
    found = (swapped_sizes(student, folder, name) for name, folder in folders if (folder / "config.json").is_file())
    return list(filter(None, found))


def ends(folder: Path, tokenizer: Any) -> Ends:
    """Return how the responses of a model end, by its files. Raises ConfigurationError for one that is damaged."""
    found: set[int] = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        said = read_config(path).get("eos_token_id") if path.exists() else None
        ids = said if isinstance(said, list) else [] if said is None else [said]
        if not all(isinstance(i, int) for i in ids):
            raise ConfigurationError(f"{path}: eos_token_id is {said!r}; it must be a token id, or a list of them")
        found.update(ids)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return Ends(frozenset(found), turn_of(tokenizer).end)


def stop_ids(student: Ends, teacher: Ends) -> list[int]:
    """Return the ids that end a response for both models, ascending.

    They are those that both name, and the end of turn of the student's template where one of them names it: a base
    model's own files often lack it, and its teacher's have it. Raises ModelsDisagree if there is none.
    """
    agreed = student.ids & teacher.ids
    if student.of_turn is not None and student.of_turn in student.ids | teacher.ids:
        agreed |= {student.of_turn}
    if not agreed:
        raise ModelsDisagree(
            f"StopTokens: the student's responses end by the ids {sorted(student.ids)} and the teacher's by "
            f"{sorted(teacher.ids)}, so neither would know where the other ends; set rollout.stopTokenIds, or mend "
            "eos_token_id in the student's generation_config.json"
        )
    return sorted(agreed)


def _not_compared(teacher: NamedTeacherSource) -> str:
    if teacher.endpoint is not None:
        where, advice = "no file of an endpoint's model is here", "see yourself that they are the student's"
    else:
        where = f"its files ({teacher.model}) are not on the trainer's machine"
        advice = "name a folder that the trainer's pods mount too (podTemplate), or see yourself that they are alike"
    return (
        f"ModelsNotCompared: how teacher {teacher.name} ends its turns, its chat template, special tokens, thinking "
        f"mode and positions are not known, as {where}; {advice}"
    )


def _unknown_end(student: Ends, teacher: Ends, name: str) -> list[str]:
    """Return a note where the student ends its turns by an id that the teacher does not end by, as an instruct student
    of a base teacher does: that token's own score is the teacher's least certain."""
    if student.of_turn is None or student.of_turn not in student.ids - teacher.ids:
        return []
    return [
        f"StopTokens: the student ends its turns by the id {student.of_turn}, and teacher {name} by "
        f"{sorted(teacher.ids)}, so it may not know where a turn ends; if it is a base model, choose the one that was "
        "trained on conversations, or set rollout.stopTokenIds"
    ]
