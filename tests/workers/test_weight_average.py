"""The moving average of the trainer's weights is that of a float64 sum, however it is split, and in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

DECAY, STEPS = 0.7, 3
SPLITS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tensor": {"tensor": 2, "ranks": 2},
    "data": {"distributed": True, "ranks": 2},
    "pipeline": {"pipeline": 2, "ranks": 2},
}
Tensors = dict[str, torch.Tensor]


def make_student(folder: Path, *, precision: str = "float32", **split: Any) -> Any:
    from distill_workers.megatron.student import MegatronStudent

    prompts = {"path": "/prompts", "answerField": "answer", "teacherPrompt": "{prompt} {answer}"}
    teacher = {"student": {"weights": "ema", "decay": DECAY}}
    spec = make_spec(teacher=teacher, data={"prompts": prompts}, trainer=make_trainer(**split), precision=precision)
    return MegatronStudent(spec, folder)


def copied(tensors: Any) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors if tensor is not None}


def trained(folder: Path, target: Path, precision: str = "float32", **split: Any) -> tuple[list[Tensors], Tensors, Any]:
    """The weights after each step, their average after the last, and the dtypes of the average; it is saved then."""
    student = make_student(folder, precision=precision, **split)
    weights = [copied(student.hf_tensors())]
    for step in range(STEPS):
        train_step(student, make_samples(8, seed=step), 1e-2)
        weights.append(copied(student.hf_tensors()))
    target.mkdir(exist_ok=True)
    student.save(target)
    average = copied(student.hf_tensors(averaged=True))
    return weights, average, {value.dtype for value in student._average.values.values()}


def resumed(folder: Path, source: Path, **split: Any) -> tuple[Tensors, Tensors]:
    """The average of a checkpoint, and the one after a step more."""
    student = make_student(folder, **split)
    student.load(source)
    before = copied(student.hf_tensors(averaged=True))
    train_step(student, make_samples(8, seed=STEPS), 1e-2)
    return before, copied(student.hf_tensors(averaged=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("average") / "qwen2", "qwen2")


def expected(weights: list[Tensors], name: str) -> torch.Tensor:
    found = weights[0][name].double()
    for later in weights[1:]:
        found = DECAY * found + (1 - DECAY) * later[name].double()
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_average_is_that_of_the_weights_of_each_step_and_goes_on_from_a_checkpoint_of_another_split(
    folder: Path, tmp_path: Path, split: str
) -> None:
    options = SPLITS[split]
    ranks = options.get("ranks", 1)
    weights, average, dtypes = run_ranks(ranks, trained, folder=folder, target=tmp_path / "saved", **options)[0]
    assert dtypes == {torch.float32} and average.keys() == weights[0].keys()
    moved = 0
    for name, found in average.items():
        wanted = expected(weights, name)
        # Each step rounds a difference, its product and a sum: three times 2^-24 of values up to the largest.
        bound = 2 * 3 * STEPS * 2**-24 * max(w[name].abs().max().item() for w in weights)
        assert (found.double() - wanted).abs().max().item() <= bound, name
        moved += (found - weights[-1][name]).abs().max().item() > 10 * bound
    assert moved > len(average) / 2, "it is not the weights themselves"
    other = SPLITS["tensor" if split == "alone" else "alone"]
    for again in (options, other):
        before, _ = run_ranks(again.get("ranks", 1), resumed, folder=folder, source=tmp_path / "saved", **again)[0]
        assert all(torch.equal(before[name], found) for name, found in average.items())


def test_the_average_of_bfloat16_weights_is_kept_in_float32_and_given_in_theirs(folder: Path, tmp_path: Path) -> None:
    weights, average, dtypes = run_ranks(1, trained, folder=folder, target=tmp_path / "saved", precision="bfloat16")[0]
    assert dtypes == {torch.float32} and {t.dtype for t in average.values()} == {torch.bfloat16}
    for name, found in average.items():
        wanted = expected(weights, name)
        assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all(), name
