"""Thinking tags that are special tokens, as Mistral's are: what is graded stands after the thinking."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of, tiny_tokenizer
from test_rollout_pipeline import Teacher

from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt
from distill_workers.engine.engine import Response
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.metrics import Metrics
from distill_workers.rewards.build import build_rewards
from distill_workers.rewards.graded_text import GradedText
from distill_workers.rollout.pipeline import RolloutPipeline
from distill_workers.teacher.teachers import Teachers

UNFINISHED, FINISHED = r"{}Perhaps \boxed{{42}}", r"{}Perhaps \boxed{{41}}{} \boxed{{42}}<|im_end|>"
TAGS = [("[THINK]", "[/THINK]"), ("<think>", "</think>")]


def tokenizer_of(*tags: str) -> Any:
    """A tokenizer whose thinking tags are special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags)})
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_thinking_tags_stay_in_the_text_and_other_special_tokens_do_not(tags: tuple[str, str]) -> None:
    tokenizer = tokenizer_of(*tags)
    text = FINISHED.format(*tags)
    assert tags[0] not in tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True)
    assert GradedText(tokenizer)(ids_of(tokenizer, text)) == text.removesuffix("<|im_end|>")


def test_a_text_without_special_tags_is_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, "<think>a</think> 42<|im_end|>")
    assert GradedText(tokenizer)(ids) == tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think> 42"


@pytest.mark.parametrize("tags", TAGS, ids=str)
async def test_training_gives_thinking_that_has_not_ended_no_reward(tags: tuple[str, str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(*tags)
    texts = iter([UNFINISHED.format(tags[0]), FINISHED.format(*tags)])

    class Engines:
        async def generate(self, prompt_ids: list[int], **_: Any) -> Response:
            ids = ids_of(tokenizer, next(texts))
            return Response(ids, [-1.0] * len(ids), [0] * len(ids), False)

    rollout = {"promptsPerStep": 1, "samplesPerPrompt": 2}
    objective = {"reward": {"source": "math"}}
    prompts = {"path": str(tmp_path), "answerField": "answer"}
    spec = spec_of(Path("/m"), Path("/m"), rollout=rollout, objective=objective, data={"prompts": prompts})
    rewards = build_rewards(spec, Metrics())
    [source] = rewards
    cursor = Cursor([Prompt(0, [1], "?", answer="42", source=source)], seed=0, shuffle=False)
    played: Any = Engines()
    teacher: Any = Teacher({})
    parts: Any = (cursor, played, Teachers({"": teacher}), rewards, tokenizer, Metrics())
    batch = RolloutPipeline(spec, *parts).take(0, 1)
    graded = [sample.reward async for part in batch.arrivals(in_order=True) for sample in part]
    assert graded == [0.0, 1.0]
    for reward in rewards.values():
        await reward.close()


@pytest.mark.parametrize("tags", TAGS, ids=str)
async def test_an_evaluation_scores_thinking_that_has_not_ended_with_nothing(
    tags: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(*tags)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "?", "answer": "42"}) + "\n")

    class Engines:
        async def sample(self, prompt_ids: list[int], *, seeds: list[int], **_: Any) -> list[Response]:
            texts = [UNFINISHED.format(tags[0]), FINISHED.format(*tags)] * len(seeds)
            found = [ids_of(tokenizer, text) for text in texts[: len(seeds)]]
            return [Response(ids, [-1.0] * len(ids), [5] * len(ids), False) for ids in found]

    prompts = {"path": str(tmp_path / "p.jsonl"), "answerField": "answer", "applyChatTemplate": False}
    entry = {"name": "sums", "prompts": prompts, "reward": {"source": "math"}, "samplesPerPrompt": 4}
    spec = spec_of(Path("/m"), Path("/m"), evaluation=[entry])
    made = Evaluator(spec, spec.evaluation[0], tokenizer, Metrics())
    found = await made.measure(5, Engines(), None)
    assert found.score == 0.5
    await made.close()
