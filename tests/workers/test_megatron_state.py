"""Exact state goes on: with other ranks than wrote it, while the training goes on, and never half."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from double_precision import PARITY, ROUNDING, train_in_float64
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

RATE = 1e-3
CASES: dict[str, dict[str, Any]] = {
    "float32": {"kind": "qwen2"},
    "bfloat16": {"kind": "qwen3-tied", "precision": "bfloat16"},
    "float64": {"kind": "qwen2"},
    "experts": {"kind": "qwen3-moe"},
    "adapters": {"kind": "qwen2", "lora": {"rank": 4, "alpha": 8.0}},
}
"""What is trained: a model with biases; one whose head is a copy on the last stage; the first once more; a mixture of
experts; adapters beside frozen weights. From the third on in float64, where every split gives the same numbers."""
SPLITS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2, "ranks": 2},
    "data": {"distributed": True, "ranks": 2},
    "pipeline": {"pipeline": 2, "ranks": 2},
    "alone": {},
    "again": {"tensor": 2, "ranks": 2},
}
"""Each reads what the one before it wrote."""


ALSO: dict[tuple[str, str], dict[str, int]] = {("experts", "data"): {"expert": 2}, ("adapters", "data"): {"context": 2}}
"""What the ranks of a case and a split share beside that."""


def make_student(
    folder: Path, kind: str = "qwen2", precision: str = "float32", lora: dict[str, Any] | None = None, **split: Any
) -> Any:
    from distill_workers.megatron.student import MegatronStudent

    trainer = make_trainer(**split) | ({} if lora is None else {"lora": lora})
    return MegatronStudent(make_spec(trainer=trainer, precision=precision), folder / kind)


def go_on(folder: Path, source: str | None, target: str) -> dict[str, Any]:
    """In each case: two steps, or what was saved is loaded; it is saved (again), and trained one step on."""
    from megatron.core import parallel_state

    found = {}
    for case, options in CASES.items():
        if case == "float64":
            train_in_float64()
        path = folder / f"{case}-{target}"
        student = make_student(folder, **options, **SPLITS[target], **ALSO.get((case, target), {}))
        if source is not None:
            student.load(folder / f"{case}-{source}")
        else:
            for step in range(2):
                train_step(student, make_samples(8, seed=step), RATE)
        path.mkdir(exist_ok=True)
        student.save(path)
        found[case] = train_step(student, make_samples(8, seed=2), RATE)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    make_checkpoint(folder / "qwen2", "qwen2")
    make_checkpoint(folder / "qwen3-tied", "qwen3-tied")
    make_checkpoint(folder / "qwen3-moe", "qwen3-moe")
    return folder


@pytest.fixture(scope="module")
def resharded(folder: Path) -> dict[str, Any]:
    """The next step by each split."""
    names = list(SPLITS)
    return {
        target: run_ranks(SPLITS[target].get("ranks", 1), go_on, folder=folder, source=source, target=target)[0]
        for source, target in zip([None, *names], names, strict=False)
    }


@pytest.mark.parametrize("case", CASES)
def test_split_otherwise_and_back_every_parameter_and_moment_is_the_same_to_the_last_bit(
    folder: Path, resharded: dict[str, Any], case: str
) -> None:
    from safetensors.torch import load_file

    kinds = {"parameter", "exp_avg", "exp_avg_sq", "random"} | ({"main"} if case == "bfloat16" else set())
    for rank in range(2):
        name = f"rank-{rank:05d}.safetensors"
        first, last = (load_file(folder / f"{case}-{which}" / name) for which in ("tensor", "again"))
        assert {name.split("/")[0] for name in first} == kinds and first.keys() == last.keys()
        assert all(torch.equal(first[name], last[name]) for name in first if not name.startswith("random"))
        assert any(first[name].any() for name in first if name.startswith("exp_avg_sq"))


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_is_the_same_whatever_ranks_go_on(resharded: dict[str, Any], case: str) -> None:
    assert resharded["again"][case] == resharded["tensor"][case], "the same split: to the last bit"
    # Rounded, what is averaged over all tokens is the same: in bfloat16, of 2^-8, to a hundredth or two.
    tolerance = {"float32": ROUNDING, "bfloat16": 2e-2}.get(case, PARITY)
    rounded = {"loss", "grad_norm", "reverse_kl", "entropy", "tokens", "samples"}
    for split in ("data", "pipeline", "alone"):
        for name, value in resharded["tensor"][case].items():
            if name != "padding_ratio" and (tolerance == PARITY or name in rounded):
                found = resharded[split][case][name]
                assert found == pytest.approx(value, rel=tolerance, abs=1e-4 * tolerance), f"{split}: {name}"


def beside(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """What a student does while a save is under way."""
    from distill_workers.failures import Failure
    from distill_workers.megatron.checkpoint import state

    student = make_student(folder, tensor=2, ranks=2)
    train_step(student, make_samples(8, seed=0), RATE)
    for name in ("asynchronous", "synchronous", "full"):
        (checkpoints / name).mkdir(exist_ok=True)
    student.save(checkpoints / "synchronous")
    found: dict[str, Any] = {}

    write, trained = state.write, threading.Event()

    def slow(*arguments: Any) -> None:
        trained.wait(60)
        write(*arguments)

    state.write = slow
    student.begin_save(checkpoints / "asynchronous")
    train_step(student, make_samples(8, seed=1), RATE)
    found["training went on"] = student.writer.busy
    trained.set()
    try:
        student.begin_save(checkpoints / "asynchronous")
    except RuntimeError as error:
        found["second"] = str(error)
    student.finish_save()

    def full(*arguments: Any) -> None:
        if student.ranks.rank == 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    state.write = full
    student.begin_save(checkpoints / "full")
    try:
        student.finish_save()
    except Failure as error:
        found["full"] = str(error)
    state.write = write
    return found


def test_a_save_is_of_the_moment_it_was_asked_for_and_its_failure_is_told_by_rank_0(
    folder: Path, tmp_path: Path
) -> None:
    found = run_ranks(2, beside, folder=folder, checkpoints=tmp_path)

    for rank in range(2):
        name = f"rank-{rank:05d}.safetensors"
        one, other = ((tmp_path / which / name).read_bytes() for which in ("asynchronous", "synchronous"))
        assert one == other, "the step after `save` is not in it"
        assert found[rank]["training went on"]
        assert "another is under way" in found[rank]["second"]
    assert "rank 1 could not write its checkpoint: [Errno 28] No space left on device" in found[0]["full"]
    assert "full" not in found[1], "the others wait for what rank 0 decides"


def refused(folder: Path, checkpoints: Path) -> dict[str, str]:
    from distill_workers.megatron.checkpoint.reader import IncompatibleCheckpoint

    found = {}
    student = make_student(folder)
    for path in checkpoints.iterdir():
        try:
            student.load(path)
        except IncompatibleCheckpoint as error:
            found[path.name] = str(error)
    # A checkpoint from before the first step has no moments.
    student = make_student(folder)
    (checkpoints / "fresh").mkdir()
    student.save(checkpoints / "fresh")
    first = train_step(student, make_samples(4), RATE)
    student.load(checkpoints / "fresh")
    found["fresh"] = "same" if train_step(student, make_samples(4), RATE) == first else "another step"
    return found


def test_what_cannot_be_continued_is_refused_with_a_sentence(
    folder: Path, resharded: dict[str, Any], tmp_path: Path
) -> None:
    name = "rank-00000.safetensors"
    content = (folder / "float32-alone" / name).read_bytes()
    for case in ("old", "empty", "half", "format", "torn", "other"):
        (tmp_path / case).mkdir()
    (tmp_path / "old" / "rank-00000.pt").touch()
    (tmp_path / "half" / name).symlink_to(folder / "float32-tensor" / name)
    (tmp_path / "format" / name).write_bytes(content.replace(b'"format":"3"', b'"format":"9"'))
    (tmp_path / "torn" / name).write_bytes(content[:-10])
    (tmp_path / "other" / name).symlink_to(folder / "bfloat16-alone" / name)

    (found,) = run_ranks(1, refused, folder=folder, checkpoints=tmp_path)

    assert "was written by an earlier version: continue it with the version that wrote it" in found["old"]
    assert "has no files of ranks" in found["empty"]
    assert "has 1 files of 2 ranks" in found["half"]
    assert "has format 9, and this version reads 3" in found["format"]
    assert "is cut off" in found["torn"]
    assert "is torch.bfloat16, and this trainer's torch.float32: set spec.precision as it was" in found["other"]
    assert found["fresh"] == "same"
