"""Where prompts come from."""

from typing import Annotated, Any

from pydantic import Field

from distill_api.base import Model, Path, ShortText, Text, preserve_unknown
from distill_api.rules import Rule


class ReasoningGym(Model):
    """Prompts made by reasoning-gym, with a seed, instead of read from a file."""

    task: ShortText = Field(description="Name of the task, such as chain_sum.")
    size: Annotated[int, Field(ge=1, le=10_000_000)] = Field(1000, description="Number of prompts.")
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = Field(0, description="Seed of the generator.")
    options: Annotated[dict[str, Any], Field(max_length=32, json_schema_extra=preserve_unknown())] = Field(
        default_factory=dict, description="Options of the task, such as max_terms."
    )


class Prompts(Model):
    """Where prompts come from: exactly one of path and reasoningGym."""

    rules = (
        Rule(
            "set exactly one of path and reasoningGym",
            "has(self.path) != has(self.reasoningGym)",
            lambda prompts: (prompts.path is None) != (prompts.reasoning_gym is None),
        ),
    )
    path: Path | None = Field(None, description="A JSONL file, or a folder of them, on a mounted volume.")
    reasoning_gym: ReasoningGym | None = Field(None, description="A generated task instead of a file.")
    prompt_field: ShortText = Field(
        "prompt", description="Field of a line that holds the prompt: a string, or a list of chat messages."
    )
    answer_field: ShortText | None = Field(None, description="Field of a line that holds the reference answer.")
    apply_chat_template: bool = Field(True, description="Put the prompt through the student's chat template.")
    system_prompt: Text | None = Field(None, description="System message, when the chat template is applied.")
