"""Files are read as what they are, each once, and what is no data is named with what to do about it."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from distill_workers.data.rows import path_rows
from distill_workers.failures import ConfigurationError, PromptError

ROWS = [{"prompt": f"Grüße {n} 😀", "answer": str(n)} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt\tanswer\n" + "".join(f"{row['prompt']}\t{row['answer']}\n" for row in ROWS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in path_rows(str(path))]


def zstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("p.jsonl", LINES.encode("utf-16")),
        ("p.jsonl", LINES.encode("utf-16-le")),
        ("p.jsonl", LINES.encode("utf-16-be")),
        ("p.jsonl", LINES.encode("utf-32")),
        ("p.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("p.ndjson", LINES.encode()),
        ("p.json", json.dumps(ROWS).encode()),
        ("p.json", json.dumps(ROWS, indent=2).encode("utf-8-sig")),
        ("p.jsonl", json.dumps(ROWS, indent=2).encode("utf-16")),
        ("p.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("p.jsonl", "".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("p.jsonl", " ".join(json.dumps(row) for row in ROWS).encode()),
        ("p.jsonl.gz", gzip.compress(LINES.encode())),
        ("p.jsonl", gzip.compress(LINES.encode("utf-8-sig"))),
        ("p.jsonl.zst", zstd(LINES.encode())),
        ("p.jsonl.zst", b"".join(zstd(line.encode()) for line in LINES.splitlines(keepends=True))),
        ("p.jsonl.bz2", bz2.compress(LINES.encode())),
        ("p.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("p.csv", TABLE.replace("\t", ",").encode("utf-8-sig")),
        ("p.csv", TABLE.replace("\t", ";").encode("utf-16")),
        ("p.tsv.gz", gzip.compress(TABLE.encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_text_file_is_read_in_each_form_that_tools_write(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", POINTER, "a pointer of git-LFS.*git lfs pull"),
        ("p.parquet", POINTER, "a pointer of git-LFS"),
        ("p.parquet", LINES.encode(), "cannot be read as Parquet.*does not begin with PAR1"),
        ("p.parquet.gz", gzip.compress(b"PAR1" + bytes(50)), "is Parquet inside gzip; unpack it"),
        ("p.jsonl", b"PK\x03\x04" + bytes(50), "is a zip archive"),
        ("p.jsonl", b"ARROW1\0\0" + bytes(50), "is an Arrow file: write it as Parquet"),
        ("p.jsonl", b"\x80\x04\x95" + bytes(50), "is a pickle, which could run code"),
        ("p.jsonl", b"SQLite format 3\0" + bytes(50), "is an SQLite database"),
        ("p.tar.gz", gzip.compress(b"a".ljust(257, b"\0") + b"ustar\0" + bytes(300)), "is a tar archive; unpack it"),
        ("p.jsonl", b"<!DOCTYPE html>\n<html>", "is HTML or XML, perhaps the error page of a download"),
        ("p.jsonl", b"..data/p.jsonl", r"the text of a symbolic link to \.\.data/p\.jsonl"),
        ("p.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read: "),
        ("p.jsonl.zst", zstd(LINES.encode())[:-20], "cannot be read: "),
        ("p.jsonl.xz", lzma.compress(LINES.encode())[:-20], "cannot be read: "),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xfc"}\n', "p.jsonl:2: byte 12 is not UTF-8; convert the file"),
        ("p.jsonl", LINES.encode("utf-16")[:-3], "p.jsonl:3: is not UTF-16"),
        ("p.jsonl", b'{"a": ' + b"[" * 100_000, "p.jsonl:1: is not JSON"),
        ("p.jsonl", b'{"a": ' + b"1" * 10_000 + b"}", "p.jsonl:1: is not JSON"),
        ("p.json", b'[\n {"a": 1},\n {"a": }\n]', r"p.json:3: is not JSON: Expecting value \(line 3\)"),
        ("p.json", b'[\n {"a": 1}\n {"a": 2}\n]', "p.json:3: is not JSON: expected , or ], found '{'"),
        ("p.json", b'[\n {"a": 1},\n {"a": "', r"p.json:3: is not JSON: Unterminated string"),
        ("p.json", b'[{"a": 1},\n "b"]', "p.json:2: is a string; each element of the list must be a JSON object"),
        ("p.json", b'[{"a": 1}]\n[{"a": 2}]', "p.json:2: is not JSON: more text after the end of the list"),
        ("p.json", b'[{"a": 1}', "p.json:1: is not JSON: expected , or ], found the end of the file"),
        ("p.jsonl", b'{\n "a": 1\n}\n{\n "a" 2\n}\n', r"p.jsonl:4: is not JSON: Expecting ':' delimiter \(line 5\)"),
        ("p.csv", b'prompt,answer\n"a\nb",1\nc,1,2\n', "p.csv:4: has 3 values, and the first line names 2 fields"),
        ("p.csv", b'prompt,answer\n"a,1\nb,2\n', "p.csv:2: is not CSV: unexpected end of data"),
        ("p.csv", b"prompt,prompt\na,1\n", "p.csv:1: names the field 'prompt' more than once"),
        ("p.csv", b"prompt,answer\na,1\n\xfc,2\n", "p.csv:.*is not UTF-8 from here on; convert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_what_it_is(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=rf"^{tmp_path}/.*{sentence}") as refused:
        read(tmp_path / name)
    assert isinstance(refused.value, ConfigurationError)


def test_each_row_of_a_file_names_the_line_in_which_it_begins(tmp_path: Path) -> None:
    def places(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text)
        return [where.rpartition(":")[2] for where, _ in path_rows(str(tmp_path / name))]

    assert places("a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n') == ["2", "4", "5"]
    assert places("a.jsonl", '{\n"a": 1\n}\n{"a": 2}\n') == ["1", "4"]
    assert places("a.csv", 'a\n"1\n2"\n3\n') == ["2", "4"]
    assert places("empty.json", " [ ] \n") == []


def test_a_value_that_is_longer_than_a_chunk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_workers.data import text_rows

    monkeypatch.setattr(text_rows, "CHUNK", 7)
    (tmp_path / "p.json").write_text(json.dumps(ROWS, indent=1))
    assert read(tmp_path / "p.json") == ROWS


def test_a_configmap_is_read_once(tmp_path: Path) -> None:
    """As the kubelet mounts one: a link into ..data, which is a link to a folder with the time in its name."""
    (tmp_path / "..2026_11_29").mkdir()
    (tmp_path / "..2026_11_29" / "train.jsonl").write_text(LINES)
    (tmp_path / "..data").symlink_to("..2026_11_29")
    (tmp_path / "train.jsonl").symlink_to("..data/train.jsonl")
    assert read(tmp_path) == ROWS
    assert read(tmp_path / "*.jsonl") == ROWS


@pytest.mark.parametrize(
    "name",
    [".train.jsonl", ".cache/train.jsonl", "._train.jsonl", ".~lock.train.jsonl#", ".#train.jsonl", "#train.jsonl#",
     "train.jsonl~", ".train.jsonl.swp", "train.jsonl.bak", "train.jsonl.orig", "train.jsonl.lock", "train.jsonl.part",
     "~$train.csv", "_SUCCESS"],
)  # fmt: skip
def test_hidden_files_locks_and_editors_copies_are_not_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(LINES)
    assert read(tmp_path) == ROWS
    assert read(tmp_path / "*") == ROWS


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / ".train.jsonl.bak").write_text(LINES)
    assert read(tmp_path / ".train.jsonl.bak") == ROWS


def test_one_file_under_two_names_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text(LINES)
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "latest.jsonl").symlink_to("a/train.jsonl")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert read(tmp_path) == ROWS
    assert "1 files are read, and 2 left out: " in caplog.text


def test_a_file_with_two_hard_links_is_read_once(tmp_path: Path) -> None:
    """As copies of a volume are that rsync or cp -al made."""
    (tmp_path / "train.jsonl").write_text(LINES)
    os.link(tmp_path / "train.jsonl", tmp_path / "latest.jsonl")
    assert read(tmp_path) == read(tmp_path / "*.jsonl") == ROWS


@pytest.mark.parametrize("name", ["lost+found", "$RECYCLE.BIN", "System Volume Information"])
def test_what_a_file_system_keeps_at_the_root_of_a_volume_is_not_looked_into(name: str, tmp_path: Path) -> None:
    """The workers may not read lost+found, which every ext4 volume has."""
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text(LINES)
    assert read(tmp_path) == ROWS


def test_a_linked_folder_is_part_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.jsonl").write_text(LINES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part").symlink_to("../elsewhere")
    assert read(tmp_path / "data") == ROWS


def test_beside_data_a_json_or_csv_file_describes_it_and_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "stats.csv").write_text("rows\n3\n")
    (tmp_path / "info.json").write_text("{}")
    assert read(tmp_path) == ROWS
    assert "1 files are read, and 2 left out: info.json, stats.csv" in caplog.text


@pytest.mark.parametrize("path", ["/nowhere/train.jsonl", "/nowhere/train"])
def test_a_path_that_is_not_there_hints_at_the_volume(path: str) -> None:
    with pytest.raises(PromptError, match=rf"{path}: does not exist; .* \(distill run: --volume /nowhere=FOLDER\)"):
        read(Path(path))


def test_a_folder_without_data_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_text("x")
    with pytest.raises(PromptError, match=r"has no \*\.jsonl .*; it has train\.xlsx"):
        read(tmp_path)
    with pytest.raises(PromptError, match=r"no file has such a name; left out: train\.jsonl~"):
        (tmp_path / "train.jsonl~").write_text(LINES)
        read(tmp_path / "*.jsonl*")
