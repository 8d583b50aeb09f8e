"""The endpoint of a teacher: where its servers are, and what an HTTP request needs to reach them."""

from dataclasses import dataclass, field

from distill_api.teacher.endpoint import Endpoint


@dataclass(frozen=True)
class TeacherEndpoint:
    """The endpoint of one teacher. Each address that a host of `names` resolves to is a server of its own."""

    names: tuple[str, ...]
    """HOST:PORT of each."""
    scheme: str = "http"
    base_path: str = ""
    host: str | None = None
    """The Host header, where it is not the server's address."""
    key: str = field(default="", repr=False)
    """The bearer token; empty without one."""

    @classmethod
    def of_address(cls, address: str) -> "TeacherEndpoint":
        """Return the endpoint of HOST:PORT, or of several, separated by commas."""
        return cls(tuple(a.strip() for a in address.split(",") if a.strip()))

    @classmethod
    def of_endpoint(cls, endpoint: Endpoint, key: str) -> "TeacherEndpoint":
        """Return the endpoint that a job names, with its key."""
        name = f"{endpoint.host}:{endpoint.port}"
        usual = {"http": 80, "https": 443}[endpoint.scheme]
        host = endpoint.host if endpoint.port == usual else name
        return cls((name,), endpoint.scheme, endpoint.base_path, host, key)

    @property
    def title(self) -> str:
        """All names, for a message."""
        return ", ".join(self.names)

    @property
    def certificate_name(self) -> str | None:
        """The name that a server's certificate must be for; None without TLS."""
        return self.names[0].rpartition(":")[0].strip("[]") if self.scheme == "https" else None

    def url(self, address: str, path: str) -> str:
        """Return the URL of a path on the server at IP:PORT."""
        return f"{self.scheme}://{address}{self.base_path}{path}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        found = {"Content-Type": "application/json"}
        if self.host is not None:
            found["Host"] = self.host
        if self.key:
            found["Authorization"] = f"Bearer {self.key}"
        return found

    def without_key(self, text: bytes) -> bytes:
        """Return an answer with the key blanked out, so that it may be logged."""
        return text.replace(self.key.encode(), b"***") if self.key else text
