"""Rows of JSONL and Parquet files, of data sets on disk and on the Hugging Face hub, each with its location."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_api.spec.job_spec import Dataset

Row = tuple[str, dict[str, Any]]
"""The location for a message (FILE:LINE, or FILE row NUMBER, from 1), and the fields."""
SUFFIXES = (".jsonl", ".parquet")
PARQUET_MAGIC = b"PAR1"
PARQUET_BATCH = 1024
"""Rows that are converted to Python objects at once."""


class PromptError(ValueError):
    """Raised for prompts that cannot be read; names file, line, field, the value and what is allowed."""


def path_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a file, of all files of a folder, or of files that match a * in the last part.

    Raises PromptError.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise PromptError(f"{path}: holds the splits {', '.join(splits)}; name one, such as {folder / splits[0]}")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        yield from saved_rows(folder)
        return
    for file in files_of(folder):
        yield from parquet_rows(file) if is_parquet(file) else jsonl_rows(file)


def files_of(path: Path) -> list[Path]:
    """Return the data files that a path names. Raises PromptError where there are none."""
    if "*" in path.name:
        found = sorted(p for p in path.parent.glob(path.name) if p.is_file())
        if not found:
            raise PromptError(f"{path}: no file has such a name")
        return found
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise PromptError(
                f"{path}: the folder has no *.jsonl and no *.parquet file, and is none that save_to_disk wrote"
            )
        return found
    if not path.exists():
        raise PromptError(f"{path}: does not exist; mount the volume that holds it through trainer.template.volumes")
    return [path]


def is_parquet(file: Path) -> bool:
    """Return whether a file is Parquet: by its suffix or, with an unknown suffix, by its first bytes."""
    if file.suffix in SUFFIXES:
        return file.suffix == ".parquet"
    try:
        with file.open("rb") as head:
            return head.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from None


def jsonl_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file. Raises PromptError."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_line(line, f"{file}:{number}")
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from None


def parse_line(line: bytes, where: str) -> Row:
    """Return the row in a line of JSONL. Raises PromptError."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise PromptError(f"{where}: is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where}: is {kind(record)}; each line must be one JSON object")
    return where, record


def parquet_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises PromptError."""
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", record
    except (pyarrow.lib.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: cannot be read as Parquet after row {number}: {one_line(error)}") from None


def saved_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of a folder that Dataset.save_to_disk wrote. Raises PromptError."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever datasets, fsspec, pyarrow and json make of a damaged folder
        raise PromptError(f"{folder}: cannot be read as a data set that was saved to disk: {one_line(error)}") from None
    yield from table_rows(table, str(folder))


def hub_rows(dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of a data set on the hub, or in the hub's cache on this machine where HF_HUB_OFFLINE is set.

    Code in its repository never runs. Raises PromptError.
    """
    import datasets

    where = f"data set {dataset.name}"
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, revision=dataset.revision)
    except Exception as error:  # of the network, the hub, the file formats: datasets has no common type for them
        raise PromptError(
            f"{where}: could not be had from the Hugging Face hub (config {dataset.config or 'default'}, split "
            f"{dataset.split}, revision {dataset.revision or 'newest'}): {type(error).__name__}: {one_line(error)}; "
            "give one that exists there (a token for a gated one goes into trainer.template.env as HF_TOKEN), or a path"
        ) from None
    yield from table_rows(table, f"{where}, split {dataset.split},")


def table_rows(table: Any, name: str) -> Iterator[Row]:
    """Yield the rows of a datasets.Dataset. Raises PromptError."""
    number = 0
    try:
        for record in table:
            number += 1
            yield f"{name} row {number}", record
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise PromptError(f"{name} cannot be read after row {number}: {one_line(error)}") from None


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


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]
