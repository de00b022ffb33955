"""Teachers behind HTTP: the client with its answer cache, the server, and the protocol they share."""

from .client import RemoteTeacher
from .transport import RemoteError

__all__ = ["RemoteError", "RemoteTeacher"]
