"""Processes for code that may hang, exit or abort."""

import subprocess
import sys
from pathlib import Path

MAIN = """
import os, sys
from distill_workers.isolated_process import end, new_process

if __name__ == "__mp_main__":
    print("imported again", file=sys.stderr)
if __name__ == "__main__":
    process = new_process()
    assert process.submit(os.getpid).result() != os.getpid()
    assert process.submit(os.getenv, "PATH").result() == os.environ["PATH"]
    assert sys.modules["__main__"].__file__ == __file__, "the module that runs is there as before"
    end(process)
"""


def test_a_process_does_not_import_the_program_that_it_belongs_to(tmp_path: Path) -> None:
    """A trainer's takes seconds and hundreds of megabytes, in each process of each conversation with an environment."""
    script = tmp_path / "program.py"
    script.write_text(MAIN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
