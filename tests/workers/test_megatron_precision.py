"""What a student keeps: fp32 behind bf16 weights, a part of the moments on each rank, fewer activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

SMALL = 1e-6
"""A learning rate whose steps are below bf16's: 0.001 of a weight of 0.1 is 2^-8 of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("precision") / "qwen3")


def learn(folder: Path) -> dict[str, Any]:
    """A bf16 student at a tiny rate and then at a large one, beside an fp32 student at the tiny rate."""
    from distill_workers.megatron.student import MegatronStudent

    found: dict[str, Any] = {}
    samples = make_samples(6, top_k=4)
    objective = {"support": "top-k", "divergence": "reverse-kl"}
    for precision in ("float32", "bfloat16"):
        student = MegatronStudent(
            make_spec(trainer=make_trainer(weightDecay=0), precision=precision, objective=objective), folder
        )
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        parameter = dict(student._model.named_parameters())[name]
        main = getattr(parameter, "main_param", parameter)
        before, model_before = main.detach().float().clone(), parameter.detach().clone()
        for _ in range(10):
            train_step(student, samples, SMALL)
        found[precision] = {
            "moved": (main.detach() - before).abs().mean().item(),
            "stayed": (parameter == model_before).float().mean().item(),
            "rounded": torch.equal(parameter.detach(), main.detach().to(parameter.dtype)),
            "dtypes": (str(parameter.dtype), str(main.dtype)),
        }
    found["divergences"] = [train_step(student, samples, 1e-2)["divergence"] for _ in range(10)]
    return found


@pytest.fixture(scope="module")
def learned(folder: Path) -> dict[str, Any]:
    (found,) = run_ranks(1, learn, folder=folder)
    return dict(found)


def test_updates_smaller_than_a_step_of_bf16_are_kept_in_fp32(learned: dict[str, Any]) -> None:
    wide, narrow = learned["float32"], learned["bfloat16"]

    assert narrow["dtypes"] == ("torch.bfloat16", "torch.float32")
    assert narrow["stayed"] > 0.9, "by itself the bf16 weight would never have moved"
    assert narrow["moved"] == pytest.approx(wide["moved"], rel=0.1)
    assert narrow["rounded"]


def test_a_bf16_student_learns(learned: dict[str, Any]) -> None:
    assert learned["divergences"][-1] < 0.6 * learned["divergences"][0]


def recompute(folder: Path) -> dict[str, Any]:
    """One step under each setting: how often the first layer's parts ran forward, and what came of it."""
    from distill_workers.megatron.student import MegatronStudent

    found = {}
    for setting in ("auto", "none", "selective", "full"):
        trainer = make_trainer(max_tokens=100_000) | {"recompute": setting}
        student = MegatronStudent(make_spec(trainer=trainer), folder)
        layer, calls = student._model.decoder.layers[0], {"attention": 0, "mlp": 0}

        def count(name: str, calls: dict[str, int] = calls) -> Any:
            def hook(*unused: Any) -> None:
                calls[name] += 1

            return hook

        layer.self_attention.register_forward_pre_hook(count("attention"))
        layer.mlp.register_forward_pre_hook(count("mlp"))
        stats = train_step(student, make_samples(6), 1e-3)
        found[setting] = {"calls": calls, "stats": stats, "tensors": dict(student.hf_tensors())}
    return found


def test_recomputed_activations_give_the_same_gradient(folder: Path) -> None:
    (found,) = run_ranks(1, recompute, folder=folder)

    assert {setting: of["calls"] for setting, of in found.items()} == {
        "auto": {"attention": 1, "mlp": 1},
        "none": {"attention": 1, "mlp": 1},
        "selective": {"attention": 1, "mlp": 2},
        "full": {"attention": 2, "mlp": 2},
    }
    for setting in ("selective", "full"):
        assert found[setting]["stats"] == found["none"]["stats"]
        for name, tensor in found["none"]["tensors"].items():
            assert torch.equal(found[setting]["tensors"][name], tensor), name


def adapters(folder: Path) -> list[list[float]]:
    """Two steps of frozen weights with adapters, without and with recomputation."""
    from distill_workers.megatron.student import MegatronStudent

    found = []
    for setting in ("none", "full"):
        trainer = make_trainer() | {"recompute": setting, "lora": {"rank": 4}}
        student = MegatronStudent(make_spec(trainer=trainer), folder)
        found.append([train_step(student, make_samples(6), 1e-3)["grad_norm"] for _ in range(2)])
    return found


def test_adapters_of_a_frozen_model_learn_also_where_layers_are_recomputed(folder: Path) -> None:
    (found,) = run_ranks(1, adapters, folder=folder)

    assert found[0] == found[1]
    assert min(found[0]) > 0


def moments(folder: Path, distributed: bool) -> tuple[int, int]:
    """Numbers in the moments and main parameters of this rank, and parameters of the model."""
    from distill_workers.megatron.student import MegatronStudent

    spec = make_spec(trainer=make_trainer(ranks=2, distributed=distributed), precision="bfloat16")
    student = MegatronStudent(spec, folder)
    train_step(student, make_samples(4), 1e-3)
    kept = 0
    for part in student._optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            kept += parameter.numel() + state["exp_avg"].numel() + state["exp_avg_sq"].numel()
    return kept, sum(p.numel() for p in student._model.parameters())


def test_a_distributed_optimiser_keeps_a_part_on_each_rank(folder: Path) -> None:
    for kept, parameters in run_ranks(2, moments, folder=folder, distributed=True):
        assert 0.4 * 3 * parameters < kept < 0.6 * 3 * parameters
