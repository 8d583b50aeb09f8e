"""How fast a model is read, exported, and saved as a checkpoint, beside safetensors on the same disk."""

import shutil
import time
from pathlib import Path

import torch
from measured import DEVICE, GB, Rows, free, seconds, synchronise
from models import OF_FILES, make_model, make_spec, make_student


def measure(rows: Rows, work: Path) -> None:
    from safetensors.torch import load_file, save_file

    from distill_workers.megatron.checkpoint import hugging_face

    folder = make_model(work / "model", OF_FILES, "bfloat16")
    free()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def peer() -> None:
        for path in folder.glob("*.safetensors"):
            load_file(path, device=str(DEVICE))

    rows.add("the model's files", size / GB, "GB")
    theirs = seconds(peer)
    free()
    student = make_student(make_spec(folder, "bfloat16"))
    ours = seconds(lambda: hugging_face.load(student._model, student.shape, student.ranks, folder))
    rows.add("load", size / GB / ours, "GB/s, warm")
    rows.add("load by safetensors", size / GB / theirs, "GB/s, warm")
    rows.add("load / safetensors", theirs / ours, "ratio of GB/s", at_least=0.3)

    exported, written = work / "exported", work / "by-safetensors"
    begin = time.perf_counter()
    student.export(exported)
    took = time.perf_counter() - begin
    tensors = {name: tensor for name, tensor in student.hf_tensors() if tensor is not None}
    written.mkdir()
    begin = time.perf_counter()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written / "model.safetensors")
    peers = time.perf_counter() - begin
    rows.add("export, on disk", size / GB / took, "GB/s")
    rows.add("save_file of safetensors, not synced", size / GB / peers, "GB/s")
    same = all(
        torch.equal(tensor.cpu(), tensors[name].cpu())
        for path in exported.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    )
    rows.add("exported tensors that are others", float(not same), "", at_most=0.0, also_tiny=True)
    del tensors
    shutil.rmtree(written)

    checkpoint = work / "checkpoint"
    checkpoint.mkdir()
    synchronise()
    begin = time.perf_counter()
    taken = student.snapshot(copied=True)
    stall = time.perf_counter() - begin
    held = sum(tensor.nbytes for tensor in taken.tensors.values())
    rows.add("a checkpoint before the first step", held / GB, "GB")
    rows.add("its copy to host memory, for which training waits", held / GB / stall, "GB/s")
    del taken
    begin = time.perf_counter()
    student.save(checkpoint)
    rows.add("checkpoint, copied and on disk", held / GB / (time.perf_counter() - begin), "GB/s")
    begin = time.perf_counter()
    student.load(checkpoint)
    synchronise()
    rows.add("checkpoint, read", held / GB / (time.perf_counter() - begin), "GB/s")
