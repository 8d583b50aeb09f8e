"""Experts split over replicas: the same student, also where a rank has no samples of its own, and its checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

KIND, DENSE = "qwen3-moe", "qwen3"


def split_experts(folder: Path) -> dict[str, Any]:
    """Scores, names, what is held, an export; a save, a step, and that step again from what was saved."""
    from distill_workers.megatron.architecture import UnsupportedModel, read_shape
    from distill_workers.megatron.pipeline import check
    from distill_workers.megatron.student import MegatronStudent

    found: dict[str, Any] = {}
    spec = make_spec(trainer=make_trainer(expert=2, ranks=2, max_tokens=100))
    student = MegatronStudent(spec, folder / KIND)
    found["logprobs"] = student.logprobs(make_samples(6, longest=60))
    found["of one sample"] = student.logprobs(make_samples(1))
    found["names"] = [name for name, tensor in student.hf_tensors() if (tensor is None) == (student.ranks.rank > 0)]
    found["experts"] = sum(".experts." in name for name, _ in student._model.named_parameters())
    student.export(folder / "exported")

    train_step(student, make_samples(8), 1e-3)
    (folder / "step").mkdir(exist_ok=True)
    student.save(folder / "step")
    found["next"] = train_step(student, make_samples(1, seed=1), 1e-3)
    again = MegatronStudent(spec, folder / KIND)
    again.load(folder / "step")
    found["again"] = train_step(again, make_samples(1, seed=1), 1e-3)
    pairs = zip(student._model.parameters(), again._model.parameters(), strict=True)
    found["same"] = all(torch.equal(a, b) for a, b in pairs)

    ranks, dense = student.ranks, read_shape(folder / DENSE)
    for name, shape, refused in (("odd", student.shape, replace(ranks, expert_size=4)), ("dense", dense, ranks)):
        try:
            check(shape, refused)
        except UnsupportedModel as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("experts")
    for kind in (KIND, DENSE):
        make_checkpoint(folder / kind, kind)
    return folder, run_ranks(2, split_experts, folder=folder)


def test_every_rank_is_told_the_logprobs_of_transformers(split: Any) -> None:
    from conftest import hf_logprobs
    from transformers import AutoModelForCausalLM

    folder, ranks = split
    model = AutoModelForCausalLM.from_pretrained(folder / KIND, dtype=torch.float32)
    for name, samples in {"logprobs": make_samples(6, longest=60), "of one sample": make_samples(1)}.items():
        for i, sample in enumerate(samples):
            expected = hf_logprobs(model, sample.prompt_ids, sample.response_ids)
            for rank in ranks:
                assert rank[name][i] == pytest.approx(expected, abs=1e-5)


def test_each_rank_holds_half_of_the_experts(split: Any) -> None:
    assert [rank["experts"] for rank in split[1]] == [2 * 3 * 2] * 2, "of two layers of six experts of two weights"


def test_the_ranks_export_together_what_was_loaded(split: Any) -> None:
    from safetensors.torch import load_file

    folder, ranks = split
    exported, original = (load_file(folder / n / "model.safetensors") for n in ("exported", KIND))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert ranks[0]["names"] == ranks[1]["names"] and set(ranks[0]["names"]) == original.keys()


def test_a_restart_goes_on_bit_by_bit_from_experts_that_were_written_once(split: Any) -> None:
    from safetensors import safe_open

    folder, ranks = split
    for rank in ranks:
        assert rank["again"] == rank["next"] and rank["same"]
    written = [set(safe_open(path, "pt").keys()) for path in sorted((folder / "step").iterdir())]
    assert all(".experts." in name or name.startswith("random/") for name in written[1])
    assert {name for name in written[0] & written[1] if not name.startswith("random/")} == set()


def test_experts_that_cannot_be_dealt_out_are_refused(split: Any) -> None:
    found = split[1][0]
    assert "parallelism.expert 4 does not divide the student's 6 experts; set it to a divisor" in found["odd"]
    assert "parallelism.expert 2: the student has no experts; set it to 1" in found["dense"]
