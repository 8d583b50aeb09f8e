"""Where a teacher's servers are, and what a request needs to reach them."""

from dataclasses import dataclass, field

from distill_api.endpoint import Endpoint


@dataclass(frozen=True)
class TeacherEndpoint:
    """Each address that a HOST of `names` has is a server of its own, and is spoken to as such."""

    names: tuple[str, ...]
    """HOST:PORT"""
    scheme: str = "http"
    base_path: str = ""
    host: str | None = None
    """What a server is called in the Host header and in its certificate, where that is not its address."""
    key: str = field(default="", repr=False)

    @classmethod
    def of_address(cls, address: str) -> "TeacherEndpoint":
        """Of HOST:PORT, or several with commas."""
        return cls(tuple(a.strip() for a in address.split(",") if a.strip()))

    @classmethod
    def of_endpoint(cls, endpoint: Endpoint, key: str) -> "TeacherEndpoint":
        name = f"{endpoint.host}:{endpoint.port}"
        usual = {"http": 80, "https": 443}[endpoint.scheme]
        host = endpoint.host if endpoint.port == usual else name
        return cls((name,), endpoint.scheme, endpoint.base_path, host, key)

    @property
    def title(self) -> str:
        return ", ".join(self.names)

    @property
    def certificate_name(self) -> str | None:
        """That a server must prove to have."""
        return self.names[0].rpartition(":")[0].strip("[]") if self.scheme == "https" else None

    def url(self, address: str, path: str) -> str:
        """Of one server's IP:PORT."""
        return f"{self.scheme}://{address}{self.base_path}{path}"

    @property
    def headers(self) -> dict[str, str]:
        found = {"Content-Type": "application/json"}
        if self.host is not None:
            found["Host"] = self.host
        if self.key:
            found["Authorization"] = f"Bearer {self.key}"
        return found

    def without_key(self, text: bytes) -> bytes:
        """Of an answer, which may go into a log."""
        return text.replace(self.key.encode(), b"***") if self.key else text
