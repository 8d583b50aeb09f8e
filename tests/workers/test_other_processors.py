"""What is asserted of numbers holds with the kernels of another processor: here with those that use no vector unit.

`make test-isa` runs all numerical tests with each set of instructions that this machine has.
"""

import os
import subprocess
import sys
from pathlib import Path

from in_parallel import VARIABLE


def test_split_training_is_the_same_with_the_kernels_of_a_plain_processor(tmp_path: Path) -> None:
    here = Path(__file__).parent
    plain = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | plain
    told = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"),
            *(here / "test_objective_loss.py", here / "test_vocabulary_divergence.py"),
            f"{here / 'test_megatron_student.py'}::test_several_ranks_train_as_one[tensor-2]",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
