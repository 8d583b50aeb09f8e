"""The same model in Hugging Face's code and in ours, on this device: logits, and log-probs of tokens."""

from pathlib import Path

import torch
from measured import DEVICE, Rows, free
from models import SHAPES, make_model, make_samples, make_spec, make_student

LENGTH = 96


def measure(rows: Rows, work: Path) -> None:
    from transformers import Qwen3ForCausalLM

    for name, shape in SHAPES.items():
        folder = make_model(work / name, shape)
        [sample] = make_samples(shape["vocab_size"], 1, LENGTH // 3, LENGTH - LENGTH // 3)
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]], device=DEVICE)
        theirs: dict[str, torch.Tensor] = {}
        for dtype in ("float32", "bfloat16"):
            peer = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(DEVICE).eval()
            with torch.no_grad():
                theirs[dtype] = peer(ids).logits[0].float()
            del peer
            free()
        exact = theirs["float32"]
        spread = float(exact.std())
        for dtype in ("float32", "bfloat16"):
            student = make_student(make_spec(folder, dtype))
            with torch.no_grad():
                positions = torch.arange(ids.shape[1], device=DEVICE)[None]
                hidden = student._model(ids, positions, None)[:, 0]
                ours = (hidden @ student._model.head_weight().t()).float()[:, : shape["vocab_size"]]
            [logprobs] = student.logprobs([sample])
            del student
            free()
            error = float((ours - exact).square().mean().sqrt()) / spread
            if dtype == "float32":
                rows.add(f"{name} {dtype}: logits", error, "rms / std", at_most=1e-4, also_tiny=True)
            else:
                # Both round; neither is the other's reference, so ours may be about as far from fp32 as theirs.
                peers = float((theirs[dtype] - exact).square().mean().sqrt()) / spread
                rows.add(f"{name} {dtype}: logits", error, "rms / std", at_most=1.5 * peers + 1e-3, also_tiny=True)
                rows.add(f"{name} {dtype}: logits of Hugging Face", peers, "rms / std")
            at = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1, device=DEVICE)
            wanted = torch.log_softmax(exact[at], -1).gather(-1, ids[0, at + 1, None])[:, 0]
            gap = float((torch.tensor(logprobs, device=DEVICE) - wanted).abs().mean())
            bound = 1e-4 if dtype == "float32" else 0.15
            rows.add(f"{name} {dtype}: log-probs", gap, "nats, mean", at_most=bound, also_tiny=True)
