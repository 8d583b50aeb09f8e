"""Rows of text files: JSON in lines, in a list or over several lines, and CSV."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from distill_workers.data.file_format import DAMAGED, Content, FileFormat, describe, opened
from distill_workers.failures import PromptError

Row = tuple[str, dict[str, Any]]
"""The location for a message (FILE:LINE, or FILE row NUMBER, from 1), and the fields."""
CHUNK = 1 << 20
"""Characters that are read at once where a value may have any number of lines."""
SPACE = re.compile(r"[ \t\r\n]*")
CONVERT = "convert the file, for example with `iconv -t utf-8`"
ONE_OBJECT = "each line must be one JSON object"


def text_rows(file: Path, form: FileFormat) -> Iterator[Row]:
    """Yield the rows of a text file of any of these forms. Raises PromptError."""
    try:
        with opened(file, form.compression) as stream:
            if form.content is Content.CSV:
                yield from csv_rows(stream, file, form)
            elif form.head.lstrip().startswith("["):
                yield from values(stream, file, form.encoding, in_list=True)
            elif _goes_over_lines(form.head):
                yield from values(stream, file, form.encoding, in_list=False)
            else:
                yield from line_rows(stream, file, form.encoding)
    except DAMAGED as error:
        raise PromptError(f"{file}: cannot be read: {describe(error)}") from None


def line_rows(stream: IO[bytes], file: Path, encoding: str) -> Iterator[Row]:
    """Yield the rows of a JSONL file: one object a line, blank lines left out. Raises PromptError."""
    lines: Iterable[bytes | str] = stream if encoding.startswith("utf-8") else _text(stream, encoding)
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if isinstance(line, bytes) and number == 1 and encoding == "utf-8-sig":
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield parse_line(line, f"{file}:{number}")
    except UnicodeError:
        raise PromptError(f"{file}:{number + 1}: is not {encoding.upper()}; {CONVERT}") from None


def parse_line(line: bytes | str, where: str) -> Row:
    """Return the row in a line of JSONL. Raises PromptError."""
    try:
        record = json.loads(line.decode("utf-8") if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: byte {error.start} is not UTF-8; {CONVERT}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: is not JSON: {error}; {ONE_OBJECT}") from None
    return where, _object(record, where, ONE_OBJECT)


def values(stream: IO[bytes], file: Path, encoding: str, *, in_list: bool) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of a file with one object after the other, in any number of lines each.

    Memory holds one of them and CHUNK characters at a time. Raises PromptError.
    """
    text = _text(stream, encoding)
    decoder = json.JSONDecoder()
    buffer, at, line, ended = "", 0, 1, False
    must = "each element of the list must be a JSON object" if in_list else ONE_OBJECT
    wanted = ["["] if in_list else [""]

    def more() -> None:
        nonlocal buffer, at, ended
        try:
            chunk = text.read(max(CHUNK, len(buffer) - at))  # as much again, so that a long value costs no square
        except UnicodeError:
            raise PromptError(f"{file}:{line}: is not {encoding.upper()} after here; {CONVERT}") from None
        buffer, at, ended = buffer[at:] + chunk, 0, not chunk

    def skip_space() -> None:
        """Move to the next character that is no white space; at the end of the buffer there is none any more."""
        nonlocal at, line
        while True:
            match = SPACE.match(buffer, at)
            assert match is not None
            line += match.group().count("\n")
            at = match.end()
            if at < len(buffer) or ended:
                return
            more()

    while True:
        skip_space()
        here = buffer[at : at + 1]
        if wanted != [""]:
            if here not in wanted or not here:
                found = "the end of the file" if not here else repr(here)
                raise PromptError(f"{file}:{line}: is not JSON: expected {' or '.join(wanted)}, found {found}")
            at += 1
            if here == "]":
                skip_space()
                if at < len(buffer):
                    raise PromptError(f"{file}:{line}: is not JSON: more text after the end of the list")
                return
            skip_space()
            if here == "[" and buffer[at : at + 1] == "]":
                wanted = ["]"]
                continue
        elif not here:
            return
        while True:
            try:
                record, end = decoder.raw_decode(buffer, at)
                break
            except RecursionError as error:
                raise PromptError(f"{file}:{line}: is not JSON: {error}") from None
            except json.JSONDecodeError as error:
                # An error before the end of what was read is one; near it the value may just go on.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
                if ended or not cut:
                    inside = f"line {line + buffer.count(chr(10), at, error.pos)}"
                    raise PromptError(f"{file}:{line}: is not JSON: {error.msg} ({inside}); {must}") from None
                more()
            except ValueError as error:  # a number of too many digits
                raise PromptError(f"{file}:{line}: is not JSON: {error}") from None
        where = f"{file}:{line}"
        line += buffer.count("\n", at, end)
        at = end
        yield where, _object(record, where, must)
        if in_list:
            wanted = [",", "]"]


def csv_rows(stream: IO[bytes], file: Path, form: FileFormat) -> Iterator[Row]:
    """Yield the rows of a CSV file, whose first line names the fields; all values are texts. Raises PromptError."""
    csv.field_size_limit(1 << 30)
    first = form.head.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(_text(stream, form.encoding, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise PromptError(f"{where}: names the field {twice[0]!r} more than once")
                continue
            if len(cells) != len(names):
                raise PromptError(
                    f"{where}: has {len(cells)} values, and the first line names {len(names)} fields "
                    f"(separated by {separator!r}); a value with a separator or a line break must stand in quotes"
                )
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise PromptError(f"{file}:{start}: is not CSV: {error}") from None
    except UnicodeError:
        raise PromptError(f"{file}:{start}: is not {form.encoding.upper()} from here on; {CONVERT}") from None


def kind(value: Any) -> str:
    """Return what JSON calls the type of a value, for a message."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "bytes",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _text(stream: IO[bytes], encoding: str, newline: str = "\n") -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding=encoding, newline=newline)


def _object(record: Any, where: str, must: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise PromptError(f"{where}: is {kind(record)}; {must}")
    return record


def _goes_over_lines(head: str) -> bool:
    """Return whether the first object of a file does not end in the line in which it begins, or another follows it
    there."""
    text = head.lstrip()
    line, ended, _ = text.partition("\n")
    if not text.startswith("{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            return line[error.pos :].startswith("{")
        return bool(ended) and error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False
