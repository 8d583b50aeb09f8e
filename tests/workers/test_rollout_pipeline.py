"""The pipeline's own decisions, with played engines and teacher: what is made again, left out, counted."""

import asyncio
import dataclasses
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import arithmetic

from distill_api.job import parse_job
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.engine import EngineRefused, Response
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rewards.base import RewardError
from distill_workers.rollout.batch import Batch
from distill_workers.rollout.pipeline import TRIES, RolloutPipeline, sample_seed
from distill_workers.teacher.protocol import BadScore, Scores, WrittenResponse
from distill_workers.teacher.teachers import Teachers


class Engines:
    """Answers two tokens a seed; the prompts in `refused` are refused."""

    def __init__(self, refused: set[int]) -> None:
        self.refused, self.seeds = refused, list[int]()

    async def generate(self, prompt_ids: list[int], *, seed: int, **_: Any) -> Response:
        self.seeds.append(seed)
        if prompt_ids[0] in self.refused:
            raise EngineRefused("too long")
        return Response([1, 2], [-0.5, -0.5], [0, 0], False)


class Teacher:
    """Fails the first scores of a prompt as often as `failures` says."""

    def __init__(self, failures: dict[int, int]) -> None:
        self.failures, self.prefetched = failures, list[list[int]]()

    async def prefetch(self, prompt_ids: list[int]) -> None:
        self.prefetched.append(prompt_ids)

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        if self.failures.get(prompt_ids[0], 0) > 0:
            self.failures[prompt_ids[0]] -= 1
            raise BadScore("ids", "other ids came back")
        return Scores([-1.0, -1.0], None, None)


class Tokenizer:
    """A token for each letter."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    yield Metrics()


def pipeline(
    tmp_path: Path,
    metrics: Metrics,
    engines: Engines,
    teacher: Teacher,
    rewards: Any = None,
    objective: Any = None,
    data: Any = None,
    reference: Teacher | None = None,
    privileged: bool = False,
    phases: Any = (),
    **rollout: Any,
) -> RolloutPipeline:
    changes = {"promptsPerStep": 4, "samplesPerPrompt": 2, **rollout}
    several: dict[str, Any] = {"phases": list(phases)}
    if reference is not None:
        several |= {"teacher": None, "teachers": [{"name": n, "model": f"/{n}"} for n in ("expert", "base")]}
        data = {"defaultTeacher": "expert"}
    job = arithmetic(tmp_path, "pipeline", rollout=changes, objective=objective or {}, data=data or {}, **several)
    spec = parse_job(job).spec
    hint = [99] if privileged else None
    prompts = [Prompt(i, [i], str(i), source="sums", response=f"={i}", privileged_ids=hint) for i in range(8)]
    cursor = Cursor(prompts, seed=0, shuffle=False)
    played: Any = {"": teacher} if reference is None else {"": teacher, "base": reference}
    parts: Any = (engines, Teachers(played))
    return RolloutPipeline(spec, cursor, *parts, rewards or {}, Tokenizer(), metrics)


def failed(metrics: Metrics) -> dict[str, float]:
    lines = [x for x in metrics.text().decode().splitlines() if x.startswith("distill_samples_failed_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


async def samples_of(batch: Batch) -> list[Sample]:
    return [sample async for part in batch.arrivals(in_order=True) for sample in part]


async def test_a_bad_score_draws_that_response_again_with_another_seed(tmp_path: Path, metrics: Metrics) -> None:
    engines = Engines(set())
    rollouts = pipeline(tmp_path, metrics, engines, Teacher({2: 1}))
    samples = await samples_of(rollouts.take(0, 1))
    assert [s.prompt_index for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(engines.seeds) == len(set(engines.seeds)) == 9
    assert failed(metrics) == {"ids": 1.0}


async def test_copies_of_one_prompt_in_a_step_are_answered_differently(tmp_path: Path, metrics: Metrics) -> None:
    """More prompts a step than the data has: each is there twice."""
    engines = Engines(set())
    rollouts = pipeline(tmp_path, metrics, engines, Teacher({}), promptsPerStep=16)
    assert len(await samples_of(rollouts.take(0, 1))) == 32
    assert len(set(engines.seeds)) == 32


async def test_what_an_engine_refuses_is_left_out_and_the_step_goes_on(tmp_path: Path, metrics: Metrics) -> None:
    rollouts = pipeline(tmp_path, metrics, Engines({1}), Teacher({}))
    samples = await samples_of(rollouts.take(0, 1))
    assert [s.prompt_index for s in samples] == [0, 0, 2, 2, 3, 3]
    assert failed(metrics) == {"engine": 2.0 * TRIES}


class Counting:
    """The first reward is `begin`, the next 1 more, and so on; number `fails` fails."""

    def __init__(self, fails: int = 0, begin: int = 1) -> None:
        self.fails, self.begin, self.calls = fails, begin, 0

    async def score(self, prompt: Prompt, response: str) -> float:
        self.calls += 1
        if self.calls == self.fails:
            raise RewardError("division by zero")
        return float(self.calls - 1 + self.begin)


async def test_a_sample_has_its_advantage_without_a_coefficient(tmp_path: Path, metrics: Metrics) -> None:
    objective = {"reward": {"source": "exact-match"}, "rewardCoefficient": 5, "advantage": "leave-one-out"}
    rewards = {"sums": Counting()}
    rollouts = pipeline(tmp_path, metrics, Engines(set()), Teacher({}), rewards, objective, promptsPerStep=1)
    samples = await samples_of(rollouts.take(0, 1))
    assert [(s.reward, s.advantage) for s in samples] == [(1.0, -1.0), (2.0, 1.0)]


class Changing(Teacher):
    """Gives each response other scores."""

    calls = 0

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        self.calls += 1
        return Scores([-0.1 * self.calls, -0.6], None, None)


async def test_a_sample_has_the_mean_divergence_of_the_others_to_its_prompt(tmp_path: Path, metrics: Metrics) -> None:
    objective = {"support": "sampled-token", "topK": 16, "baseline": "leave-one-out", "advantageClip": 0.5}
    rollouts = pipeline(tmp_path, metrics, Engines(set()), Changing({}), objective=objective, samplesPerPrompt=3)
    samples = await samples_of(rollouts.take(0, 1))
    assert len(samples) == 12
    for sample in samples:
        group = [s for s in samples if s.prompt_index == sample.prompt_index]
        assert sample.baseline == pytest.approx(mean_of_others(sample, group)) and sample.reward is None
    assert len({s.baseline for s in samples}) > 1


def mean_of_others(sample: Sample, others: list[Sample]) -> float:
    """The mean divergence over the tokens of all but one, each clipped to half a nat."""
    gaps = [
        e - t for s in others if s is not sample for e, t in zip(s.engine_logprobs, s.teacher_logprobs, strict=True)
    ]
    return sum(max(-0.5, min(0.5, gap)) for gap in gaps) / len(gaps)


@pytest.mark.parametrize("in_order", [True, False])
async def test_a_sample_has_the_mean_divergence_of_the_others_of_its_step(
    in_order: bool, tmp_path: Path, metrics: Metrics
) -> None:
    """Also where each prompt is answered once; all of them arrive together, since the last is in the mean of each."""
    objective = {"support": "sampled-token", "topK": 16, "baseline": "batch-mean", "advantageClip": 0.5}
    rollouts = pipeline(tmp_path, metrics, Engines({2}), Changing({}), objective=objective, samplesPerPrompt=1)
    arrived = [part async for part in rollouts.take(0, 1).arrivals(in_order=in_order)]
    assert [len(part) for part in arrived] == [3], "what failed is in no mean"
    assert [s.baseline for s in arrived[0]] == pytest.approx([mean_of_others(s, arrived[0]) for s in arrived[0]])
    assert len({s.baseline for s in arrived[0]}) == 3


async def test_a_step_of_which_all_failed_has_no_mean(tmp_path: Path, metrics: Metrics) -> None:
    objective = {"support": "sampled-token", "topK": 16, "baseline": "batch-mean"}
    rollouts = pipeline(tmp_path, metrics, Engines({0, 1, 2, 3}), Teacher({}), objective=objective)
    assert await samples_of(rollouts.take(0, 1)) == []


class Reference(Teacher):
    """Remembers what it was given, and that no top-k was wanted."""

    def __init__(self, failures: dict[int, int]) -> None:
        super().__init__(failures)
        self.given = list[tuple[list[int], list[int], int | None]]()

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        self.given.append((prompt_ids, response_ids, top_k))
        await super().score(prompt_ids, response_ids, top_k)
        return Scores([-2.0, -3.0], None, None)


EXTRAPOLATED = {"support": "sampled-token", "topK": 16, "reference": "base", "extrapolation": 1.5}


async def test_the_reference_scores_every_sample_by_the_students_own_prompt(tmp_path: Path, metrics: Metrics) -> None:
    teacher, reference = Reference({}), Reference({})
    rollouts = pipeline(
        tmp_path, metrics, Engines(set()), teacher, objective=EXTRAPOLATED, reference=reference, privileged=True
    )
    samples = await samples_of(rollouts.take(0, 1))
    assert [s.reference_logprobs for s in samples] == [[-2.0, -3.0]] * 8
    assert sorted(reference.given) == sorted(([n], [1, 2], None) for n in (0, 0, 1, 1, 2, 2, 3, 3))
    assert {tuple(prompt) for prompt, _, _ in teacher.given} == {(99,)}
    assert sorted(reference.prefetched) == [[0], [1], [2], [3]] and teacher.prefetched == [[99]] * 4
    assert {s.teacher for s in samples} == {""}, "it teaches nobody"


async def test_a_reference_that_scores_badly_has_that_response_drawn_again(tmp_path: Path, metrics: Metrics) -> None:
    rollouts = pipeline(
        tmp_path, metrics, Engines(set()), Teacher({}), objective=EXTRAPOLATED, reference=Reference({2: 1})
    )
    samples = await samples_of(rollouts.take(0, 1))
    assert len(samples) == 8 and failed(metrics) == {"ids": 1.0}


async def test_the_mean_of_the_others_is_of_the_extrapolated_divergence(tmp_path: Path, metrics: Metrics) -> None:
    """Each token has -0.5 nats of the engine, -1 of the teacher, and -2 or -3 of the reference."""
    objective = {**EXTRAPOLATED, "baseline": "leave-one-out"}
    rollouts = pipeline(
        tmp_path, metrics, Engines(set()), Teacher({}), objective=objective, reference=Reference({}), promptsPerStep=1
    )
    samples = await samples_of(rollouts.take(0, 1))
    assert [s.baseline for s in samples] == pytest.approx([((0.5 - 0.5 * 1) + (0.5 - 0.5 * 2)) / 2] * 2)


@pytest.mark.parametrize(("source", "expected"), [("sums", [3.0, 0.5]), ("another", [1.0, 1.0])])
async def test_the_outcome_of_a_sample_weighs_its_divergence(
    source: str, expected: list[float], tmp_path: Path, metrics: Metrics
) -> None:
    """The first is wrong, the second correct, where there is a reward."""
    objective = {"reward": {"source": "exact-match"}, "weighting": {"correct": 0.5, "wrong": 3.0}}
    rewards = {source: Counting(begin=0)}
    rollouts = pipeline(tmp_path, metrics, Engines(set()), Teacher({}), rewards, objective, promptsPerStep=1)
    assert [s.coefficient for s in await samples_of(rollouts.take(0, 1))] == expected


async def test_a_reward_that_raises_fails_its_own_sample_alone(tmp_path: Path, metrics: Metrics) -> None:
    rewards, engines = {"sums": Counting(fails=2)}, Engines(set())
    rollouts = pipeline(tmp_path, metrics, engines, Teacher({}), rewards, promptsPerStep=1, samplesPerPrompt=3)
    samples = await samples_of(rollouts.take(0, 1))
    assert [s.reward for s in samples] == [1.0, 3.0]
    assert sum(s.advantage for s in samples) == pytest.approx(0) and samples[1].advantage > 0.5
    assert failed(metrics) == {"reward": 1.0}


@pytest.mark.parametrize(("source", "rewards"), [("sums", [1.0, 2.0]), ("another", [None, None])])
async def test_the_reward_of_a_prompt_is_that_of_its_source(
    tmp_path: Path, metrics: Metrics, source: str, rewards: list[float | None]
) -> None:
    made = pipeline(tmp_path, metrics, Engines(set()), Teacher({}), {source: Counting()}, promptsPerStep=1)
    samples = await samples_of(made.take(0, 1))
    assert [s.reward for s in samples] == rewards and {s.source for s in samples} == {"sums"}
    assert all(bool(s.advantage) == (s.reward is not None) for s in samples)


async def test_a_share_of_the_sequences_is_the_data_sets_own(tmp_path: Path, metrics: Metrics) -> None:
    """With two responses to a prompt, a third of the sequences is half of the prompts."""
    engines, teacher = Engines(set()), Teacher({})
    prompts = {"path": "/prompts.jsonl", "responseField": "response"}
    objective = {"support": "top-k", "datasetShare": 1 / 3}
    rollouts = pipeline(tmp_path, metrics, engines, teacher, objective=objective, data={"prompts": prompts})
    samples = await samples_of(rollouts.take(0, 1))
    supervised = [s for s in samples if s.supervised]
    assert len(supervised) == 2 and len(samples) == 6 and len(engines.seeds) == 4
    for sample in supervised:
        assert sample.response_ids == [ord("="), ord(str(sample.prompt_index)), 0]
        assert sample.engine_logprobs == [0.0] * 3 and len(sample.teacher_logprobs) == 2
    assert len(teacher.prefetched) == 2, "only prompts with siblings are worth it"


async def test_a_batch_has_the_samples_that_the_phase_of_its_step_asks_for(tmp_path: Path, metrics: Metrics) -> None:
    """A warm start takes the data set's responses, which neither the engines nor the teacher see."""
    engines, teacher = Engines(set()), Teacher({})
    prompts = {"path": "/prompts.jsonl", "responseField": "response"}
    given = {"divergence": "forward-kl", "support": "target", "datasetShare": 1}
    phases = [{"name": "warm-start", "objective": given, "untilStep": 1}, {"name": "distil"}]
    fields = {"data": {"prompts": prompts}, "objective": {"support": "sampled-token", "topK": 16}, "phases": phases}
    rollouts = pipeline(tmp_path, metrics, engines, teacher, **fields, maxPolicyLag=1)
    first = await samples_of(rollouts.take(0, 2))
    assert [s.response_ids for s in first] == [[ord("="), ord(str(s.prompt_index)), 0] for s in first]
    assert len(first) == 4 and all(s.supervised and s.teacher_logprobs == [0.0] * 3 for s in first)
    assert all(prompt_ids[0] >= 4 for prompt_ids in teacher.prefetched), "of the next step alone, which is under way"
    second = await samples_of(rollouts.take(1, 2))
    assert len(second) == 8 and not any(s.supervised for s in second)
    assert all(s.teacher_logprobs == [-1.0, -1.0] for s in second)


async def test_the_teacher_writes_the_responses_where_it_is_told_to(tmp_path: Path, metrics: Metrics) -> None:
    """Asked as it would be for scores, with its hint; what it writes is the target, or scored as any response is."""

    class Writes(Teacher):
        async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
            ended = prompt_ids != [1]
            return WrittenResponse([] if prompt_ids == [3] else [*prompt_ids, 7][:max_new_tokens], not ended)

    given = {"divergence": "forward-kl", "datasetShare": 1, "datasetResponses": "teacher"}
    empty = 0.0
    for support in ("target", "top-k"):
        engines, objective = Engines(set()), {**given, "support": support, "topK": 16}
        rollouts = pipeline(tmp_path, metrics, engines, Writes({}), objective=objective, maxResponseTokens=2)
        samples = await samples_of(rollouts.take(0, 1))
        assert [s.response_ids for s in samples] == [[0, 7], [1, 7], [2, 7]], "an empty response teaches nothing"
        assert all(s.supervised and s.engine_logprobs == [0.0, 0.0] for s in samples)
        assert [s.truncated for s in samples] == [False, True, False], "what ends at the limit may have ended by itself"
        empty += 1.0
        assert failed(metrics) == {"empty": empty}
        expected = [0.0, 0.0] if support == "target" else [-1.0, -1.0]
        assert all(s.teacher_logprobs == expected for s in samples) and engines.seeds == []
    hinted = pipeline(tmp_path, metrics, Engines(set()), Writes({}), objective=objective, privileged=True)
    assert (await samples_of(hinted.take(0, 1)))[0].response_ids == [99, 7]


async def test_the_cursor_of_a_batch_is_that_after_its_own_prompts(tmp_path: Path, metrics: Metrics) -> None:
    rollouts = pipeline(tmp_path, metrics, Engines(set()), Teacher({}), maxPolicyLag=1)
    first, second = rollouts.take(0, 3), rollouts.take(1, 3)
    assert first.cursor_after["position"] == 4, "the next batch is under way, and its prompts are drawn again on resume"
    assert second.cursor_after["position"] == 8
    rollouts.cancel()


@pytest.mark.parametrize("in_order", [True, False])
async def test_of_several_parts_that_end_the_run_one_is_told_and_none_is_left(
    in_order: bool, tmp_path: Path, metrics: Metrics
) -> None:
    class Wrong(Teacher):
        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            if prompt_ids[0] == 3:
                await asyncio.sleep(600)
            raise ConfigurationError("the same for all")

    untold = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context))
    batch = pipeline(tmp_path, metrics, Engines(set()), Wrong({})).take(0, 1)
    with pytest.raises(ConfigurationError):
        [part async for part in batch.arrivals(in_order=in_order)]
    await asyncio.wait(batch.parts, timeout=60)
    assert all(part.done() for part in batch.parts)
    del batch
    gc.collect()
    assert untold == []


class Cutting(Engines):
    """Cuts off the first response of each prompt."""

    async def generate(self, prompt_ids: list[int], **options: Any) -> Any:
        response = await super().generate(prompt_ids, **options)
        self.prompts = [*getattr(self, "prompts", []), prompt_ids[0]]
        return dataclasses.replace(response, truncated=self.prompts.count(prompt_ids[0]) == 1)


@pytest.mark.parametrize(
    ("truncated", "kept", "masked", "advantages"),
    [("keep", 2, 0, [-1.0, 1.0]), ("mask", 2, 1, [-1.0, 1.0]), ("drop", 1, 0, [0.0])],
)
async def test_a_response_that_was_cut_off_is_kept_masked_or_dropped_and_never_drawn_again(
    truncated: str, kept: int, masked: int, advantages: list[float], tmp_path: Path, metrics: Metrics
) -> None:
    """One that is masked has its share in the advantages of its group; one that is dropped has none."""
    objective = {"reward": {"source": "exact-match"}, "advantage": "leave-one-out"}
    engines, teacher, rewards = Cutting(set()), Teacher({}), Counting()
    made = pipeline(
        tmp_path, metrics, engines, teacher, {"sums": rewards}, objective, promptsPerStep=1, truncated=truncated
    )
    samples = await samples_of(made.take(0, 1))
    assert len(engines.seeds) == 2 and len(samples) == rewards.calls == kept
    assert sum(s.masked for s in samples) == masked and all(s.truncated for s in samples if s.masked)
    assert [s.advantage for s in samples] == advantages
    assert failed(metrics) == ({"truncated": 1.0} if truncated == "drop" else {})


def test_a_seed_depends_on_nothing_but_its_own_place() -> None:
    places = list(itertools.product(range(3), range(3), range(3), (0, 1)))
    seeds = [sample_seed(7, *place) for place in places]
    assert seeds == [sample_seed(7, *place) for place in places]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**31 for s in seeds)
