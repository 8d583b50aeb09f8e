"""safetensors files are read block by block into tensors that exist already, and a broken one is named as such."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_workers.megatron.checkpoint import tensor_file
from distill_workers.megatron.checkpoint.tensor_file import BadTensorFile, Block, TensorFile, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Matrices that are wider than they are long, and the other way round, and a vector; in three dtypes."""
    torch.manual_seed(0)
    shapes = {"tall": (3000, 40), "wide": (6, 30_000), "vector": (777,)}
    tensors = {f"{name}-{dtype}": torch.randn(shape).to(dtype) for name, shape in shapes.items() for dtype in DTYPES}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    return tmp_path / "some.safetensors"


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_every_block_is_that_of_the_whole_tensor_in_the_dtype_asked_for(
    path: Path, of: torch.dtype, to: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "BUFFER_BYTES", 1000)  # several rounds
    whole = load_file(path)
    blocks = [(0, 3000, 0, 40), (17, 2000, 0, 40), (1, 2999, 3, 20), (0, 6, 0, 30_000), (2, 3, 7, 15_000)]
    with TensorFile(path) as file:
        for row, rows, column, columns in blocks:
            name = f"{'tall' if column + columns <= 40 else 'wide'}-{of}"
            into = torch.full((rows, columns), torch.nan, dtype=to)
            file.read(name, into, first_row=row, first_column=column)
            assert torch.equal(into, whole[name][row : row + rows, column : column + columns].to(to)), name
        vector = torch.full((700,), torch.nan, dtype=to)
        file.read(f"vector-{of}", vector, first_row=77)
        assert torch.equal(vector, whole[f"vector-{of}"][77:].to(to))


def test_a_block_fills_rows_of_a_larger_tensor_and_nothing_beside_them(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(20, 40))
    with TensorFile(path) as file:
        file.read("tall-torch.float32", parameter.data[5:15], first_row=100)
    assert torch.equal(parameter[5:15], load_file(path)["tall-torch.float32"][100:110])
    assert not parameter[:5].any() and not parameter[15:].any()


def test_small_tensors_side_by_side_take_one_call_and_calls_that_bring_less_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"expert-{i}": torch.randn(3 + i % 5, 4) for i in range(1500)}
    write(tmp_path / "x", tensors, {})
    calls = []
    preadv = os.preadv

    def at_most(limit: int) -> None:
        def read(descriptor: int, parts: list[memoryview], offset: int) -> int:
            calls.append(len(parts))
            if limit < len(parts):  # in the middle of a part
                parts = [*parts[:limit], parts[limit][:37]]
            return preadv(descriptor, parts, offset)

        monkeypatch.setattr(os, "preadv", read)

    for limit in (2000, 400):
        at_most(limit)
        calls.clear()
        found = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
        with TensorFile(tmp_path / "x") as file:
            # In another order than they have in the file, and one of them by its halves.
            blocks = [Block(name, t) for name, t in reversed(found.items()) if name != "expert-3"]
            halves = [Block("expert-3", found["expert-3"][i : i + 3], first_row=i) for i in (0, 3)]
            file.read_all([*blocks, *halves])
        assert all(torch.equal(found[name], t) for name, t in tensors.items())
        if limit == 2000:
            assert calls == [1024, 477]


def test_what_is_written_is_read_by_safetensors_as_well(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(9, dtype=torch.uint8), "c": torch.randn(4, 4).t().bfloat16()}
    size = write(tmp_path / "x", tensors, {"format": "pt", "note": "µ"})
    assert size == (tmp_path / "x").stat().st_size
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"format": "pt", "note": "µ"}


def test_a_file_that_is_none_or_not_whole_is_refused_with_the_reason(path: Path) -> None:
    content = path.read_bytes()

    def refused(data: bytes, reason: str) -> None:
        broken = path.with_name("broken")
        broken.write_bytes(data)
        with pytest.raises(BadTensorFile, match=reason):
            TensorFile(broken)

    def header(value: object) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + bytes(16)

    refused(b"", "is no safetensors file, or is cut off: it has 0 bytes")
    refused(content[:100], "is no safetensors file, or is cut off: it has 100 bytes")
    refused(content[:-1], "is cut off: .* ends at byte")
    refused(content[:8] + b"\xff" + content[9:], "has a broken safetensors header")
    refused(header([1]), "has a broken safetensors header")
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    refused(header({"x": entry | {"dtype": "F8_E4M3"}}), "x has the dtype F8_E4M3; supported are F64, F32")
    refused(header({"x": entry | {"shape": [2, 3]}}), r"x is \[2, 3\] of F32, but has 16 bytes")
    with pytest.raises(BadTensorFile, match="cannot be read: No such file"):
        TensorFile(path.with_name("absent"))


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(path: Path) -> None:
    with TensorFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(BadTensorFile, match="ended while it was read"):
            file.read("tall-torch.float32", torch.empty(3000, 40))


def test_more_than_the_tensor_has_is_refused(path: Path) -> None:
    with TensorFile(path) as file, pytest.raises(BadTensorFile, match="too small for what is read"):
        file.read("vector-torch.float32", torch.empty(700), first_row=78)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_large(path: str) -> None:
    """In a process of its own: how far reading and converting raise the peak."""
    targets = [torch.zeros(2048, 2048), torch.zeros(2048, 1024), torch.zeros(2048, 2048, dtype=torch.bfloat16)]
    targets += [torch.zeros(2048, 2048) for _ in range(5)]
    before = peak_megabytes()
    with TensorFile(Path(path)) as file:
        for number, target in enumerate(targets):
            file.read(str(number), target)
    print(peak_megabytes() - before)


def test_reading_and_converting_take_no_memory_but_a_small_buffer(tmp_path: Path) -> None:
    save_file({str(n): torch.randn(2048, 2048) for n in range(8)}, tmp_path / "large")  # 134 MB
    found = subprocess.run([sys.executable, __file__, tmp_path / "large"], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 12, "megabytes, mapped pages counted"


if __name__ == "__main__":
    read_large(sys.argv[1])
