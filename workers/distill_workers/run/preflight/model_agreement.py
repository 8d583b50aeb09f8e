"""What a student's files and its teacher's must agree on, and how a response ends: read before any server is asked.

A student that ends its turn by a token which neither its engine nor its teacher takes for an end writes on to its full
length, and is taught what no teacher ever says (ms-swift#9526). Two chat templates that differ by a space or a system
prompt cost the teacher tenths of a nat on every token (tinker's reports). Both look like training.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_workers.data.rendering import WithArguments, template_arguments
from distill_workers.failures import ConfigurationError, PreflightFailed

log = logging.getLogger(__name__)

ROUND = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
]
"""A conversation in which templates that differ do so: a system prompt, white space, a second turn."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
"""One of these holds a vocabulary. Without, transformers makes up a tokenizer of no tokens for some architectures."""
MARK = "\u2603"
"""A text of an assistant that no template writes by itself."""


class ModelsDisagree(PreflightFailed):
    """Raised when student and teacher differ in what they must share; the sentence has both values."""


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
    mine = ends(student, tokenizer)
    found: set[int] = set(spec.rollout.stop_token_ids)
    for teacher in spec.all_teachers:
        folder = Path(teacher.model or "").expanduser()
        if not (folder / "config.json").is_file():
            log.info(
                "preflight: chat template and ends of teacher %s not compared: its files are not here", teacher.name
            )
            continue
        theirs = load_tokenizer(folder, f"{teacher.path}.model", trust_remote_code=spec.trust_remote_code)
        for arguments in template_arguments(spec):
            same_template(WithArguments(tokenizer, arguments), WithArguments(theirs, arguments))
        if not spec.rollout.stop_token_ids:
            found |= set(stop_ids(mine, ends(folder, theirs)))
    more = tuple(sorted(found - mine.ids))
    if more:
        log.info("preflight: responses end by the ids %s too, besides %s", list(more), sorted(mine.ids))
    return more


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


def same_template(student: Any, teacher: Any) -> None:
    """Compare two tokenizers' renderings of a conversation. Raises ModelsDisagree with the first difference."""
    mine, theirs = _rendered(student), _rendered(teacher)
    if mine is None or mine == theirs:
        return  # without a template of the student's no prompt is a conversation
    if theirs is None:
        raise ModelsDisagree(
            "ChatTemplate: the student has a chat template and the teacher has none, so it has never seen such "
            "prompts; choose a teacher that was trained on conversations, or set prompts.applyChatTemplate: false and "
            "remove the student's template"
        )
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    raise ModelsDisagree(
        f"ChatTemplate: a conversation is ...{mine[max(at - 20, 0) : at + 20]!r}... to the student and "
        f"...{theirs[max(at - 20, 0) : at + 20]!r}... to the teacher; both must see one prompt: give the student the "
        "teacher's chat template"
    )


def _rendered(tokenizer: Any) -> str | None:
    """A conversation as a prompt; without its system message for a template that refuses one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    for messages in (ROUND, ROUND[1:]):
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template raises whatever it likes
            continue
    return None


def _end_of_turn(tokenizer: Any) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    behind = tokenizer.encode(text.rpartition(MARK)[2], add_special_tokens=False)
    # White space behind it is the template's own business; what ends a turn is a special token.
    return next((i for i in behind if i in tokenizer.all_special_ids), None)
