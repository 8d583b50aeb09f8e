"""Log-probs and divergences over the vocabulary: memory and time beside plain torch, and TRL's and Liger's if there."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measured import DEVICE, GB, TINY, Rows, free, peak, seconds

HIDDEN, TOP_K = (32, 4) if TINY else (1024, 64)
SIZES = ((64, 500),) if TINY else ((2_048, 151_936), (16_384, 151_936))
DTYPE = torch.float32 if TINY else torch.bfloat16
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(rows: Rows, work: Path) -> None:
    for tokens, vocabulary in SIZES:
        torch.manual_seed(0)
        scale = 3 / HIDDEN**0.5
        hidden = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=DTYPE).requires_grad_()
        head = (torch.randn(vocabulary, HIDDEN, device=DEVICE) * scale).to(DTYPE).requires_grad_()
        ids = torch.randint(vocabulary, (tokens, TOP_K), device=DEVICE)
        teacher_hidden = (hidden + 0.3 * torch.randn_like(hidden)).detach()
        at = f"{tokens:,} x {vocabulary:,}"
        of_tokens = {"ours": own_logprobs(ids), "torch": plain_logprobs(ids)} | liger(ids)
        compare(rows, f"{at}, log-probs", of_tokens, hidden, head)
        of_all = {"ours, top-k and tail": own_divergence(ids), "torch": plain_divergence(teacher_hidden)}
        compare(rows, f"{at}, JSD", of_all | trl(teacher_hidden), hidden, head, same=False)
        del hidden, head, ids, teacher_hidden
        free()


def own_logprobs(ids: torch.Tensor) -> Loss:
    from distill_workers.megatron.logprobs import Vocabulary, token_logprobs

    return lambda hidden, head: -token_logprobs(hidden, head, ids[:, :1], Vocabulary(0, len(head), None))[0].mean()


def plain_logprobs(ids: torch.Tensor) -> Loss:
    return lambda hidden, head: F.cross_entropy((hidden @ head.t()).float(), ids[:, 0])


def own_divergence(ids: torch.Tensor) -> Loss:
    """What training does with support top-k: the teacher's top-k are there as numbers."""
    from distill_api.spec.job_spec import Divergence
    from distill_workers.megatron.logprobs import Vocabulary, token_logprobs
    from distill_workers.objective.divergences import support_divergence

    teacher = torch.full(ids.shape, 0.9 / TOP_K, device=DEVICE).log()

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        student, _ = token_logprobs(hidden, head, ids, Vocabulary(0, len(head), None))
        return support_divergence(Divergence.JSD, student, teacher).mean()

    return loss


def plain_divergence(teacher_hidden: torch.Tensor) -> Loss:
    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = torch.log_softmax((teacher_hidden @ head.t()).float(), -1)
        student = torch.log_softmax((hidden @ head.t()).float(), -1)
        mixture = torch.logaddexp(student, teacher) - 0.6931471805599453
        jsd = 0.5 * (student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture))
        return jsd.sum(-1).mean()

    return loss


def liger(ids: torch.Tensor) -> dict[str, Loss]:
    """Return Liger's fused head and loss, where it is installed."""
    if TINY or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return {"Liger": lambda hidden, head: liger_fused_linear_cross_entropy(hidden, head, ids[:, 0].contiguous())}


def trl(teacher_hidden: torch.Tensor) -> dict[str, Loss]:
    """Return TRL's chunked divergence, where it is installed."""
    if TINY or importlib.util.find_spec("trl") is None:
        return {}
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = ChunkedDivergenceFunction.apply(
            hidden, head, None, teacher_hidden, head.detach(), None, 0.5
        )[0].mean()
        return found

    return {"TRL, chunked": loss}


def compare(
    rows: Rows, what: str, cases: dict[str, Loss], hidden: torch.Tensor, head: torch.Tensor, *, same: bool = True
) -> None:
    """Measure forward and backward of each: bytes over inputs and their gradients, seconds, and both over ours."""
    own: dict[str, float] = {}
    gradients = hidden.nbytes + head.nbytes
    for name, loss in cases.items():

        def both(loss: Loss = loss) -> float:
            hidden.grad = head.grad = None
            value = loss(hidden, head)
            value.backward()
            return float(value.detach())

        try:
            both()
            hidden.grad = head.grad = None
            with peak() as memory:
                value = both()
            found = {"loss": value, "GB": max(0, memory.extra - gradients) / GB, "ms": 1e3 * seconds(both)}
        except (torch.OutOfMemoryError, AttributeError, TypeError, ImportError) as error:
            rows.add(f"{what}, {name}", None, "", note=f"{type(error).__name__}: {str(error)[:120]}")
            free()
            continue
        own = own or found
        for unit in ("GB", "ms"):
            rows.add(f"{what}, {name}", found[unit], unit)
            if found is not own and own[unit]:
                rows.add(f"{what}, {name} / ours", found[unit] / own[unit], f"ratio of {unit}")
        if same and found is not own:
            gap = abs(found["loss"] - own["loss"])
            rows.add(f"{what}, {name}: loss against ours", gap, "nats", at_most=0.01, also_tiny=True)
