"""The errors of dsfp4: all are Dsfp4Error; each message is a sentence that says what to do."""

__all__ = [
    "CancelledError",
    "CheckpointError",
    "ContextLengthError",
    "CudaError",
    "Dsfp4Error",
    "HubError",
    "IoError",
    "MemoryLimitError",
    "ParameterError",
    "UnsupportedError",
]


class Dsfp4Error(Exception):
    """Base of all errors raised by dsfp4."""


class CheckpointError(Dsfp4Error):
    """A file of a checkpoint is malformed, incomplete or contradicts another one.

    `tensor` is the tensor or field at fault, '' if none; `offset` is a byte in `file`, or -1.
    """

    def __init__(self, message: str, *, file: str = "", tensor: str = "", offset: int = -1) -> None:
        """Keeps the facts as attributes."""
        super().__init__(message)
        self.file = file
        self.tensor = tensor
        self.offset = offset


class UnsupportedError(Dsfp4Error):
    """The checkpoint is sound, but needs something that this version does not do."""


class IoError(Dsfp4Error, OSError):
    """The operating system refused to read or write `file`, at byte `offset` or -1."""

    def __init__(self, message: str, *, file: str = "", offset: int = -1, errno: int = 0) -> None:
        """Keeps the facts as attributes; `errno` as in OSError."""
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.errno = errno

    def __reduce__(self) -> tuple[object, ...]:
        """OSError keeps `errno` apart from the other attributes, and would lose it."""
        return type(self), self.args, {**self.__dict__, "errno": self.errno}


class ParameterError(Dsfp4Error, ValueError):
    """The argument named `parameter` is outside its documented range."""

    def __init__(self, message: str, *, parameter: str = "") -> None:
        """Keeps the parameter's name."""
        super().__init__(message)
        self.parameter = parameter


class ContextLengthError(Dsfp4Error, ValueError):
    """A sequence would grow beyond the context limit; both in tokens."""

    def __init__(self, message: str, *, requested: int = 0, limit: int = 0) -> None:
        """Keeps both numbers."""
        super().__init__(message)
        self.requested = requested
        self.limit = limit


class MemoryLimitError(Dsfp4Error, MemoryError):
    """Memory that is needed is not there, or not within the limit that was given; in bytes."""

    def __init__(self, message: str, *, needed: int = 0, available: int = 0) -> None:
        """Keeps both numbers."""
        super().__init__(message)
        self.needed = needed
        self.available = available


class CancelledError(Dsfp4Error):
    """The call was left because the interpreter is ending."""


class CudaError(Dsfp4Error, RuntimeError):
    """The GPU, its driver or the CUDA backend's library refused a call or cannot be used.

    `code` is CUDA's error number; 0, with an empty `call`, where there is no GPU to call.
    """

    def __init__(
        self, message: str, *, code: int = 0, call: str = "", source: str = "", line: int = 0
    ) -> None:
        """Keeps the facts as attributes."""
        super().__init__(message)
        self.code = code
        self.call = call
        self.source = source
        self.line = line


class HubError(Dsfp4Error):
    """The Hugging Face Hub cannot be reached or refuses to give `repository`, "org/name".

    `status` is HTTP's, 0 if there was no answer.
    """

    def __init__(self, message: str, *, repository: str = "", status: int = 0) -> None:
        """Keeps the facts as attributes."""
        super().__init__(message)
        self.repository = repository
        self.status = status
