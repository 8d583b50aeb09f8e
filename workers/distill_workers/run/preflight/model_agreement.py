"""What a student's files and its teacher's must agree on, and how a response ends: read before any server is asked.

A student that ends its turn by a token which neither its engine nor its teacher takes for an end writes on to its full
length, and is taught what no teacher ever says (ms-swift#9526). Two chat templates that differ by a space or a system
prompt cost the teacher tenths of a nat on every token (tinker's reports). Both look like training.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.data.rendering import WithArguments, template_arguments
from distill_workers.failures import ConfigurationError
from distill_workers.run.preflight.chat_template import same_special_tokens, same_template, same_thinking
from distill_workers.run.preflight.check import ModelsDisagree
from distill_workers.run.preflight.model_limits import (
    check_context_length,
    check_embedding_rows,
    limits,
    swapped_sizes,
)

__all__ = [
    "Ends",
    "ModelsDisagree",
    "check_models",
    "ends",
    "load_tokenizer",
    "same_template",
    "size_notes",
    "stop_ids",
]

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
"""One of these holds a vocabulary. Without, transformers makes up a tokenizer of no tokens for some architectures."""
MARK = "\u2603"
"""A text of an assistant that no template writes by itself."""


@dataclass(frozen=True)
class Ends:
    """The token ids by which a model's responses end."""

    ids: frozenset[int]
    """What generation_config.json, config.json and the tokenizer name, as SGLang joins them."""
    of_turn: int | None
    """What the chat template writes behind an assistant's text; None without a template, or if it writes nothing."""


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


def check_models(spec: Spec, student: Path, tokenizer: Any) -> tuple[int, ...]:
    """Compare a student with each teacher whose files are on this machine, and return the ids that end its responses
    besides its own. Raises ModelsDisagree.

    A teacher's files may be mounted in the teacher's pods alone; then the log says that it was not compared.
    """
    begin = time.monotonic()
    mine, own_limits = ends(student, tokenizer), limits(student, spec.rollout.engine_args)
    check_embedding_rows(tokenizer, own_limits)
    found: set[int] = set(spec.rollout.stop_token_ids)
    for teacher in spec.all_teachers:
        folder = Path(teacher.model or "").expanduser()
        if not (folder / "config.json").is_file():
            log.info(
                "preflight: chat template, ends and context length of teacher %s not compared: its files are not here",
                teacher.name,
            )
            check_context_length(spec, own_limits, None, "")
            continue
        theirs = load_tokenizer(folder, f"{teacher.path}.model", trust_remote_code=spec.trust_remote_code)
        for arguments in template_arguments(spec):
            mine_so, theirs_so = WithArguments(tokenizer, arguments), WithArguments(theirs, arguments)
            same_template(mine_so, theirs_so)
            if arguments.get("enable_thinking") is not False:  # else the prompt itself, as compared, ends the thinking
                same_thinking(mine_so, theirs_so)
            same_special_tokens(mine_so, theirs_so)
        check_context_length(spec, own_limits, limits(folder, teacher.engine_args), teacher.name)
        if not spec.rollout.stop_token_ids:
            found |= set(stop_ids(mine, ends(folder, theirs)))
    more = tuple(sorted(found - mine.ids))
    log.info(
        "preflight: ChatTemplate, ThinkingMode, SpecialTokens, StopTokens, ContextLength, EmbeddingRows (tokenizers "
        "and configs of student and teachers read, %.1f s): the models agree",
        time.monotonic() - begin,
    )
    if more:
        log.info("preflight: responses end by the ids %s too, besides %s", list(more), sorted(mine.ids))
    return more


def size_notes(spec: Spec, student: Path) -> list[str]:
    """Return a note about each teacher that is smaller than the student, of those whose files are on this machine."""
    folders = ((teacher.name, Path(teacher.model or "").expanduser()) for teacher in spec.all_teachers)
    found = (swapped_sizes(student, folder, name) for name, folder in folders if (folder / "config.json").is_file())
    return list(filter(None, found))


def ends(folder: Path, tokenizer: Any) -> Ends:
    """Return how the responses of a model end, by its files."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        found |= {said} if isinstance(said, int) else set(said or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return Ends(frozenset(found), _end_of_turn(tokenizer))


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


def _end_of_turn(tokenizer: Any) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    behind = tokenizer.encode(text.rpartition(MARK)[2], add_special_tokens=False)
    # White space behind it is the template's own business; what ends a turn is a special token.
    return next((i for i in behind if i in tokenizer.all_special_ids), None)
