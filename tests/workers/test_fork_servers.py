"""The processes that the layer forks are those that it would start: variables, folder, streams, exit codes, ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "preloaded"))

import forked_popen

MODULE = "preloaded_example"
SOURCE = """
import os, signal, sys, time
imported_by = os.getpid()
def prepare(): pass
def main():
    if sys.argv[1] == "sleep":
        print(os.getpid(), flush=True)
        time.sleep(600)
    print(os.getpid() == imported_by, os.environ["SAID"], os.getcwd(), sys.path[0], *sys.argv[1:], flush=True)
    sys.exit(int(sys.argv[1]))
if __name__ == "__main__":
    import preloaded_example
    imported_by = preloaded_example.imported_by
    main()
"""


@pytest.fixture
def preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a fork server of the module above."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    paths = [str(tmp_path), str(Path(forked_popen.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv(forked_popen.VARIABLE, str(tmp_path))
    program = f"import fork_server, sys; fork_server.IMPORTS['{MODULE}'] = 'prepare'; fork_server.main()"
    with (tmp_path / f"{MODULE}.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", program, tmp_path / MODULE, MODULE], stdout=log, stderr=log)
    yield tmp_path
    server.kill()
    server.wait()


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    started: subprocess.Popen[bytes] = forked_popen.PreloadedPopen(
        [sys.executable, "-W", "ignore", "-m", MODULE, *arguments], **options
    )
    return started


def test_a_forked_process_has_its_own_variables_folder_streams_and_exit_code(preloaded: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "elsewhere", tmp_path / "out"
    folder.mkdir()
    with log.open("wb") as out:
        process = start(
            "7", "x y", env={**os.environ, "SAID": "hello"}, cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
    assert isinstance(process, forked_popen.ForkedPopen)
    assert process.wait(60) == 7 and process.poll() == 7
    assert log.read_text() == f"False hello {folder} {folder} 7 x y\n"


def test_what_reads_other_variables_on_import_is_not_forked(preloaded: Path) -> None:
    process = start("3", env={**os.environ, "SAID": "", "OMP_NUM_THREADS": "29"}, stdout=subprocess.DEVNULL)
    assert type(process) is forked_popen.PreloadedPopen
    assert process.wait(60) == 3


def test_a_signal_is_its_exit_code(preloaded: Path) -> None:
    process = start("sleep", env={**os.environ, "SAID": ""}, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_a_forked_process_ends_with_the_one_that_started_it(preloaded: Path, tmp_path: Path) -> None:
    program = (
        "import forked_popen, os, sys, time\n"
        f"p = forked_popen.PreloadedPopen([sys.executable, '-m', '{MODULE}', 'sleep'], stdout=-3)\n"
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "SAID": ""}, stdout=subprocess.PIPE, text=True
    )
    pid = int(starter.communicate()[0])
    forked_popen.wait_for_children_of(starter.pid)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("said", [b"", b"\0\0\1\0{}", b"\0\0\0\2{}"])
def test_a_client_that_goes_in_the_middle_of_its_request_ends_no_other_process(preloaded: Path, said: bytes) -> None:
    process = start("sleep", env={**os.environ, "SAID": ""}, stdout=subprocess.DEVNULL)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(preloaded / MODULE))
            client.sendall(said)
    assert start("3", env={**os.environ, "SAID": ""}, stdout=subprocess.DEVNULL).wait(60) == 3
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)


def test_processes_that_end_as_their_starters_do_leave_the_server_serving(preloaded: Path) -> None:
    program = (
        "import forked_popen, os, signal, sys\n"
        f"p = forked_popen.PreloadedPopen([sys.executable, '-m', '{MODULE}', 'sleep'], stdout=-3)\n"
        "p.kill(); os.kill(os.getpid(), 9)"
    )
    for _ in range(10):
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "SAID": ""}, check=False)
    assert start("3", env={**os.environ, "SAID": ""}, stdout=subprocess.DEVNULL).wait(60) == 3
