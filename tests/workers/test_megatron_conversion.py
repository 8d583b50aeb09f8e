"""Hugging Face checkpoints go into Megatron and come out again unchanged, and mean the same there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import VOCABULARY, make_checkpoint, make_samples, make_spec, make_trainer, run_ranks

KINDS = ("qwen3", "qwen3-tied", "qwen2", "llama", "llama3-rope", "qwen3-moe", "qwen3-moe-bare")


def convert(folder: Path, tensor: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """On each rank: read each checkpoint, score samples, export, and iterate."""
    from distill_workers.megatron.student import MegatronStudent

    found = {}
    spec = make_spec(trainer=make_trainer(tensor=tensor, ranks=tensor))
    for kind in kinds:
        student = MegatronStudent(spec, folder / kind)
        samples = make_samples(6, longest=120)
        logprobs = student.logprobs(samples)
        student.export(folder / f"{kind}-from-{tensor}")
        names = [(name, None if t is None else list(t.shape)) for name, t in student.hf_tensors()]
        # In this process, after the shims of the CPU mode, transformers must be what it is without them.
        by_transformers = [hf_logprobs(folder / kind, s.prompt_ids, s.response_ids).tolist() for s in samples[:1]]
        found[kind] = {"logprobs": logprobs, "names": names, "by_transformers": by_transformers}
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        make_checkpoint(folder / kind, kind)
    return folder, {tensor: run_ranks(tensor, convert, folder=folder, tensor=tensor, kinds=KINDS) for tensor in (1, 2)}


Converted = tuple[Path, dict[int, list[dict[str, Any]]]]


def hf_logprobs(path: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        rows = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return rows[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0]


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_those_of_transformers(converted: Converted, kind: str, tensor: int) -> None:
    folder, results = converted

    for rank in results[tensor]:
        for sample, logprobs in zip(make_samples(6, longest=120), rank[kind]["logprobs"], strict=True):
            expected = hf_logprobs(folder / kind, sample.prompt_ids, sample.response_ids)
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)


def test_the_cpu_mode_leaves_transformers_as_it_is(converted: Converted) -> None:
    folder, results = converted
    sample = make_samples(6, longest=120)[0]
    for kind in KINDS:
        expected = hf_logprobs(folder / kind, sample.prompt_ids, sample.response_ids)
        assert results[1][0][kind]["by_transformers"] == [expected.tolist()]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_has_every_parameter_bit_by_bit(converted: Converted, kind: str, tensor: int) -> None:
    folder, _ = converted

    exported, original = state_dict(folder / f"{kind}-from-{tensor}"), state_dict(folder / kind)

    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_an_exported_model_loads_in_transformers_with_equal_logits(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = converted
    ids = torch.arange(40)[None] * 7 % VOCABULARY
    for kind in KINDS:
        models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in (kind, f"{kind}-from-2")]
        with torch.no_grad():
            logits = [model(ids).logits for model in models]
        assert torch.equal(*logits), kind


def test_an_export_brings_the_other_files_and_names_its_dtype(converted: Converted) -> None:
    folder, _ = converted

    assert (folder / "qwen3-from-1" / "tokenizer.json").read_text() == "{}"
    assert (folder / "qwen3-from-1" / "generation_config.json").exists()
    assert json.loads((folder / "qwen3-from-1" / "config.json").read_text())["dtype"] == "float32"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_tensors_are_whole_on_the_first_rank_and_named_alike_on_its_peers(converted: Converted) -> None:
    folder, results = converted
    for kind in KINDS:
        first, second = (rank[kind]["names"] for rank in results[2])
        original = {name: list(t.shape) for name, t in state_dict(folder / kind).items()}
        assert dict(first) == original
        assert [name for name, _ in first] == [name for name, _ in second]
        assert all(shape is None for _, shape in second)


def refusals(folder: Path) -> dict[str, str]:
    """The messages of checkpoints that cannot be trained."""
    from safetensors.torch import load_file, save_file

    from distill_workers.megatron.architecture import UnsupportedModel, read_shape
    from distill_workers.megatron.student import MegatronStudent

    config = json.loads((folder / "qwen3" / "config.json").read_text())
    del config["layer_types"]
    messages = {}

    def refused(name: str, **changes: Any) -> None:
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        (path / "model.safetensors").symlink_to(folder / "qwen3" / "model.safetensors")
        try:
            MegatronStudent(make_spec(), path)
        except UnsupportedModel as error:
            messages[name] = str(error)

    refused("gpt2", model_type="gpt2")
    refused("bias", attention_bias=True)
    refused("yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    refused("nonsense", hidden_size="wide")
    refused("mixed", model_type="qwen3_moe", mlp_only_layers=[1])
    refused("deeper", num_hidden_layers=3)
    refused("shallower", num_hidden_layers=1)
    refused("wider", intermediate_size=256)
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text(json.dumps(config))
    try:
        MegatronStudent(make_spec(), folder / "empty")
    except UnsupportedModel as error:
        messages["empty"] = str(error)

    def broken(name: str, file: str, content: bytes) -> None:
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        (path / file).write_bytes(content)
        try:
            MegatronStudent(make_spec(), path)
        except UnsupportedModel as error:
            messages[name] = str(error)

    whole = (folder / "qwen3" / "model.safetensors").read_bytes()
    broken("cut-off", "model.safetensors", whole[:-100])
    broken("no-header", "model.safetensors", b"PK" + whole)
    broken("bad-index", "model.safetensors.index.json", b"{")
    broken("lost-file", "model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "x.safetensors"}}')

    # An index and several files are read as one checkpoint.
    sharded = folder / "sharded"
    sharded.mkdir()
    tensors = load_file(folder / "qwen3" / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, sharded / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "config.json").write_text(json.dumps(config))
    student = MegatronStudent(make_spec(), sharded)
    same = all(torch.equal(t, tensors[name]) for name, t in student.hf_tensors() if t is not None)
    messages["sharded"] = f"same {same}"

    from distill_workers.megatron.checkpoint import hugging_face

    hugging_face.export(
        student._model, read_shape(sharded), student.ranks, sharded, folder / "resharded", shard_bytes=100_000
    )
    messages["resharded"] = str(len(list((folder / "resharded").glob("model-*.safetensors"))))
    again = MegatronStudent(make_spec(), folder / "resharded")
    messages["again"] = f"same {all(torch.equal(t, tensors[n]) for n, t in again.hf_tensors() if t is not None)}"

    # In bf16, and of its export in fp32 again.
    half = MegatronStudent(make_spec(precision="bfloat16"), folder / "resharded")
    hugging_face.export(half._model, half.shape, half.ranks, folder / "qwen3", folder / "half", shard_bytes=100_000)
    wide = MegatronStudent(make_spec(), folder / "half")
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    messages["wide"] = f"same {all(torch.equal(t, rounded[n]) for n, t in wide.hf_tensors() if t is not None)}"
    return messages


def test_a_model_that_cannot_be_trained_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "qwen3")

    (messages,) = run_ranks(1, refusals, folder=tmp_path)

    assert "model_type gpt2 cannot be trained; supported are llama, qwen2, qwen3" in messages["gpt2"]
    assert "attention_bias must be False for qwen3, not True" in messages["bias"]
    assert "rope type yarn is not supported" in messages["yarn"]
    assert "config.json cannot be read" in messages["nonsense"]
    assert "has no tensor model.layers.2.input_layernorm.weight" in messages["deeper"]
    assert "mlp_only_layers must be [] for qwen3_moe, not [1]" in messages["mixed"]
    assert "have no place in the model" in messages["shallower"]
    assert "model.layers.0.mlp.gate_proj.weight is [128, 64], but config.json asks for [256, 64]" in messages["wider"]
    assert "only safetensors checkpoints are read" in messages["empty"]
    assert "is cut off" in messages["cut-off"] and "is no safetensors file" in messages["no-header"]
    assert "is no index of safetensors files" in messages["bad-index"]
    assert "x.safetensors cannot be read: No such file" in messages["lost-file"]
    assert messages["sharded"] == "same True", "a checkpoint of several files is read by its index"
    assert int(messages["resharded"]) > 1 and messages["again"] == "same True", "and written as several files"
    assert messages["wide"] == "same True", "bf16 is read and written without loss, and read as fp32"
    assert_loads_as_bfloat16(tmp_path)


def assert_loads_as_bfloat16(folder: Path) -> None:
    """The export of several files, in transformers, which knows its dtype and has every tensor rounded once."""
    from transformers import AutoModelForCausalLM

    assert len(list((folder / "half").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    original = state_dict(folder / "qwen3")
    found = {name: p.detach() for name, p in model.named_parameters()}
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name].bfloat16()) for name in original)
