"""An SGLang engine serves a mixture of experts, and takes new weights by the names that the trainer gives them."""

from pathlib import Path
from typing import Any

import pytest
from conftest import hf_logprobs, spec_of, tiny_tokenizer, weights_of
from megatron_ranks import make_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(100, 120))


async def test_an_engine_serves_a_mixture_of_experts_and_takes_its_weights(tmp_path: Path) -> None:
    from distill_workers.engine.engine import Engine
    from distill_workers.weight_sync.shared_memory import SharedMemorySync

    models = [make_checkpoint(tmp_path / f"model-{seed}", "qwen3-moe", seed) for seed in (0, 1)]
    for model in models:
        tiny_tokenizer().save_pretrained(model)
    engine: Any = Engine(spec_of(*models), 0, host="127.0.0.1", port=None, log_folder=str(tmp_path))
    await engine.start(str(models[0]))
    try:
        for version, model in enumerate(models):
            if version:
                await SharedMemorySync(bucket_bytes=100_000).push(weights_of(model), version, {0: engine})
            [response] = await engine.sample(PROMPT, seeds=[3], max_new_tokens=12)
            assert set(response.versions) == {version}
            assert response.logprobs == pytest.approx(hf_logprobs(model, PROMPT, response.ids), abs=1e-3)
    finally:
        await engine.stop()
