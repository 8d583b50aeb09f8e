"""A step of the trainer is the same however it is split, and continues after a restart as if nothing had happened.

That it is the same is asserted in float64 (double_precision.py); of float32, in which students on a CPU are trained,
what comes before the optimiser.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from double_precision import PARITY, ROUNDING, DoublePrecision, train_in_float64, transformers_model
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

from distill_workers.data.sample import Sample

LEARNING_RATE, STEPS = 1e-3, 3
MIXTURE = (("qwen3-moe", "sampled"),)
TRAINED = (("qwen3-tied", "sampled"), ("qwen2", "top-k"), *MIXTURE)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled": {
        "reward": {"source": "exact-match"}, "discount": 0.9, "baseline": "leave-one-out",
    },
    "top-k": {
        "support": "top-k", "divergence": "jsd", "reward": {"source": "exact-match"}, "datasetShare": 0.25,
        "weighting": {"prefix": 0.5},
        "coefficientSchedule": {"decay": "linear", "steps": 4, "endValue": 3.0},
        "rewardCoefficientSchedule": {"decay": "cosine", "steps": 2, "endValue": 0.5},
    },
}  # fmt: skip


Alone = dict[tuple[str, str], dict[str, Any]]


def samples_of(objective: str, step: int) -> list[Sample]:
    top_k = objective == "top-k"
    samples = make_samples(12, seed=step, top_k=4 if top_k else 0, from_data=3 if top_k else 0)
    for i, sample in enumerate(samples):
        sample.baseline = 0.25 * i
    return samples


def train(
    folder: Path,
    kind: str,
    tensor: int,
    ranks: int,
    objective: str,
    max_tokens: int = 400,
    groups: int = 1,
    pipeline: int = 1,
    distributed: bool = False,
    sequence: bool = False,
    context: int = 1,
    expert: int = 1,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Some steps on the same samples, and what came of them."""
    from distill_workers.megatron.student import MegatronStudent
    from distill_workers.objective.coefficients import step_coefficients

    spec = make_spec(
        trainer=make_trainer(
            tensor=tensor,
            sequence=sequence,
            pipeline=pipeline,
            context=context,
            expert=expert,
            ranks=ranks,
            max_tokens=max_tokens,
            distributed=distributed,
        ),
        objective=OBJECTIVES[objective],
    )
    student = MegatronStudent(spec, folder / kind)
    stats = []
    for step in range(steps):
        samples, coefficients = samples_of(objective, step), step_coefficients(spec.objective, step)
        if groups == 1:
            stats.append(train_step(student, samples, LEARNING_RATE, coefficients))
            continue
        for i in range(groups):
            student.accumulate(samples[i::groups], coefficients)
        stats.append(student.update(LEARNING_RATE))
    return {"stats": stats, "tensors": dict(student.hf_tensors())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    make_checkpoint(folder / "qwen3-tied", "qwen3-tied")
    make_checkpoint(folder / "qwen2", "qwen2", seed=1)
    make_checkpoint(folder / "qwen3-moe", "qwen3-moe", seed=2)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """One rank, everything in one micro-batch of padded samples: what all splits must equal."""
    (found,) = run_ranks(1, train_all, folder=folder)
    return found


def train_all(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    train_in_float64()
    return {
        ("qwen3-tied", "sampled"): train(folder, "qwen3-tied", 1, 1, "sampled", max_tokens=100_000),
        ("qwen2", "top-k"): train(folder, "qwen2", 1, 1, "top-k", max_tokens=100_000),
        ("qwen3-moe", "sampled"): train(folder, "qwen3-moe", 1, 1, "sampled", max_tokens=100_000),
        ("qwen3-tied", "small"): train(folder, "qwen3-tied", 1, 1, "sampled", max_tokens=30),
        ("qwen3-tied", "groups"): train(folder, "qwen3-tied", 1, 1, "sampled", groups=4),
    }


def train_beside_probes(folder: Path) -> list[list[torch.Tensor]]:
    """The weights after two steps without, and with, what the preflight of an attempt computes before each."""
    from distill_workers.megatron.student import MegatronStudent

    spec, trained = make_spec(trainer=make_trainer()), []
    for probed in (False, True):
        student = MegatronStudent(spec, folder / "qwen3-tied")
        for step in range(2):
            random_state = torch.get_rng_state()
            if probed:
                student.logprobs(samples_of("sampled", 9))
            assert torch.equal(random_state, torch.get_rng_state())
            train_step(student, samples_of("sampled", step), LEARNING_RATE)
        trained.append([tensor.clone() for _, tensor in student.hf_tensors() if tensor is not None])
    return trained


def test_what_the_preflight_computes_changes_no_bit_of_the_steps_after_it(folder: Path) -> None:
    [(without, beside)] = run_ranks(1, train_beside_probes, folder=folder)
    assert without and all(torch.equal(a, b) for a, b in zip(without, beside, strict=True))


def train_split(folder: Path, **split: Any) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """The first step in float32, and all steps in float64, of each kind of student that can be split so."""
    trained = MIXTURE if "expert" in split else TRAINED
    single = {key: train(folder, key[0], objective=key[1], steps=1, **split) for key in trained}
    train_in_float64()
    return {"float32": single, "float64": {key: train(folder, key[0], objective=key[1], **split) for key in trained}}


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Everything that is reported, and the parameters; of the padding nothing is asked."""
    for ours, theirs in zip(found["stats"], expected["stats"], strict=True):
        for name in theirs.keys() - {"padding_ratio"}:
            assert ours[name] == pytest.approx(theirs[name], rel=PARITY, abs=0.1 * PARITY), name
    for name, tensor in expected["tensors"].items():
        difference = (found["tensors"][name] - tensor).norm() / tensor.norm()
        assert difference <= PARITY, f"{name}: {difference}"


def assert_all_trained_as_one(ranks: list[dict[str, Alone]], alone: Alone) -> None:
    for key, found in ranks[0]["float64"].items():
        assert_same_training(found, alone[key])
        [single] = ranks[0]["float32"][key]["stats"]
        for name in ("loss", "grad_norm"):
            assert single[name] == pytest.approx(alone[key]["stats"][0][name], rel=ROUNDING), f"float32: {name}"
        for other in ranks[1:]:
            for precision in ("float32", "float64"):
                told, first = other[precision][key]["stats"], ranks[0][precision][key]["stats"]
                assert told == first, "every rank reports the same numbers"


SPLITS: dict[str, dict[str, Any]] = {
    "tensor-2": {"tensor": 2, "ranks": 2},
    "data-2": {"tensor": 1, "ranks": 2},
    "pipeline-2": {"tensor": 1, "pipeline": 2, "ranks": 2},
    "tensor-2-sequence-distributed": {"tensor": 2, "ranks": 2, "sequence": True, "distributed": True},
    "data-2-pipeline-2-distributed": {"tensor": 1, "pipeline": 2, "ranks": 4, "distributed": True, "groups": 2},
}


@pytest.mark.parametrize("name", SPLITS)
def test_several_ranks_train_as_one(folder: Path, alone: Alone, name: str) -> None:
    ranks = run_ranks(SPLITS[name]["ranks"], train_split, folder=folder, **SPLITS[name])

    assert_all_trained_as_one(ranks, alone)


OF_FOUR: dict[str, dict[str, Any]] = {
    "context-2-data-2": {"tensor": 1, "context": 2},
    "expert-2-data-4-distributed": {"tensor": 1, "expert": 2, "distributed": True, "groups": 2},
    "expert-2-context-2-tensor-2": {"tensor": 2, "expert": 2, "context": 2},
    "expert-2-context-2-pipeline-2": {"tensor": 1, "expert": 2, "context": 2, "pipeline": 2},
}
"""Splits of sequences over four ranks, and of experts, which a mixture alone has."""


def train_in_turn(folder: Path) -> dict[str, Alone]:
    """Each split in the same processes: in float64 alone, since a process does not go back from it."""
    from megatron.core import parallel_state

    train_in_float64()
    found = {}
    for name, split in OF_FOUR.items():
        trained = MIXTURE if "expert" in split else TRAINED
        found[name] = {key: train(folder, key[0], ranks=4, objective=key[1], **split) for key in trained}
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def by_four(folder: Path) -> list[dict[str, Alone]]:
    return run_ranks(4, train_in_turn, folder=folder)


@pytest.mark.parametrize("name", OF_FOUR)
def test_ranks_that_share_sequences_or_experts_train_as_one(
    by_four: list[dict[str, Alone]], alone: Alone, name: str
) -> None:
    assert by_four[0][name].keys() == (set(MIXTURE) if "expert" in name else set(TRAINED))
    for key, found in by_four[0][name].items():
        assert_same_training(found, alone[key])
        for other in by_four[1:]:
            assert other[name][key]["stats"] == found["stats"], "every rank reports the same numbers"


@pytest.mark.parametrize("how", ["small", "groups"])
def test_micro_batches_and_groups_change_nothing(alone: Alone, how: str) -> None:
    assert_same_training(alone["qwen3-tied", how], alone["qwen3-tied", "sampled"])


def naive_penalties(sample: Sample, student: list[float]) -> list[float]:
    """Of each token of one sample: its own clipped term less the baseline, and 0.9 times the discounted mean of
    later ones."""
    terms = [max(-10.0, min(10.0, s - t)) for s, t in zip(student, sample.teacher_logprobs, strict=True)]
    penalties = []
    for t, term in enumerate(terms):
        weights = [0.9**i for i in range(len(terms) - t - 1)]
        later = sum(w * d for w, d in zip(weights, terms[t + 1 :], strict=True))
        penalties.append(term - sample.baseline + (0.9 * later / sum(weights) if weights else 0.0))
    return penalties


def naive_weights(sample: Sample, student: list[float]) -> list[float]:
    """Of each token of one sample: the more, the less divergence stands before it."""
    gaps = [abs(s - t) for s, t in zip(student, sample.teacher_logprobs, strict=True)]
    return [1 + 0.5 * (1 - sum(gaps[:t]) / sum(gaps)) for t in range(len(gaps))]


def naive_losses(objective: str, sample: Sample, rows: torch.Tensor, step: int) -> torch.Tensor:
    """Of one sample, token by token from the formulas; rows [tokens, vocabulary] are log-probs."""
    losses = []
    drawn = [rows[t, token] for t, token in enumerate(sample.response_ids)]
    penalties = naive_penalties(sample, [d.item() for d in drawn])
    weights = naive_weights(sample, [d.item() for d in drawn])
    for t, (token, student) in enumerate(zip(sample.response_ids, drawn, strict=True)):
        teacher = sample.teacher_logprobs[t]
        weight = min(math.exp(student.item() - sample.engine_logprobs[t]), 2.0)
        if objective == "sampled":
            losses.append(-weight * (sample.advantage - penalties[t]) * (student - student.detach()).exp())
            continue
        assert sample.teacher_top_ids is not None and sample.teacher_top_logprobs is not None
        ids, top = list(sample.teacher_top_ids[t]), list(sample.teacher_top_logprobs[t])
        if token not in ids:
            ids, top = [*ids, token], [*top, teacher]
        s, p = rows[t, ids].double().exp(), torch.tensor(top, dtype=torch.float64).exp()
        s, p = torch.cat([s, 1 - s.sum()[None]]), torch.cat([p, 1 - p.sum()[None]])
        m = (s + p) / 2
        jsd = ((p * (p / m).log()).sum() + (s * (s / m).log()).sum()) / 2
        loss = (1.0 + step * 0.5) * weights[t] * jsd
        if not sample.supervised:
            reward_coefficient = (1.0, 0.75, 0.5)[step]
            loss = loss - weight * reward_coefficient * sample.advantage * (student - student.detach()).exp()
        losses.append(loss)
    return torch.stack(losses)


def naive_reports(objective: str, sample: Sample, rows: torch.Tensor) -> dict[str, list[float]]:
    """Of one sample, what each token adds to each mean of the step."""
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for t, token in enumerate(sample.response_ids):
        if sample.teacher_top_ids is not None and sample.teacher_top_logprobs is not None:
            ids = sample.teacher_top_ids[t]
            add("student_mass", rows[t, ids].exp().sum().item())
            add("teacher_mass", sum(math.exp(x) for x in sample.teacher_top_logprobs[t]))
            if not sample.supervised and (len(sample.prompt_ids) - 1 + t) % 8 == 0:
                add("overlap_ratio", len(set(ids) & set(rows[t].topk(len(ids)).indices.tolist())) / len(ids))
        if not sample.supervised:
            k1 = rows[t, token].item() - sample.teacher_logprobs[t]
            add("reverse_kl", k1)
            add("reverse_kl_k2", k1**2 / 2)
            add("reverse_kl_k3", math.exp(-k1) - 1 + k1)
            add("trainer_engine_gap", abs(rows[t, token].item() - sample.engine_logprobs[t]))
            add("entropy", -(rows[t].exp() * rows[t]).sum().item())
    return found


@pytest.mark.parametrize(("kind", "objective"), TRAINED)
def test_training_equals_a_plain_loop_of_transformers_and_adamw(
    folder: Path, alone: Alone, tmp_path: Path, kind: str, objective: str
) -> None:
    from safetensors.torch import load_file

    model = transformers_model(folder / kind)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    for step, stats in enumerate(alone[kind, objective]["stats"]):
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        reports: dict[str, list[float]] = {}
        with DoublePrecision():
            for sample in samples_of(objective, step):
                logits = model(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
                rows = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
                losses = naive_losses(objective, sample, rows, step)
                for name, values in naive_reports(objective, sample, rows.detach()).items():
                    reports.setdefault(name, []).extend(values)
                total, tokens = total + losses.sum(), tokens + len(losses)
            optimizer.zero_grad()
            (total / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert stats["loss"] == pytest.approx(total.item() / tokens, rel=PARITY)
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=PARITY)
        assert stats["tokens"] == tokens
        for name, values in reports.items():
            assert stats[name] == pytest.approx(sum(values) / len(values), rel=PARITY, abs=0.1 * PARITY), name
    # As a file, where transformers keeps experts apart that it computes together.
    model.save_pretrained(tmp_path)
    trained = load_file(tmp_path / "model.safetensors")
    assert trained.keys() == alone[kind, objective]["tensors"].keys()
    for name, parameter in trained.items():
        difference = (alone[kind, objective]["tensors"][name] - parameter).norm() / parameter.norm()
        assert difference <= PARITY, f"{name}: {difference}"


def test_every_step_reports_finite_numbers(alone: Alone) -> None:
    stats = alone["qwen2", "top-k"]["stats"]

    assert all(step["skipped"] == 0 and step["grad_norm"] > 0 for step in stats)
    assert all(math.isfinite(value) for step in stats for value in step.values())
    assert 0 < stats[0]["entropy"] <= math.log(321)


def learn(folder: Path) -> list[float]:
    """The divergence on the same samples over some steps."""
    from distill_workers.megatron.student import MegatronStudent

    spec = make_spec(
        trainer=make_trainer(learningRate=1e-2), objective={"support": "top-k", "divergence": "reverse-kl"}
    )
    student = MegatronStudent(spec, folder / "qwen2")
    samples = make_samples(6, top_k=4)
    return [train_step(student, samples, 1e-2)["divergence"] for _ in range(12)]


def test_the_divergence_falls_on_samples_that_are_trained_on(folder: Path) -> None:
    (divergences,) = run_ranks(1, learn, folder=folder)

    assert divergences[-1] < 0.6 * divergences[0]


def interrupted(
    folder: Path, checkpoint: Path, tensor: int, precision: str, phase: str, distributed: bool = False
) -> list[Any]:
    """Train 2 steps, save, train 2 more; or, in another process, load and train the same 2."""
    from distill_workers.megatron.student import MegatronStudent

    spec = make_spec(trainer=make_trainer(tensor=tensor, ranks=2, distributed=distributed), precision=precision)
    student = MegatronStudent(spec, folder / "qwen2")
    if phase == "first":
        for step in range(2):
            train_step(student, make_samples(8, seed=step), LEARNING_RATE)
        checkpoint.mkdir(exist_ok=True)
        student.save(checkpoint)
    else:
        torch.rand(3)
        student.load(checkpoint)
    stats: list[Any] = [train_step(student, make_samples(8, seed=step), LEARNING_RATE) for step in (2, 3)]
    tensors = [(name, None if t is None else t.float().numpy()) for name, t in student.hf_tensors()]
    return [*stats, torch.rand(4).tolist(), tensors]


@pytest.mark.parametrize(
    "split",
    [
        {"tensor": 1, "precision": "float32"},
        {"tensor": 2, "precision": "bfloat16"},
        {"tensor": 1, "precision": "bfloat16", "distributed": True},
    ],
    ids=["data-2-float32", "tensor-2-bfloat16", "data-2-bfloat16-distributed"],
)
def test_a_restarted_trainer_continues_bit_by_bit(folder: Path, tmp_path: Path, split: dict[str, Any]) -> None:
    arguments = {"folder": folder, "checkpoint": tmp_path / "step", **split}
    first = run_ranks(2, interrupted, phase="first", **arguments)
    second = run_ranks(2, interrupted, phase="second", **arguments)

    for before, after in zip(first, second, strict=True):
        assert after[:3] == before[:3]
        for (name, ours), (other, theirs) in zip(after[3], before[3], strict=True):
            assert name == other
            assert (ours is None and theirs is None) or (ours == theirs).all(), name


def edges(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """What happens at the edges of a step."""
    from distill_workers.megatron.student import MegatronStudent
    from distill_workers.objective.coefficients import StepCoefficients

    found: dict[str, Any] = {}
    student = MegatronStudent(make_spec(trainer=make_trainer(weightDecay=0.5)), folder / "qwen2")
    before = {name: t.clone() for name, t in student.hf_tensors() if t is not None}

    def unchanged() -> bool:
        return all(torch.equal(t, before[name]) for name, t in student.hf_tensors() if t is not None)

    empty = make_samples(2)
    for sample in empty:
        sample.response_ids, sample.engine_logprobs, sample.teacher_logprobs = [], [], []
    found["empty"] = train_step(student, empty, 1e-3), unchanged(), student.logprobs(empty)

    broken = make_samples(2)
    broken[0].teacher_logprobs[0] = math.nan
    found["nan"] = train_step(student, broken, 1e-3), unchanged()

    wrong = make_samples(1)
    wrong[0].teacher_logprobs.append(-1.0)
    for name, act in {
        "lengths": lambda: train_step(student, wrong, 1e-3),
        "coefficients": lambda: student.accumulate(make_samples(1), StepCoefficients(2.0, 1.0)),
    }.items():
        try:
            act()
        except ValueError as error:
            found[name] = str(error)
    student._begin_step()
    student.save(checkpoint)
    [file] = checkpoint.iterdir()
    saved = file.read_bytes()
    student.accumulate(make_samples(2))
    student.save(checkpoint)
    found["mid-step"] = file.read_bytes() == saved
    student.discard()
    found["discarded"] = student.update(1e-3), unchanged()

    # No gradient: the decay alone acts, and on matrices alone.
    neutral = make_samples(2)
    for sample, logprobs in zip(neutral, student.logprobs(neutral), strict=True):
        sample.teacher_logprobs, sample.advantage = logprobs, 0.0
    train_step(student, neutral, 1e-2)
    ratios = {name: (t.norm() / before[name].norm()).item() for name, t in student.hf_tensors() if t is not None}
    found["decay"] = {n: r for n, r in ratios.items() if "norm" in n or "bias" in n or "gate" in n}
    return found


def test_edges_of_a_step(folder: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, edges, folder=folder, checkpoint=tmp_path)

    stats, unchanged, logprobs = found["empty"]
    assert stats["skipped"] == 1 and stats["tokens"] == 0 and unchanged and logprobs == [[], []]
    stats, unchanged = found["nan"]
    assert stats["skipped"] == 1 and unchanged, "a gradient that is not finite updates nothing"
    assert "{'teacher_logprobs': " in found["lengths"]
    one = "one pair of coefficients: StepCoefficients(divergence=1.0, reward=1.0, phase=0), and now"
    assert one in found["coefficients"]
    assert found["mid-step"], "what is saved is the state after the last step, not half of the next"
    stats, unchanged = found["discarded"]
    assert stats["skipped"] == 1 and stats["tokens"] == 0 and unchanged, "of what was discarded nothing is left"
    for name, ratio in found["decay"].items():
        expected = 1.0 if "norm" in name or "bias" in name else 1 - 1e-2 * 0.5
        assert ratio == pytest.approx(expected, rel=1e-4), name
