"""The format of a data file, by its first bytes: what it is compressed by, how its text is encoded, what is in it."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, cast

from distill_workers.data.files import data_suffix
from distill_workers.failures import PromptError

HEAD = 1 << 16
"""Bytes by which a file is known."""
NOT_DATA = (
    (b"version https://git-lfs.github.com/spec/", "a pointer of git-LFS, not the file: `git lfs pull` fetches it"),
    (b"PK\x03\x04", "a zip archive (or an Excel sheet): unpack it, or save it as CSV"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"ARROW1", "an Arrow file: write it as Parquet, or name the folder that save_to_disk wrote"),
    (b"\xff\xff\xff\xff", "an Arrow stream: write it as Parquet, or name the folder that save_to_disk wrote"),
    (b"\x89HDF", "an HDF5 file: write it as Parquet"),
    (b"\x93NUMPY", "a numpy file: write it as JSONL"),
    (b"Obj\x01", "an Avro file: write it as Parquet"),
    (b"ORC", "an ORC file: write it as Parquet"),
    (b"SQLite format 3", "an SQLite database: write its table as JSONL"),
    (b"\x80\x02", "a pickle, which could run code: write it as JSONL"),
    (b"\x80\x03", "a pickle, which could run code: write it as JSONL"),
    (b"\x80\x04", "a pickle, which could run code: write it as JSONL"),
    (b"\x80\x05", "a pickle, which could run code: write it as JSONL"),
)
"""The first bytes of what is often found in place of data, and what to do about it."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks and the codec that takes each away; that of UTF-32 begins with one of UTF-16."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What the readers of compressed files raise for one that is damaged or cut short."""


class Content(StrEnum):
    PARQUET = "Parquet"
    CSV = "CSV"
    JSON = "JSON"


@dataclass(frozen=True)
class FileFormat:
    """What a file is."""

    content: Content
    compression: str = ""
    encoding: str = "utf-8"
    head: str = ""
    """Its first characters, of a text."""


def format_of(file: Path) -> FileFormat:
    """Return the format of a file. Raises PromptError for what is no data, with what it is and what to do."""
    try:
        with file.open("rb") as stream:
            compression = _compression(stream.read(8))
        with opened(file, compression) as stream:
            head = stream.read(HEAD)
    except DAMAGED as error:
        raise PromptError(f"{file}: cannot be read: {describe(error)}") from None
    if head.startswith(b"PAR1"):
        if compression:
            raise PromptError(f"{file}: is Parquet inside {compression}; unpack it")
        return FileFormat(Content.PARQUET)
    for magic, what in NOT_DATA:
        if head.startswith(magic):
            raise PromptError(f"{file}: is {what}")
    if head[257:262] == b"ustar":
        raise PromptError(f"{file}: is a tar archive; unpack it")
    if head and data_suffix(file) == ".parquet":
        raise PromptError(f"{file}: cannot be read as Parquet after row 0: it does not begin with PAR1")
    encoding = _encoding(head)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    start = text.lstrip()[:200]
    if start.startswith("<"):
        raise PromptError(f"{file}: is HTML or XML, perhaps the error page of a download: {start[:60]!r}")
    if len(head) < 1024 and "\n" not in text.strip() and Path(text.strip()).name == file.name:
        raise PromptError(
            f"{file}: is the text of a symbolic link to {text.strip()}, as a copy or a checkout without symbolic links "
            "leaves it; copy the file that it names"
        )
    csv = data_suffix(file) in (".csv", ".tsv")
    return FileFormat(Content.CSV if csv else Content.JSON, compression, encoding, text)


def opened(file: Path, compression: str) -> IO[bytes]:
    """Return the bytes of a file, uncompressed. What is wrong with them is raised while they are read (DAMAGED)."""
    match compression:
        case "gzip":
            return cast(IO[bytes], gzip.open(file))
        case "bzip2":
            return cast(IO[bytes], bz2.open(file))
        case "xz":
            return cast(IO[bytes], lzma.open(file))
        case "zstd":
            import pyarrow

            stream: Any = pyarrow.input_stream(str(file), compression="zstd")
            return io.BufferedReader(stream)
    return file.open("rb")


def describe(error: BaseException) -> str:
    """Return what an error of reading says, as the end of a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:500]


def _compression(magic: bytes) -> str:
    known = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"))
    return next((name for start, name in known if magic.startswith(start)), "")


def _encoding(head: bytes) -> str:
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    if head[:1] and head[1:4:2] == b"\0\0":
        return "utf-16-le"
    if head[:1] == b"\0" and head[2:3] == b"\0":
        return "utf-16-be"
    return "utf-8"
