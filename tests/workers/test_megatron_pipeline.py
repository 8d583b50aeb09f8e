"""A student split into pipeline stages is the same student: scores, exports, restarts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

KINDS = ("qwen3-tied", "llama3-rope", "qwen3-moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for kind in KINDS:
        make_checkpoint(folder / kind, kind)
    return folder


def score_and_export(folder: Path, pipeline: int) -> dict[str, Any]:
    """Of each kind; and what a number of stages that does not fit is told."""
    from distill_workers.megatron.architecture import UnsupportedModel, read_shape
    from distill_workers.megatron.pipeline import check
    from distill_workers.megatron.student import MegatronStudent

    found: dict[str, Any] = {}
    spec = make_spec(trainer=make_trainer(pipeline=pipeline, ranks=pipeline, max_tokens=150))
    for kind in KINDS:
        student = MegatronStudent(spec, folder / kind)
        logprobs = student.logprobs(make_samples(6, longest=60))
        student.export(folder / f"{kind}-from-{pipeline}")
        names = [name for name, tensor in student.hf_tensors() if (tensor is None) == (student.ranks.rank > 0)]
        found[kind] = {"logprobs": logprobs, "names": names, "held": len(list(student._model.parameters()))}
    (folder / "odd").mkdir(exist_ok=True)
    try:
        check(read_shape(make_checkpoint(folder / f"odd/{student.ranks.rank}", layers=3)), student.ranks)
    except UnsupportedModel as error:
        found["odd"] = str(error)
    return found


@pytest.fixture(scope="module")
def stages(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, score_and_export, folder=folder, pipeline=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_told_the_logprobs_of_transformers(folder: Path, stages: Any, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    for i, sample in enumerate(make_samples(6, longest=60)):
        with torch.no_grad():
            rows = model(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0].log_softmax(-1)
        expected = rows[len(sample.prompt_ids) - 1 : -1].gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        for stage in stages:
            torch.testing.assert_close(torch.tensor(stage[kind]["logprobs"][i]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_export_together_what_was_loaded(folder: Path, stages: Any, kind: str) -> None:
    from safetensors.torch import load_file

    exported, original = (load_file(folder / n / "model.safetensors") for n in (f"{kind}-from-2", kind))

    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert [stage[kind]["names"] for stage in stages] == [list(stages[0][kind]["names"])] * 2
    assert set(stages[0][kind]["names"]) == original.keys()


def test_each_stage_holds_its_own_layers_only(stages: Any) -> None:
    # Of 2 layers with 8 parameters each, the embedding first and the final norm and the (copied) head last.
    assert [stage["qwen3-tied"]["held"] for stage in stages] == [1 + 8, 8 + 1 + 1]


def test_stages_that_do_not_divide_the_layers_are_refused(stages: Any) -> None:
    assert "parallelism.pipeline 2 does not divide the student's 3 layers; set it to a divisor" in stages[0]["odd"]


def interrupted(folder: Path, checkpoint: Path, phase: str) -> list[Any]:
    """Train a step, save, train another; or, in another process, load and train that one."""
    from distill_workers.megatron.student import MegatronStudent

    spec = make_spec(trainer=make_trainer(pipeline=2, ranks=2))
    student = MegatronStudent(spec, folder / "qwen3-tied")
    if phase == "first":
        train_step(student, make_samples(8), 1e-3)
        checkpoint.mkdir(exist_ok=True)
        student.save(checkpoint)
    else:
        student.load(checkpoint)
    samples = make_samples(8, seed=1)
    student.accumulate(samples[::2])
    student.accumulate(samples[1::2])
    tensors = {name: p.detach().numpy() for name, p in student._model.named_parameters()}
    return [student.update(1e-3), tensors]


def test_restarted_stages_continue_bit_by_bit_and_keep_a_tied_head_equal(folder: Path, tmp_path: Path) -> None:
    first = run_ranks(2, interrupted, folder=folder, checkpoint=tmp_path / "step", phase="first")
    second = run_ranks(2, interrupted, folder=folder, checkpoint=tmp_path / "step", phase="second")

    for before, after in zip(first, second, strict=True):
        assert after[0] == before[0]
        assert all((after[1][name] == before[1][name]).all() for name in before[1])
    embedding, head = (
        stage[1][name]
        for stage, name in zip(first, ("embedding.word_embeddings.weight", "output_layer.weight"), strict=True)
    )
    assert (embedding == head).all()
