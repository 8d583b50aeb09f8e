"""Endpoints: teachers that are served outside the operator's control."""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model, Path, ShortText
from distill_api.rules import Rule, matching

_URL = r"^https?://([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[-._~/A-Za-z0-9]*)?$"
Url = Annotated[
    str,
    Field(max_length=1024),
    matching(_URL, "must be http://HOST or https://HOST, with a :PORT and a /PATH if need be, and nothing else"),
]
_PARTS = re.compile(r"(?P<scheme>https?)://(?P<host>\[[^]]*\]|[^:/]*)(:(?P<port>[0-9]+))?(?P<path>/.*)?")


class Protocol(StrEnum):
    SGLANG = "sglang"
    OPENAI = "openai"


class SecretKey(Model):
    """A key of a Secret of the job's namespace."""

    name: ShortText = Field(description="Name of the Secret.")
    key: ShortText = Field(description="Key of the Secret.")


class Endpoint(Model):
    """Servers outside the operator's control: every address that the host of the URL resolves to is a replica."""

    rules = (
        Rule(
            "model goes with protocol openai, and is needed there: the name that the server serves the model by",
            "has(self.model) == (self.protocol == 'openai')",
            lambda e: (e.model is not None) == (e.protocol is Protocol.OPENAI),
        ),
    )
    url: Url = Field(description="URL of the servers, http(s)://HOST[:PORT][/PATH]; /v1 at its end may be left out.")
    protocol: Protocol = Field(
        Protocol.SGLANG,
        description="Protocol of the servers. sglang: SGLang's own /generate; openai: /v1/completions that returns "
        "log-probabilities of the prompt, by prompt_logprobs as vLLM does, or by echo.",
    )
    model: Path | None = Field(None, description="Name under which the servers serve the model; for protocol openai.")
    vocabulary_size: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = Field(
        None,
        description="Number of token ids that the served model has embedding rows for, vocab_size of its config.json: "
        "no other id is sent to the servers, nor taken from them. By default the trainer sends the tokens of the "
        "student's tokenizer alone, once the servers have named the last of them.",
    )
    key_secret: SecretKey | None = Field(
        None,
        description="Secret key with the token that the trainer sends as a bearer token; by default none is sent. The "
        "operator never reads it.",
    )

    @property
    def scheme(self) -> str:
        return self._part("scheme")

    @property
    def host(self) -> str:
        return self._part("host")

    @property
    def port(self) -> int:
        return int(self._part("port") or (443 if self.scheme == "https" else 80))

    @property
    def base_path(self) -> str:
        """Return the path before those of the protocol, with neither a slash nor /v1 at its end."""
        return self._part("path").rstrip("/").removesuffix("/v1")

    def _part(self, name: str) -> str:
        found = _PARTS.fullmatch(self.url)
        assert found is not None, "the rule of Url holds"
        return found[name] or ""
