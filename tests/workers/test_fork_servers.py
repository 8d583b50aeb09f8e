"""The processes that the layer forks are those that it would start: variables, folder, streams, exit codes, ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fork_servers  # which puts its folder into sys.path
import forked_popen
import pytest

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
    command = [sys.executable, "-c", program, tmp_path / MODULE, MODULE, str(os.getpid())]
    with (tmp_path / f"{MODULE}.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
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


def test_a_fork_server_ends_where_who_started_it_is_gone_already(tmp_path: Path) -> None:
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    command = [sys.executable, fork_servers.FOLDER / "fork_server.py", tmp_path / "json", "json", str(nobody.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "who started it is gone already\n")


def test_a_process_that_a_layer_starts_has_no_fork_servers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_TEST_PARALLEL", "0:somewhere")
    monkeypatch.setenv(forked_popen.VARIABLE, str(tmp_path))
    monkeypatch.setattr(fork_servers, "VARIABLES", {"json": {}})
    monkeypatch.setattr(subprocess, "Popen", None)
    fork_servers.start_in_a_layer()
