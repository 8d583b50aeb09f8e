"""The trainer's ranks through phases: an objective for each, and the same bits after a restart in or between two."""

from pathlib import Path
from typing import Any

import pytest
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

from distill_api.spec.job_spec import Support

LEARNING_RATE, STEPS = 1e-3, 4
PHASES = [
    {"name": "warm-start", "untilStep": 1}
    | {"objective": {"divergence": "forward-kl", "support": "target", "datasetShare": 1}},
    {"name": "distil", "objective": {"discount": 0.5}, "untilStep": 3},
    {"name": "reinforce", "objective": {"coefficient": 0, "rewardCoefficient": 1}},
]


def trained(folder: Path, checkpoint: Path, saved_at: int, begin: int) -> list[Any]:
    """What the steps from `begin` on report and the weights after them; saved before step `saved_at` on the way, from
    which `begin` above 0 goes on."""
    from distill_workers.megatron.student import MegatronStudent
    from distill_workers.objective.phases import Phases

    reward = {"reward": {"source": "exact-match"}, "rewardCoefficient": 0}
    spec = make_spec(trainer=make_trainer(ranks=2), phases=PHASES, objective=reward, schedule={"steps": STEPS})
    student, phases = MegatronStudent(spec, folder), Phases(spec)
    if begin:
        student.load(checkpoint)
    stats: list[Any] = []
    for step in range(begin, STEPS):
        if not begin and step == saved_at:
            checkpoint.mkdir(exist_ok=True)
            student.save(checkpoint)
        given = phases.objective(step).support is Support.TARGET
        samples = make_samples(8, seed=step, from_data=8 if given else 0)
        for sample in samples if given else []:
            sample.teacher_logprobs = [0.0] * len(sample.response_ids)  # nobody scored it
        stats.append(train_step(student, samples, LEARNING_RATE, phases.coefficients(step)))
    return [stats, [(name, None if t is None else t.numpy()) for name, t in student.hf_tensors()]]


@pytest.mark.parametrize("saved_at", [1, 2], ids=["between two phases", "inside one"])
def test_ranks_that_go_on_in_a_phase_have_the_same_bits(saved_at: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "student", "qwen2")
    arguments: dict[str, Any] = {"folder": folder, "checkpoint": tmp_path / "step", "saved_at": saved_at}
    whole = run_ranks(2, trained, begin=0, **arguments)
    resumed = run_ranks(2, trained, begin=saved_at, **arguments)
    for (stats, tensors), (again, others) in zip(whole, resumed, strict=True):
        assert again == stats[saved_at:]
        for (name, ours), (_, theirs) in zip(tensors, others, strict=True):
            assert (ours is None and theirs is None) or (ours == theirs).all(), name
    stats = whole[0][0]
    assert [s["coefficient"] for s in stats] == [1, 1, 1, 0] and [s["reward_coefficient"] for s in stats] == [
        0,
        0,
        0,
        1,
    ]
    # The data set's tokens alone: nothing is measured of the student's own, and the loss is their cross-entropy.
    assert "reverse_kl" not in stats[0] and stats[0]["loss"] == stats[0]["divergence"] > 0
    assert all("reverse_kl" in s for s in stats[1:])
    assert all(s["skipped"] == 0 and s["grad_norm"] > 0 for s in stats)
