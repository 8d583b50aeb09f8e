"""`distill export`: the model of a run, as a Hugging Face folder anywhere, also where the run has not exported it."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from distill_api.job import DistillationJob, parse_job
from distill_api.protocol import ProgressReport
from distill_api.spec.job_spec import Parallelism
from distill_workers.failures import ConfigurationError
from distill_workers.local.model_source import chosen
from distill_workers.local.run import with_volumes
from distill_workers.model_folder import model_folder
from distill_workers.results.model_card import CARD, card_if_possible

log = logging.getLogger(__name__)


def export(folder: Path, destination: Path, *, step: int | None, best: bool, volumes: Mapping[str, str]) -> str:
    """Writes the model, whole or not at all; what was written, as a phrase.

    Raises ConfigurationError where there is no such model or checkpoint, or the student that the run began with, which
    a checkpoint is converted by, is not on this machine; and what a checkpoint that is damaged raises.
    """
    if destination.exists() and any(destination.iterdir()):
        raise ConfigurationError(f"{destination} is not empty: choose another folder, or remove it")
    source = chosen(folder, step=step, best=best)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.step is None:
        _copy(source.folder, destination, _missing_card(folder, volumes))
        return "the model that the run exported"
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))["job"]
    job = parse_job(with_volumes(manifest, dict(volumes)))
    student = model_folder(job.spec.student.model, "spec.student.model")
    # The card shows the job as the run had it, wherever its volumes are here.
    card = card_if_possible(parse_job(manifest), folder, student, source.step)
    convert(job, student, source.folder, destination, card)
    return f"the model of step {source.step}"


def convert(job: DistillationJob, student: Path, checkpoint: Path, destination: Path, card: str | None) -> None:
    """The weights of a checkpoint, by whatever ranks it was written, as a Hugging Face folder with a card."""
    import torch
    import torch.distributed as dist

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        from distill_workers.cpu import megatron_shim

        megatron_shim.install()
    from distill_workers.megatron import lora, parallel
    from distill_workers.megatron.architecture import read_shape
    from distill_workers.megatron.checkpoint import hugging_face, state
    from distill_workers.megatron.model import build_model

    spec = job.spec
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]  # not in __all__
    ranks = parallel.initialise(Parallelism(), on_cpu=on_cpu, timeout_seconds=spec.stall_timeout_seconds)
    shape = read_shape(student, trust_remote_code=spec.trust_remote_code)
    adapters = spec.trainer.lora
    dtype: torch.dtype = getattr(torch, spec.dtype)
    model = build_model(shape, ranks, dtype, seed=spec.seed, fused=adapters is None)
    if adapters is not None:
        hugging_face.load(model, shape, ranks, student)
        lora.attach(model, shape, ranks, adapters, spec.seed)
    state.load_parameters(checkpoint, ranks, shape, model)
    parts = (model, shape, ranks, student, destination)
    hugging_face.export(*parts, trust_remote_code=spec.trust_remote_code, card=card)


def _missing_card(folder: Path, volumes: Mapping[str, str]) -> str | None:
    """Return a card for the model that a release without cards has exported; None where it has one, or none can be
    made: the copy needs nothing but the model."""
    if (folder / "model" / CARD).exists():
        return None
    try:
        report = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))["job"]
        result = ProgressReport.model_validate(report, extra="ignore").result
        student = parse_job(with_volumes(manifest, dict(volumes))).spec.student.model
        job = parse_job(manifest)
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("the model is exported without a card: %s", " ".join(str(error).split())[:300])
        return None
    return None if result is None else card_if_possible(job, folder, Path(student).expanduser(), result.step)


def _copy(model: Path, destination: Path, card: str | None) -> None:
    aside = destination.with_name(f".{destination.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(model, aside)
    if card is not None:
        (aside / CARD).write_text(card, encoding="utf-8")
    if destination.exists():
        destination.rmdir()
    aside.rename(destination)
