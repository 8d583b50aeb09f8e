"""Where prompts come from."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model, Path, ShortText, Text, preserve_unknown
from distill_api.rules import Rule, matching

HubId = Annotated[
    str,
    Field(max_length=253),
    matching(
        r"^[A-Za-z0-9][-._A-Za-z0-9]*(/[A-Za-z0-9][-._A-Za-z0-9]*)?$",
        "must be a name of the Hugging Face hub, such as openai/gsm8k; a file or a folder goes into path",
    ),
]


class ReasoningGym(Model):
    """Prompts made by reasoning-gym, with a seed, instead of read from a file."""

    task: ShortText = Field(description="Name of the task, such as chain_sum.")
    size: Annotated[int, Field(ge=1, le=10_000_000)] = Field(1000, description="Number of prompts.")
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = Field(0, description="Seed of the generator.")
    options: Annotated[dict[str, Any], Field(max_length=32, json_schema_extra=preserve_unknown())] = Field(
        default_factory=dict, description="Options of the task, such as max_terms."
    )


class Dataset(Model):
    """A data set of the Hugging Face hub. Code that its repository brings is never run."""

    name: HubId = Field(description="Its name on the hub, such as openai/gsm8k.")
    config: ShortText | None = Field(None, description="Its configuration (subset), where it has several.")
    split: ShortText = Field(description="Its split, such as train, or a part of one, such as test[:500].")
    revision: ShortText | None = Field(None, description="Branch, tag or commit; the newest if absent.")


class Prompts(Model):
    """Where prompts come from: exactly one of path, dataset and reasoningGym."""

    rules = (
        Rule(
            "set exactly one of path, dataset and reasoningGym",
            "[has(self.path), has(self.dataset), has(self.reasoningGym)].filter(given, given).size() == 1",
            lambda p: [p.path, p.dataset, p.reasoning_gym].count(None) == 2,
        ),
        Rule(
            "responseField goes with path or dataset: reasoningGym makes no responses",
            "!has(self.responseField) || !has(self.reasoningGym)",
            lambda p: p.response_field is None or p.reasoning_gym is None,
        ),
        Rule(
            "teacherField goes with path or dataset: reasoningGym names no teachers",
            "!has(self.teacherField) || !has(self.reasoningGym)",
            lambda p: p.teacher_field is None or p.reasoning_gym is None,
        ),
    )
    path: Path | None = Field(
        None,
        description="On a mounted volume: a JSONL or Parquet file, a folder of such files, several of them by a * in "
        "the last part (data/train-*.parquet), or a folder that datasets' save_to_disk wrote.",
    )
    dataset: Dataset | None = Field(None, description="A data set of the Hugging Face hub instead of a file.")
    reasoning_gym: ReasoningGym | None = Field(None, description="A generated task instead of a file.")
    prompt_field: ShortText = Field(
        "prompt", description="Field of a row that holds the prompt: a string, or a list of chat messages."
    )
    answer_field: ShortText | None = Field(None, description="Field of a row that holds the reference answer.")
    response_field: ShortText | None = Field(
        None, description="Field of a row that holds a response to learn from beside the student's own, as text."
    )
    teacher_field: ShortText | None = Field(
        None, description="Field of a row that names the one of spec.teachers which scores responses to its prompt."
    )
    apply_chat_template: bool = Field(True, description="Put the prompt through the student's chat template.")
    system_prompt: Text | None = Field(None, description="System message, when the chat template is applied.")
