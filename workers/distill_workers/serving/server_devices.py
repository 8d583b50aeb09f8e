"""The accelerators of one SGLang server where several share a machine; in a pod a server takes all that it sees."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

ENGINES = "DISTILL_ENGINE_DEVICES"
"""Environment variable of the trainer of `distill run`: the devices of each engine, by number, as JSON."""
CUDA = "CUDA_VISIBLE_DEVICES"
STATIC_SHARE = 0.95
"""Share of the free memory that a server on a shared device may fill: its tokens bound what it really takes."""
LOGPROB_ROWS = 256
"""Rows of logits at once on a shared device: SGLang's 2,048 rows of 150,000 logits in fp32 are 1.2 GB, three times."""


@dataclass(frozen=True)
class ServerDevices:
    """The devices of one server."""

    names: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them: numbers or UUIDs, one for each tensor parallel rank."""
    cache_tokens: int | None = None
    """Size of its key-value cache where other roles are on the same device; None where it has the device to itself."""

    @property
    def shared(self) -> bool:
        return self.cache_tokens is not None

    def environment(self) -> dict[str, str]:
        """Return what the server's environment has by them."""
        of_shared = {"SGLANG_LOGPROB_CHUNK_SIZE": str(LOGPROB_ROWS)} if self.shared else {}
        return {CUDA: ",".join(self.names), **of_shared}

    def flags(self) -> list[str]:
        """Return what the server's command line has by them.

        SGLang's cache is that fraction of the memory which was free when it began, less all that any process has taken
        since (_profile_available_bytes, 0.5.23). Roles that start at once would take from each other by chance, so the
        fraction is as good as all, and the tokens are the bound.
        """
        if not self.shared:
            return []
        return ["--mem-fraction-static", str(STATIC_SHARE), "--max-total-tokens", str(self.cache_tokens)]


def written(engines: Sequence[ServerDevices]) -> str:
    """Return the text of ENGINES."""
    return json.dumps([asdict(devices) for devices in engines])


def of_engine(number: int, environment: Mapping[str, str] = os.environ) -> ServerDevices | None:
    """Return the devices of an engine of this machine; None where none are assigned."""
    text = environment.get(ENGINES)
    if not text:
        return None
    of_one = json.loads(text)[number]
    return ServerDevices(tuple(of_one["names"]), of_one["cache_tokens"])
