"""The card of an exported model: README.md, as the Hugging Face hub reads it.

What it says is what the run folder and the student's own card say. A licence is taken over from there, and is left out
where there is none: whether the teacher's terms bind the student is not for a program to say.
"""

import logging
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from distill_api.job import DistillationJob
from distill_api.spec.evaluation import Evaluation
from distill_api.spec.job_spec import RewardSource, Spec
from distill_api.spec.prompts import Prompts
from distill_api.teacher.control import Control
from distill_api.teacher.student import engines_score
from distill_workers.evaluation.estimates import Estimate
from distill_workers.reporting.metrics_file import Evaluated, Run, Step, read_run
from distill_workers.results.method import method, paper
from distill_workers.results.public_job import public_yaml
from distill_workers.run_folder.run_folder import recorded_versions

CARD = "README.md"
CURVE_ROWS = 10
"""Rows of the table of the curve, each the mean of as many steps."""
LICENCE_FIELDS = ("license", "license_name", "license_link")
METRICS = {
    RewardSource.EXACT_MATCH: ("exact_match", "exact match"),
    RewardSource.MATH: ("accuracy", "accuracy"),
}
"""Type and name of the score that is the mean of a reward; of any other reward it is its mean."""
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""The part of a path in the cache of the hub's client that names the model."""

log = logging.getLogger(__name__)


def card_of_run(job: DistillationJob, run_folder: Path, student: Path, step: int) -> str:
    """Return the card of the weights after `step` steps of a run; `student` is the folder of the model that it began
    with, here."""
    run = read_run(run_folder / "metrics.jsonl").until(step)
    return model_card(job, run, step, licence_of(student), recorded_versions(run_folder))


def card_if_possible(job: DistillationJob, run_folder: Path, student: Path, step: int) -> str | None:
    """Return `card_of_run`; None, with the error in the log, where none can be made: the model matters more."""
    try:
        return card_of_run(job, run_folder, student, step)
    except Exception:
        log.exception("the model is exported without a card")
        return None


def licence_of(student: Path) -> dict[str, Any]:
    """Return the licence fields of the model card in a folder; none where it has no card that can be read."""
    try:
        card = metadata_load(student / CARD) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("no licence is taken from %s: %s", student / CARD, " ".join(str(error).split()))
        return {}
    return {name: card[name] for name in LICENCE_FIELDS if isinstance(card.get(name), str | list)}


def model_card(job: DistillationJob, run: Run, step: int, licence: dict[str, Any], built_with: dict[str, str]) -> str:
    """Return the card: metadata in YAML, then Markdown. `run` has nothing after `step`; `built_with` are versions of
    packages by their names."""
    spec, name = job.spec, job.metadata.name
    measured = [found[-1] for found in run.evaluations.values() if found[-1].step == step]
    results = [result for one in measured for result in _results(spec, one)]
    data = ModelCardData(
        base_model=hub_id(spec.student.model),
        base_model_relation="finetune" if hub_id(spec.student.model) else None,
        datasets=sorted({s.prompts.dataset.name for s in spec.data.all_sources if s.prompts.dataset}) or None,
        eval_results=results or None,
        model_name=name if results else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "on-policy-distillation"],
        **licence,
    )
    lora = spec.trainer.lora
    adapters = f" Adapters (LoRA, rank {lora.rank}) were trained, and are merged into the weights." if lora else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{_code(_model(spec.student.model))}, {_made(spec)} {_teachers(spec)} on its own samples, "
        f"{step} of {spec.schedule.steps} steps.{adapters}",
        "## How it was made",
        "\n".join(f"- {line}" for line in [*_data(spec), *method(spec)]),
        *_section("## Evaluation", _evaluation_table(run)),
        *_section("## Curve", _curve_table(run.steps)),
        "## Licence",
        _licence_sentence(licence),
        "## Versions",
        ", ".join(f"{package} {number}" for package, number in built_with.items()) or "Not recorded.",
        "## Job",
        "What shaped the run; pods, volumes and trackers are left out.",
        _fenced(public_yaml(job)),
    ]
    return "\n\n".join(parts) + "\n"


def hub_id(model: str) -> str | None:
    """Return the name of a model on the hub; None for a path that does not tell it."""
    if cached := CACHED.search(model):
        return f"{cached[1]}/{cached[2]}"
    return None if model.startswith(("/", "./", "../", "~")) else model


def _model(model: str) -> str:
    return hub_id(model) or Path(model).name


def _made(spec: Spec) -> str:
    return (
        "distilled from" if spec.objective.control is Control.NONE else "trained as the control of a distillation from"
    )


def _teachers(spec: Spec) -> str:
    if spec.teacher is not None and (student := spec.teacher.student) is not None:
        every = "each step" if engines_score(spec) else f"every {student.every_steps} steps"
        return f"itself, as it was at {every} and with what it was not asked,"
    return " and ".join(_code(_model(t.model) if t.model is not None else t.title) for t in spec.routed_teachers)


def _data(spec: Spec) -> list[str]:
    sources = [source.prompts for source in spec.data.all_sources]
    said = [f"Prompts: {_code(_prompts(prompts))}." for prompts in sources]
    if any(prompts.teacher_prompt or prompts.teacher_system_prompt for prompts in sources):
        said.append(f"The teacher was asked with what the student does not see ({paper('OPSD')}).")
    return said


def _prompts(prompts: Prompts) -> str:
    if prompts.dataset is not None:
        known = (prompts.dataset.name, prompts.dataset.config, prompts.dataset.split, prompts.dataset.revision)
        return ", ".join(part for part in known if part)
    if prompts.reasoning_gym is not None:
        return f"reasoning-gym, {prompts.reasoning_gym.task}"
    assert prompts.path is not None
    return Path(prompts.path).name


def _results(spec: Spec, measured: Evaluated) -> Iterator[EvalResult]:
    """Yield the results of an evaluation as the hub's model-index has them."""
    evaluation = next((e for e in spec.evaluation if e.name == measured.name), None)
    if evaluation is None:
        return
    dataset = evaluation.prompts.dataset
    about = {
        "task_type": "text-generation",
        "dataset_type": dataset.name if dataset else measured.name,
        "dataset_name": dataset.name if dataset else _prompts(evaluation.prompts),
        "dataset_config": dataset.config if dataset else None,
        "dataset_split": dataset.split if dataset else None,
        "dataset_revision": dataset.revision if dataset else None,
    }
    for kind, title, value in _metrics(evaluation, measured):
        if math.isfinite(value):
            yield EvalResult(
                metric_type=kind, metric_name=f"{measured.name}: {title}", metric_value=round(value, 5), **about
            )


def _metrics(evaluation: Evaluation, measured: Evaluated) -> Iterator[tuple[str, str, float]]:
    """Yield type, title and value of what was measured."""
    if measured.score is not None:
        kind, title = METRICS.get(evaluation.reward.source, ("mean_reward", "mean reward"))
        yield kind, title, measured.score
    for k, estimate in measured.pass_at.items():
        yield f"pass@{k}", f"pass@{k}", estimate.value
    if measured.reverse_kl is not None:
        yield "reverse_kl", "reverse KL to the teacher, nats per token", measured.reverse_kl


def _evaluation_table(run: Run) -> list[Sequence[str]]:
    """Return the rows of the table of evaluations, its head first; nothing where nothing was measured."""
    rows: list[Sequence[str]] = [("evaluation", "measure", "first", "last", "95 % interval", "teacher", "steps")]
    for name, measured in run.evaluations.items():
        first, last = measured[0], measured[-1]
        teacher = next((e.teacher_score for e in measured if e.teacher_score is not None), None)
        steps = f"{first.step} → {last.step}"
        if last.score is not None:
            interval = _interval(last.score_low, last.score_high)
            rows.append((name, "score", _number(first.score), _number(last.score), interval, _number(teacher), steps))
        for k, e in last.pass_at.items():
            begun: Estimate | None = first.pass_at.get(k)
            values = (_number(begun.value if begun else None), _number(e.value), _interval(e.low, e.high))
            rows.append((name, f"pass@{k}", *values, "", steps))
        if last.reverse_kl is not None:
            values = (_number(first.reverse_kl), _number(last.reverse_kl), "")
            rows.append((name, "reverse KL, nats per token", *values, "", steps))
    return rows if len(rows) > 1 else []


def _curve_table(steps: Sequence[Step]) -> list[Sequence[str]]:
    """Return the rows of the table of the curve, its head first; nothing before the first step."""
    if not steps:
        return []
    rows: list[Sequence[str]] = [("steps", "reverse KL, nats per token", "reward", "tokens of a response")]
    count = min(CURVE_ROWS, len(steps))
    for i in range(count):
        part = steps[i * len(steps) // count : (i + 1) * len(steps) // count]
        named = str(part[0].step) if len(part) == 1 else f"{part[0].step} – {part[-1].step}"
        values = (
            _mean([s.reverse_kl for s in part]),
            _mean([s.reward for s in part]),
            _mean([s.response_tokens_mean for s in part]),
        )
        rows.append((named, *map(_number, values)))
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _licence_sentence(licence: dict[str, Any]) -> str:
    if licence:
        return "The licence in the metadata is that of the student's card. The teacher's terms may apply as well."
    return (
        "The student's folder has no card with a licence, and so none is given here. The terms of the student and of "
        "the teacher may apply."
    )


def _section(title: str, rows: list[Sequence[str]]) -> list[str]:
    """Return a title and a table in Markdown; nothing without rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [title, "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _code(text: str) -> str:
    """Return a text as code within a line."""
    return f"`{text.replace('`', chr(39))}`"


def _fenced(text: str) -> str:
    """Return a text as a block of code, whatever fences are in it."""
    fence = "`" * max([3, *(len(found) + 1 for found in re.findall("`+", text))])
    return f"{fence}yaml\n{text}{fence}"
