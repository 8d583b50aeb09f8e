"""Tiny models, made on the spot, and the real SGLang servers that the tests share."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fork_servers
import pytest_asyncio
from hypothesis import settings

from distill_api.spec.job_spec import Spec

fork_servers.start_in_a_layer()

# hypothesis looks for constants in every module that is loaded, once, while a test draws: in a fresh checkout, where
# nothing of it is cached yet, that alone is longer than its limits, which are of a second.
settings.register_profile("layer", deadline=None)
settings.load_profile("layer")

TinyModel = Callable[..., Path]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Byte-level BPE of 384 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Hello world, what is 12 plus 30? The answer is 42. assistant user system"] * 20, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(folder: Path, seed: int = 0, tie: bool = False, hidden: int = 64, layers: int = 2) -> Path:
    """A random Qwen3 of a few 100,000 parameters in float32, with the tokenizer above."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.15,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny_model(seed) is the folder of a random model; one seed is made once."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(seed: int = 0, **options: Any) -> Path:
        key = "-".join(["m", str(seed), *(f"{k}{v}" for k, v in sorted(options.items()))])
        if key not in made:
            made[key] = make_tiny_model(root / key, seed, **options)
        return made[key]

    return make


def spec_of(student: Path, teacher: Path, /, **changes: Any) -> Spec:
    """A small CPU job; `changes` are camelCase fields of the spec."""
    base: dict[str, Any] = {
        "accelerator": "none",
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher), "requestTimeoutSeconds": 30},
        "data": {"prompts": {"reasoningGym": {"task": "chain_sum", "size": 8}}},
        "rollout": {"maxPromptTokens": 256, "maxResponseTokens": 256},
        "schedule": {"steps": 2},
    }
    return Spec.model_validate({**base, **changes})


@pytest.fixture(scope="session")
def tiny_spec(tiny_model: TinyModel) -> Spec:
    return spec_of(tiny_model(0), tiny_model(1))


@pytest.fixture(scope="session")
def teacher_server(tiny_model: TinyModel, tiny_spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One real teacher (tiny_model(1)) for the whole session."""
    from distill_workers.serving.ports import reserve_port
    from distill_workers.serving.server import SGLangServer

    log = tmp_path_factory.mktemp("teacher") / "teacher.log"
    server = SGLangServer(str(tiny_model(1)), tiny_spec, "teacher", port=reserve_port(), log=log)
    server.start()
    try:
        server.wait_ready(240)
        yield server
    finally:
        server.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(
    tiny_model: TinyModel, tiny_spec: Spec, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """One real engine for the session, in this process. Tests may push weights into it and end its server."""
    from distill_workers.engine.engine import Engine

    engine = Engine(tiny_spec, 0, host="127.0.0.1", port=None, log_folder=str(tmp_path_factory.mktemp("engine")))
    await engine.start(str(tiny_model(0)))
    yield engine
    await engine.stop()


def weights_of(model: Path) -> Any:
    """A WeightSource (distill_workers.weight_sync.buckets) of the weights in a model folder."""
    from safetensors.torch import load_file

    return source_of(list(load_file(model / "model.safetensors").items()))


def source_of(tensors: list[tuple[str, Any]]) -> Any:
    """A WeightSource of tensors at hand."""
    from distill_workers.weight_sync.buckets import WeightPass

    thread = ThreadPoolExecutor(1)
    return lambda buffers: WeightPass(thread, lambda: iter(tensors), buffers)


def hf_logprobs(model: Path | Any, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """log p of each response token by transformers, nats."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) if isinstance(model, Path) else model
    ids = prompt_ids + response_ids
    with torch.no_grad():
        rows = torch.log_softmax(network(torch.tensor([ids])).logits[0].float(), dim=-1)
    return [rows[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(response_ids)]
