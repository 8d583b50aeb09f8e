"""Conversations of a real engine with an environment: its log-probs are the model's own over all turns."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel, hf_logprobs
from test_environment_messages import RESULT, TOOL
from test_episodes import PROMPT, TOKENIZER, Played, spec_of

from distill_api.spec.job_spec import Prompts
from distill_workers.engine.request import Request, Response
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.user_environment import Answer
from distill_workers.rollout.conversations.environment_episodes import EnvironmentEpisodes

pytestmark = pytest.mark.asyncio(loop_scope="session")
TURNS = 4
ENDS = tuple(range(100, 200))
"""Ids that end a turn: so many that a model with random weights ends each within a few tokens."""


class OneEngine:
    """Stands for the pool of a job with one engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def generate(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seed: int, **_: Any
    ) -> Response:
        request = Request(prompt_ids, seed, max_new_tokens, temperature, top_p, ENDS)
        [response] = await self._engine.generate([request])
        assert isinstance(response, Response)
        return response


async def test_the_engines_log_probs_of_four_turns_are_the_models_own(
    engine: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    await engine.load_folder(str(tiny_model(0)), 0, 60)
    spec = spec_of(tmp_path, environment={"maxTurns": TURNS}, maxResponseTokens=1500)
    renderer = ConversationRenderer(Prompts(path="/p"), TOKENIZER, [TOOL])
    played: Any = (OneEngine(engine), Played(lambda turn: Answer([RESULT])))
    [sample] = await EnvironmentEpisodes(spec, *played, {"sums": renderer}).samples(PROMPT, 0, seed=7)
    assert len(sample.turns) == TURNS and not sample.truncated
    assert sample.loss_mask is not None and {True, False} == set(sample.loss_mask)
    expected = hf_logprobs(tiny_model(0), sample.prompt_ids, sample.response_ids)
    assert sample.trained(sample.engine_logprobs) == pytest.approx(sample.trained(expected), abs=1e-3)
