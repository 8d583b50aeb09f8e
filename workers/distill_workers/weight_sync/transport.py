"""The transport of a weight push: which of the ways to send weights a job uses."""

from pathlib import Path

from distill_api.spec.job_spec import Spec, WeightSync
from distill_workers.serving.server_devices import of_engine
from distill_workers.weight_sync.base import Sync
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.disk import DiskSync
from distill_workers.weight_sync.shared_memory import SharedMemorySync, bucket_bytes


def choose_transport(spec: Spec, model: Path, folder: Path, *, address: str, one_machine: bool) -> Sync:
    """Return the transport that trainer.weightSync asks for.

    model: the folder of the student's model; folder: shared by trainer and engines, for weights in transit; address:
    this host, as the engines reach it; one_machine: the engines run on it, so that its memory serves in place of a
    disk, and in place of a broadcast where they share a device: NCCL refuses such a group ("Duplicate GPU detected").
    """
    devices = of_engine(0) if one_machine else None
    if spec.trainer.weight_sync is WeightSync.DISTRIBUTED and not (devices and devices.shared):
        return DistributedSync(spec, address)
    if one_machine and (size := bucket_bytes(model)):
        return SharedMemorySync(bucket_bytes=size)
    return DiskSync(folder, model)
