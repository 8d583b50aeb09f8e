"""What CPU mode imports, and what it leaves out."""

import subprocess
import sys

PROGRAM = """
import gc, sys
from distill_workers.cpu.lean_imports import lean_imports
with lean_imports():
    import distill_workers.trainer
    import sglang.srt.managers.scheduler
import torch
assert "torch._inductor.compile_fx" not in sys.modules, "PyTorch's compiler was loaded"
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert torch.compile.__module__ == "torch", "torch.compile was not put back"
"""


def test_the_compiler_is_not_loaded_and_everything_else_is_as_before() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True)
