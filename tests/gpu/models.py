"""Random models of real shapes, samples for them, and the trainer's side of a job on one device."""

import os
import random
import socket
from pathlib import Path
from typing import Any

import torch
from measured import DEVICE, TINY

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Sample

Shape = dict[str, Any]
TINY_SHAPE: Shape = {
    "vocab_size": 321, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_SHAPE: Shape = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen3-0.6B's: 0.6 B parameters."""
FILES_SHAPE: Shape = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen3-1.7B's: 3.4 GB in bfloat16."""
SHAPES = {"tiny": TINY_SHAPE} if TINY else {"tiny": TINY_SHAPE, "0.6B": SMALL_SHAPE}
LARGEST = TINY_SHAPE if TINY else SMALL_SHAPE
OF_FILES = TINY_SHAPE if TINY else FILES_SHAPE


def make_model(folder: Path, shape: Shape, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a random Qwen3, whose norms are not trivial, and return its folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {"max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    torch.manual_seed(seed)
    with DEVICE:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, **options)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text("{}")
    return folder


def make_spec(student: Path, dtype: str, *, max_tokens: int = 4096, recompute: str = "auto") -> Spec:
    """Return a job of one rank, of which the student alone is used."""
    return Spec.model_validate({
        "accelerator": "none" if TINY else "nvidia.com/gpu",
        "precision": dtype,
        "student": {"model": str(student)},
        "teacher": {"model": str(student)},
        "data": {"prompts": {"path": "/prompts"}},
        "schedule": {"steps": 1},
        "trainer": {"maxTokensPerMicroBatch": max_tokens, "recompute": recompute},
    })  # fmt: skip


def make_student(spec: Spec) -> Any:
    """Return the trainer's model of the job, as the only rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if TINY:
        from distill_workers.cpu import megatron_shim

        megatron_shim.install()
    from distill_workers.megatron.student import MegatronStudent

    return MegatronStudent(spec, Path(spec.student.model))


def make_samples(vocabulary: int, count: int, prompt: int, response: int) -> list[Sample]:
    """Return random samples of these lengths, with plausible scores."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    return [
        Sample(
            prompt_index=number,
            index_in_group=0,
            prompt_ids=tokens(prompt),
            response_ids=tokens(response),
            engine_logprobs=[-draw.uniform(5, 7) for _ in range(response)],
            token_versions=[0] * response,
            truncated=False,
            teacher_logprobs=[-draw.uniform(5, 9) for _ in range(response)],
        )
        for number in range(count)
    ]
