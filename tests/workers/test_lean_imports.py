"""What CPU mode imports, and what it leaves out."""

import subprocess
import sys

PROGRAM = """
import gc, sys
from distill_workers.cpu.lean_imports import lean_imports
with lean_imports():
    import distill_workers.trainer
import torch
assert "torch._inductor.compile_fx" not in sys.modules, "PyTorch's compiler was loaded"
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert torch.compile.__module__ == "torch", "torch.compile was not put back"
assert "wandb" not in sys.modules
import wandb
assert wandb.__version__, "a run that is tracked has the real one"
"""
SERVER = """
import logging, os, sys
from distill_workers.serving.server import ARCHITECTURES
os.environ.update([ARCHITECTURES])
from distill_workers.cpu.sglang_launch import import_sglang
import_sglang()
loaded = set(sys.modules)
for name in ("torch._inductor.compile_fx", "megatron.core", "wandb", "sglang.srt.models.gemma"):
    assert name not in loaded, f"{name} was loaded"
from sglang.srt.models.registry import ModelRegistry
trained = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
assert all(ModelRegistry.resolve_model_cls([name])[1] == name for name in trained)
assert set(sys.modules) == loaded, "a server of these imports no other"
logging.disable()
assert ModelRegistry.is_arch_supported("GemmaForCausalLM"), "others are found as before"
"""


def test_a_server_imports_the_code_of_the_models_that_are_trained_and_of_others_when_it_is_asked() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", SERVER], check=True)


def test_the_compiler_is_not_loaded_and_everything_else_is_as_before() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True)
