"""Low-rank adapters: what is trained, what engines and the exported model get, and what PEFT would read.

In float64 (double_precision.py): B starts at 0, where Adam's first steps are as large for a rounding error as for a
gradient.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from double_precision import PARITY, DoublePrecision, train_in_float64, transformers_model
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step
from safetensors.torch import load_file

STEPS = 3
RANK, ALPHA = 4, 12.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("student") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("student") / "mixture", "qwen3-moe")


def train(folder: Path, out: Path, **split: Any) -> dict[str, Any]:
    from distill_workers.megatron.student import MegatronStudent

    train_in_float64()
    trainer = make_trainer(**split)
    student = MegatronStudent(make_spec(trainer={**trainer, "lora": {"rank": RANK, "alpha": ALPHA}}), folder)
    before = dict(student.hf_tensors())
    trained = {name for name, p in student._model.named_parameters() if p.requires_grad}
    stats = [train_step(student, make_samples(12, seed=step), 1e-2) for step in range(STEPS)]
    student.export(out / "model")
    samples = make_samples(4, seed=9)
    return {"before": before, "stats": stats, "trained": trained, "logprobs": student.logprobs(samples)}


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("alone")
    (found,) = run_ranks(1, train, folder=folder, out=out)
    return found, out


@pytest.fixture(scope="module")
def mixture_alone(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("mixture-alone")
    (found,) = run_ranks(1, train, folder=mixture, out=out)
    return found, out


def test_fresh_adapters_change_nothing_and_they_alone_are_trained(folder: Path, alone: Any) -> None:
    found, _ = alone
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(found["before"][name], tensor.double()), name
    assert {name.rpartition(".")[2] for name in found["trained"]} == {"lora_a", "lora_b"}
    assert len(found["trained"]) == 2 * 4 * 2, "two matrices for four linear layers in each of two layers"


def test_the_exported_model_computes_what_the_trainer_does(alone: Any) -> None:
    found, out = alone
    model = transformers_model(out / "model")
    for sample, logprobs in zip(make_samples(4, seed=9), found["logprobs"], strict=True):
        with torch.no_grad(), DoublePrecision():
            rows = model(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0].log_softmax(-1)
        first = len(sample.prompt_ids) - 1
        expected = [rows[first + t, token].item() for t, token in enumerate(sample.response_ids)]
        assert logprobs == pytest.approx(expected, abs=PARITY)


def test_the_adapter_alone_makes_the_exported_model_of_the_first_one(folder: Path, alone: Any) -> None:
    _, out = alone
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == RANK and config["lora_alpha"] == ALPHA
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == projections
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    base, whole = load_file(folder / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            change = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"] * (ALPHA / RANK)
            assert change.norm() > 0
            weight = weight + change
        torch.testing.assert_close(whole[name], weight.double(), rtol=PARITY, atol=PARITY)
    assert len(adapter) == 2 * len(projections) * 2


SPLITS: dict[str, dict[str, Any]] = {
    "tensor-2": {"tensor": 2, "ranks": 2},
    "tensor-2-sequence": {"tensor": 2, "ranks": 2, "sequence": True},
    "data-2": {"ranks": 2},
    "pipeline-2": {"pipeline": 2, "ranks": 2},
}


def assert_same_adapters(found: dict[str, Any], out: Path, expected: dict[str, Any], expected_out: Path) -> None:
    """Loss, gradient norm, the merged model, and the adapter alone."""
    for ours, theirs in zip(found["stats"], expected["stats"], strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=PARITY), name
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(out / file), load_file(expected_out / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= PARITY * tensor.norm(), name


@pytest.mark.parametrize("split", SPLITS)
def test_several_ranks_train_the_same_adapters_as_one(folder: Path, alone: Any, tmp_path: Path, split: str) -> None:
    found = run_ranks(SPLITS[split]["ranks"], train, folder=folder, out=tmp_path, **SPLITS[split])
    assert_same_adapters(found[0], tmp_path, *alone)


@pytest.mark.parametrize("split", [{"tensor": 2}, {"expert": 2, "context": 2}], ids=["tensor", "expert-context"])
def test_experts_have_adapters_too_and_two_ranks_train_the_same_ones(
    mixture: Path, mixture_alone: Any, tmp_path: Path, split: dict[str, int]
) -> None:
    expected, out = mixture_alone
    assert sum(".experts." in name for name in expected["trained"]) == 2 * 6 * 2 * 2, "two layers of six experts"
    found, _ = run_ranks(2, train, folder=mixture, out=tmp_path, ranks=2, **split)
    assert_same_adapters(found, tmp_path, expected, out)
