"""`distill grade`: how responses are graded, before a run grades them so."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Reward as RewardSpec
from distill_api.spec.job_spec import RewardSource, Spec
from distill_workers.data.prompts import load_data, load_prompts
from distill_workers.data.routing import Route
from distill_workers.data.rows import path_rows
from distill_workers.data.sample import Prompt
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.model_folder import model_folder
from distill_workers.rewards.base import Reward, RewardError
from distill_workers.rewards.build import build_reward, build_rewards
from distill_workers.run.preflight.model_agreement import load_tokenizer

OWN = ""
"""The source of a prompt that stands in the row itself, and the key of the reward for it."""


@dataclass(frozen=True)
class Answered:
    """A response and the prompt that it answers."""

    row: int
    """Number of the row in the file, from 1."""
    prompt: Prompt
    response: str


def read_rows(path: Path, load_data: Callable[[], Sequence[Prompt]]) -> list[Answered]:
    """Return the rows of a file, each with `response`, and `reference` (or `answer`) or a prompt of a job's data.

    A row without a reference answers the prompt of its `index`, or else the next one; the data is loaded for the first
    such row. Raises ConfigurationError with the row.
    """
    data: dict[int, Prompt] | None = None
    order: Iterator[Prompt] = iter(())
    found = []
    for number, (where, row) in enumerate(path_rows(str(path)), start=1):
        if not isinstance(row.get("response"), str):
            raise ConfigurationError(f"{where}: must have response and reference, as texts")
        if (prompt := _own_prompt(row, number)) is None:
            if data is None:
                data = {prompt.index: prompt for prompt in load_data()}
                order = iter(data.values())
            prompt = _prompt_of(row, data, order, where)
        found.append(Answered(number, prompt, row["response"]))
    return found


def data_of(spec: Spec, evaluation: str | None) -> list[Prompt]:
    """Return the training prompts of a job, or those of one of its evaluations. Raises Failure."""
    folder = model_folder(spec.student.model, "spec.student.model")
    tokenizer = load_tokenizer(folder, "spec.student.model", trust_remote_code=spec.trust_remote_code)
    if evaluation is None:
        return load_data(spec, tokenizer, Metrics())
    part = next(e for e in spec.evaluation if e.name == evaluation)
    limit = spec.rollout.max_prompt_tokens
    return load_prompts(part.prompts, tokenizer, limit, part.max_prompts, Route.of(spec, part))[0]


def rewards_of(spec: Spec, evaluation: str | None) -> dict[str, Reward]:
    """Return the rewards of a job by the source of the prompt; by OWN, that of rows with their own reference."""
    if evaluation is not None:
        chosen = next(e for e in spec.evaluation if e.name == evaluation).reward
        return only(chosen) if chosen.source is not RewardSource.NONE else {}
    own = {} if spec.objective.reward.source is RewardSource.NONE else only(spec.objective.reward)
    return own | build_rewards(spec, Metrics())


def only(reward: RewardSpec) -> dict[str, Reward]:
    """Return a reward for the rows with their own reference. Raises ConfigurationError."""
    return {OWN: build_reward(reward, Metrics())}


async def grade(rows: Sequence[Answered], rewards: Mapping[str, Reward]) -> list[dict[str, Any]]:
    """Return of each row its number, reference, score, what was extracted and from where; close the rewards.

    The score is None for a response that could not be graded. Raises ConfigurationError for a source without a reward.
    """

    async def one(row: Answered) -> dict[str, Any]:
        found = {"row": row.row, "reference": row.prompt.answer or ""}
        try:
            return found | dataclasses.asdict(await rewards[row.prompt.source].grade(row.prompt, row.response))
        except RewardError as error:
            return found | {"score": None, "extracted": "", "origin": str(error)}

    try:
        if without := sorted({row.prompt.source for row in rows} - rewards.keys()):
            who = f"the source {without[0]} of the job" if without[0] else "the job"
            raise ConfigurationError(
                f"{who} has no reward; set objective.reward, or grade as one of the job's evaluations by --evaluation"
            )
        return list(await asyncio.gather(*map(one, rows)))
    finally:
        for reward in {id(r): r for r in rewards.values()}.values():
            await reward.close()


def _own_prompt(row: Mapping[str, Any], number: int) -> Prompt | None:
    reference = row.get("reference", row.get("answer"))
    if reference is None:
        return None
    metadata = row.get("metadata")
    return Prompt(
        number, [], str(row.get("prompt", "")), str(reference), metadata if isinstance(metadata, dict) else {}
    )


def _prompt_of(row: Mapping[str, Any], data: Mapping[int, Prompt], order: Iterator[Prompt], where: str) -> Prompt:
    if "index" in row:
        if prompt := data.get(row["index"]) if isinstance(row["index"], int) else None:
            return prompt
        raise ConfigurationError(f"{where}: index {row['index']!r} is no prompt of the job; the first is 0")
    if prompt := next(order, None):
        return prompt
    why = f"the job has {len(data)} prompts" if data else "name the job that has it with -f"
    raise ConfigurationError(f"{where}: has no reference; {why}")
