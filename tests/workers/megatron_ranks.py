"""Runs a function of a test module as the ranks of a real Megatron trainer: separate processes, gloo, a free port.

The shims of the CPU mode change torch for a whole process, so nothing of Megatron runs in pytest's own. The ranks are
forked from one process that has imported torch, Megatron and transformers: each would take ten seconds to do so.
"""

import atexit
import importlib.util
import json
import math
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distill_api.spec.job_spec import Spec
from distill_workers.data.sample import Sample
from distill_workers.serving.ports import reserve_port

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


def run_ranks(world_size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """What function(**arguments), at the top of a test module, returns on each rank. Raises what a rank raised."""
    port = reserve_port()
    with TemporaryDirectory() as folder:
        call = Path(folder, "call")
        call.write_bytes(pickle.dumps(arguments))
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        source = str(sys.modules[function.__module__].__file__)
        ranks = [
            {
                "environment": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                "arguments": [source, function.__name__, str(call), f"{call}-{rank}"],
            }
            for rank in range(world_size)
        ]
        Forks.get().run(ranks)
        results = [pickle.loads(Path(f"{call}-{rank}").read_bytes()) for rank in range(world_size)]
    for error, _ in results:
        if error is not None:
            raise RuntimeError(error)
    return [result for _, result in results]


class Forks:
    """The process from which ranks are forked. It ends with the process that started it."""

    _instance: "Forks | None" = None

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            cwd=ROOT,
            start_new_session=True,
        )
        atexit.register(self.kill)

    @classmethod
    def get(cls) -> "Forks":
        """The one of this process; another one if it has ended."""
        if cls._instance is None or cls._instance._process.poll() is not None:
            cls._instance = cls()
        return cls._instance

    def run(self, ranks: list[dict[str, Any]]) -> None:
        """Returns when all ranks have ended. Raises TimeoutError, after the end of all."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(ranks).encode() + b"\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], TIMEOUT_SECONDS)[0]:
                raise TimeoutError(f"the ranks have not ended within {TIMEOUT_SECONDS} s")
            assert self._process.stdout.readline() == b"ended\n", "the process that forks the ranks has ended"
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def serve() -> None:
    """Forks the ranks of each request, a line of JSON, and answers when they have ended."""
    from distill_workers.cpu import megatron_shim

    megatron_shim.install()
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3.modeling_qwen3
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import distill_workers.megatron.student  # noqa: F401

    answers = os.dup(1)
    os.dup2(2, 1)  # what ranks print must not be taken for an answer
    for line in sys.stdin.buffer:
        pids = [_fork(rank) for rank in json.loads(line)]
        for pid in pids:
            os.waitpid(pid, 0)
        os.write(answers, b"ended\n")


def _fork(rank: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    try:
        os.environ.update(rank["environment"])
        be_rank(*rank["arguments"])
    finally:
        # Do not wait for peers that are still in a collective.
        sys.stdout.flush()
        os._exit(0)


def be_rank(source: str, name: str, call: str, answer: str) -> None:
    """One rank. Leaves (None or the error, the result) in the file `answer`."""
    result: tuple[str | None, Any]
    try:
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = None, getattr(module, name)(**pickle.loads(Path(call).read_bytes()))
    except Exception:
        result = traceback.format_exc(), None
    Path(answer).write_bytes(pickle.dumps(result))


VOCABULARY = 321
"""Odd: with two tensor parallel ranks it is padded."""


def make_checkpoint(
    folder: Path, kind: str = "qwen3", seed: int = 0, *, dtype: str = "float32", layers: int = 2
) -> Path:
    """A random model, by transformers, of about 120,000 parameters, whose norms and biases are not trivial."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    llama3 = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    experts = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
        "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
        "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**experts, "norm_topk_prob": True}),
        "qwen3-moe-bare": (Qwen3MoeConfig, Qwen3MoeForCausalLM, experts),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "llama": (LlamaConfig, LlamaForCausalLM, {}),
        "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": llama3}),
    }
    config_class, model_class, options = kinds[kind]
    config = config_class(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "initializer_range": 0.1, **options,
    })  # fmt: skip
    torch.manual_seed(seed)
    model = model_class(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_spec(**changes: Any) -> Spec:
    """A CPU job; `changes` are camelCase fields of the spec."""
    base: dict[str, Any] = {
        "accelerator": "none",
        "student": {"model": "/student"},
        "teacher": {"model": "/teacher"},
        "data": {"prompts": {"path": "/prompts", "answerField": "answer", "responseField": "response"}},
        "schedule": {"steps": 3},
    }
    return Spec.model_validate({**base, **changes})


def make_trainer(
    *,
    tensor: int = 1,
    sequence: bool = False,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    ranks: int = 1,
    max_tokens: int = 400,
    **optimizer: Any,
) -> dict[str, Any]:
    """The spec's trainer."""
    return {
        "gpusPerNode": ranks,
        "parallelism": {
            "tensor": tensor, "sequence": sequence, "pipeline": pipeline, "context": context, "expert": expert,
        },
        "maxTokensPerMicroBatch": max_tokens,
        "optimizer": {"learningRate": 1e-3, "epsilon": 1e-6, **optimizer},
    }  # fmt: skip


def make_samples(
    count: int = 12, seed: int = 0, *, top_k: int = 0, longest: int = 40, from_data: int = 0
) -> list[Sample]:
    """Random tokens with plausible scores. Of the first `from_data` samples the data set wrote the response."""
    draw = random.Random(seed)
    samples = []
    for i in range(count):
        response = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))]
        sample = Sample(
            prompt_index=i,
            index_in_group=0,
            prompt_ids=[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 20))],
            response_ids=response,
            engine_logprobs=[-draw.uniform(5, 7) for _ in response],
            token_versions=[0] * len(response),
            truncated=False,
            teacher_logprobs=[-draw.uniform(0.5, 9) for _ in response],
            advantage=draw.uniform(-1, 1),
        )
        if top_k:
            # The teacher's mass on its top-k, 0.9, and on the drawn token agree, also where it is one of the k.
            top_ids, top_logprobs = [], []
            for t, token in enumerate(response):
                ids = draw.sample([v for v in range(VOCABULARY) if v != token], top_k)
                weights = [draw.uniform(0.1, 1) for _ in ids]
                top = [math.log(0.9 * w / sum(weights)) for w in weights]
                if t % 2:
                    ids[0] = token
                    sample.teacher_logprobs[t] = top[0]
                else:
                    sample.teacher_logprobs[t] = math.log(0.01)
                top_ids.append(ids)
                top_logprobs.append(top)
            sample.teacher_top_ids = np.array(top_ids, dtype=np.int32)
            sample.teacher_top_logprobs = np.array(top_logprobs, dtype=np.float32)
        if i < from_data:
            sample.supervised, sample.engine_logprobs, sample.advantage = True, [0.0] * len(response), 0.0
        samples.append(sample)
    return samples


def train_step(student: Any, samples: list[Sample], learning_rate: float, coefficients: Any = None) -> dict[str, float]:
    """One optimiser step on the samples, all in one group."""
    student.accumulate(samples, coefficients)
    found: dict[str, float] = student.update(learning_rate)
    return found


if __name__ == "__main__":
    serve()
