"""What a run needs of this machine before it begins: folders that it can write, and one with a short name."""

import contextlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from distill_workers.failures import ConfigurationError, Failure, VolumeFull, is_full

LEAST_FREE_BYTES = 32 * 2**20
"""A volume with less is as good as full: Ray's session and the logs of a run's first minute are more."""
SOCKET_BYTES = 107
"""The longest path of a Unix socket on Linux (unix(7), sun_path)."""
SOCKET_NAME_BYTES = 40
"""Room for the names that SGLang, Ray and multiprocessing give to sockets in the folder for temporary files."""
RAYS_FOLDER = Path("/tmp")
"""In which the trainer's private Ray makes its folder (engine/ray_connection.py)."""


def check_machine(output: Path) -> None:
    """Raise ConfigurationError or VolumeFull where a run into the folder `output` would fail for want of a file."""
    check_writable(output, "spec.output.path", "choose another")
    check_temporary_folder()


def check_writable(folder: Path, field: str, remedy: str) -> None:
    """Make a folder and write into it. Raises ConfigurationError for one that cannot be written, VolumeFull for one
    that has no room."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0" * 4096)
    except OSError as error:
        if is_full(error):
            raise full(folder, field) from None
        raise ConfigurationError(
            f"{field}: {folder} cannot be written ({error.strerror or error}); {remedy}, or make it writable"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
        raise full(folder, field)


def full(folder: Path, field: str) -> Failure:
    """Return the error of a volume on which nothing more can be written."""
    usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir()))
    return VolumeFull(
        f"{field}: the volume of {folder} is full ({usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are "
        f"free, and a run needs {LEAST_FREE_BYTES / 2**20:.0f} at least): remove what nobody needs there, or choose "
        "a folder on another volume"
    )


def check_temporary_folder() -> None:
    """Raise ConfigurationError or VolumeFull where SGLang and Ray could not make their files and sockets."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise VolumeFull(
            f"no folder for temporary files can be written ({error}): make room in /tmp, or set TMPDIR to a folder "
            "that can be written"
        ) from None
    longest = SOCKET_BYTES - SOCKET_NAME_BYTES
    if len(os.fsencode(folder)) > longest:
        raise ConfigurationError(
            f"TMPDIR: {folder} has {len(os.fsencode(folder))} bytes, and SGLang and Ray make Unix sockets in it, whose "
            f"paths may have {SOCKET_BYTES}: set TMPDIR to a folder of at most {longest} bytes, such as /tmp"
        )
    check_writable(folder, "TMPDIR", "choose another")
    check_writable(RAYS_FOLDER, "Ray's folder", "Ray keeps its session there")
