"""Rows of files, of data sets on disk and on the Hugging Face hub, each with its location."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_api.spec.prompts import Dataset
from distill_workers.data.file_format import Content, format_of
from distill_workers.data.files import files_of
from distill_workers.data.text_rows import Row, text_rows
from distill_workers.failures import PromptError

PARQUET_BATCH = 1024
"""Rows that are converted to Python objects at once."""


def path_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a file, of all files of a folder, or of files that match a * in the last part.

    Raises PromptError.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        raise PromptError(f"{path}: holds the splits {_splits(folder)}")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        yield from saved_rows(folder)
        return
    for file in files_of(folder):
        form = format_of(file)
        yield from parquet_rows(file) if form.content is Content.PARQUET else text_rows(file, form)


def _splits(folder: Path) -> str:
    """Return the splits of a folder that DatasetDict.save_to_disk wrote, and how to name one. Raises PromptError."""
    file = folder / "dataset_dict.json"
    try:
        splits: list[str] = json.loads(file.read_text(encoding="utf-8"))["splits"]
        return f"{', '.join(splits)}; name one, such as {folder / splits[0]}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PromptError(f"{file}: does not name the splits: {one_line(error)}") from None


def parquet_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises PromptError."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", record
    except Exception as error:  # of pyarrow, whose own exceptions have no common type, and of its conversions
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
            "give one that exists there (for a gated one set HF_TOKEN: in podTemplate for main, or for distill run in "
            "the environment), or a path"
        ) from None
    yield from table_rows(table, f"{where}, split {dataset.split},")


def table_rows(table: Any, name: str) -> Iterator[Row]:
    """Yield the rows of a datasets.Dataset. Raises PromptError."""
    number = 0
    try:
        for record in table:
            number += 1
            yield f"{name} row {number}", record
    except Exception as error:  # whatever datasets makes of a damaged file, or of a feature that it cannot decode
        raise PromptError(f"{name} cannot be read after row {number}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]
