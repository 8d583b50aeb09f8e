"""Whether both models see one prompt: chat templates by their renderings, thinking modes, and special tokens."""

from typing import Any

from distill_workers.run.preflight.check import ModelsDisagree

ROUND = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
]
"""A conversation in which templates that differ do so: a system prompt, white space, a second turn."""
CONVERSATIONS = (ROUND, ROUND[1:], ROUND[1:2])
"""What is left of it for templates that refuse a system message, or more than one question. The first is taken that the
student's template renders."""


def same_template(student: Any, teacher: Any) -> None:
    """Compare two tokenizers' renderings of a conversation. Raises ModelsDisagree with the first difference."""
    conversation = next((c for c in CONVERSATIONS if _rendered(student, c) is not None), None)
    if conversation is None:
        return  # without a template of the student's no prompt is a conversation
    mine, theirs = _rendered(student, conversation), _rendered(teacher, conversation)
    if theirs is None and getattr(teacher, "chat_template", None):
        raise ModelsDisagree(
            f"ChatTemplate: the teacher's chat template refuses a conversation (roles "
            f"{', '.join(m['role'] for m in conversation)}) that the student's renders; both must see one prompt: give "
            "the student the teacher's chat template"
        )
    if mine is None or theirs is None:
        raise ModelsDisagree(
            "ChatTemplate: the student has a chat template and the teacher has none, so it has never seen such "
            "prompts; choose a teacher that was trained on conversations, or set prompts.applyChatTemplate: false and "
            "remove the student's template"
        )
    if mine != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
        )
        raise ModelsDisagree(
            f"ChatTemplate: a conversation is ...{mine[max(at - 20, 0) : at + 20]!r}... to the student and "
            f"...{theirs[max(at - 20, 0) : at + 20]!r}... to the teacher; both must see one prompt: give the student "
            "the teacher's chat template"
        )


def same_thinking(student: Any, teacher: Any) -> None:
    """Compare whether the templates can turn thinking off. Raises ModelsDisagree.

    Qwen3's hybrid models and its -Instruct-2507 render one prompt; the former think in answer to it, the latter never.
    """
    mine, theirs = _takes_enable_thinking(student), _takes_enable_thinking(teacher)
    if mine is None or theirs is None or mine == theirs:
        return
    modes = {True: "takes enable_thinking, so it thinks unless told not to", False: "has one mode alone"}
    raise ModelsDisagree(
        f"ThinkingMode: the student's chat template {modes[mine]}, and the teacher's {modes[theirs]}; they would "
        "answer one prompt in two ways: choose models of one mode, or give the student the teacher's chat template"
    )


def same_special_tokens(student: Any, teacher: Any) -> None:
    """Compare the ids of a rendered conversation, or of a plain text without one. Raises ModelsDisagree.

    A token that one model's files lack is to it a row of pieces, which it has never seen as the end of a turn.
    """
    text = rendered(student)
    if text is None:
        mine, theirs = (list(t("2")["input_ids"]) for t in (student, teacher))
    else:
        mine, theirs = (list(t(text, add_special_tokens=False)["input_ids"]) for t in (student, teacher))
    if mine == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    where = "a rendered conversation" if text is not None else "a plain text"
    raise ModelsDisagree(
        f"SpecialTokens: token {at} of {where} is {_named(student, mine, at)} to the student and "
        f"{_named(teacher, theirs, at)} to the teacher; both must have the same special tokens: give the student the "
        "teacher's tokenizer files, or choose models of one family"
    )


def rendered(tokenizer: Any, **arguments: Any) -> str | None:
    """Return the first of CONVERSATIONS that a template renders, as a prompt; None without a template."""
    found = (_rendered(tokenizer, conversation, **arguments) for conversation in CONVERSATIONS)
    return next((text for text in found if text is not None), None)


def _rendered(tokenizer: Any, conversation: list[dict[str, str]], **arguments: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    options = {"tokenize": False, "add_generation_prompt": True, **arguments}
    try:
        return str(tokenizer.apply_chat_template(conversation, **options))
    except Exception:  # a template raises whatever it likes
        return None


def _takes_enable_thinking(tokenizer: Any) -> bool | None:
    without = rendered(tokenizer, enable_thinking=False)
    return None if without is None else without != rendered(tokenizer, enable_thinking=True)


def _named(tokenizer: Any, ids: list[int], at: int) -> str:
    return f"{tokenizer.decode(ids[at : at + 1])!r} (id {ids[at]})" if at < len(ids) else "none"
