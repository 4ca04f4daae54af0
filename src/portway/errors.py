"""Every error portway raises.

::

    PortwayError
     +- InvalidAddress            (ValueError)            a name or address that cannot be parsed
     |   +- NameTooLong                                   more than 259 characters
     |   +- PathNotFound                                  a backslash where a kernel object's name has none
     |   +- BadPathName                                   a name that is nothing but a backslash
     +- ConfigurationError        (ValueError)            options or portway.toml that contradict a rule
     +- NotSupported              (OSError)               this kernel, platform or build cannot do it
     +- AccessDenied              (PermissionError)       the kernel or a rule of ours says no
     +- OperationTimeout          (TimeoutError)          the deadline passed; nothing was half-done
     +- OperationAborted                                  cancelled or closed by somebody else meanwhile
     +- ObjectClosed              (ValueError)            used after close()
     +- MissingExtra              (ImportError)           an optional dependency is not installed
     +- HandoffError                                      duplicating a socket
     |   +- ProcessNotFound       (ProcessLookupError)    no such process, or another one by now
     |   +- UnsupportedSocket     (ValueError)            this kind of object cannot be duplicated
     |   +- InvalidInformation    (ValueError)            truncated, tampered with, or not a record at all
     |   +- InformationExpired                            the record's time is over
     |   +- InformationUsed                               somebody claimed it before
     |   +- WrongProcess                                  the record is for another process
     |   +- SourceGone            (ConnectionError)       the source ended before the claim
     |   +- TooManyDescriptors                            a descriptor limit, here or in flight
     |   +- ProviderNotFound      (LookupError)           no hand-off provider of that name
     |   +- HandoffRefused        (ConnectionError)       the other side would not take it; the source still has it
     +- KernelObjectError                                 named objects: mappings, mutexes, events, ...
     |   +- ObjectNotFound        (FileNotFoundError)     no object of that name, or it has just gone
     |   +- AlreadyExists         (FileExistsError)       the name is in use and exclusive=True was asked for
     |   +- InvalidHandle         (TypeError)             an object of another kind
     |   +- NotOwner              (RuntimeError)          a mutex released by a thread or task that does not own it
     |   +- TooManyPosts          (ValueError)            a semaphore released above its maximum; nothing changed
     |   +- TooManyHolders        (OSError)               more processes than an object has places for
     |   +- NotEnoughMemory       (MemoryError)           the file system of the objects is full
     |   +- InvalidParameter      (ValueError)            a size, offset or count that no object can have
     |   +- MappedAlignment       (ValueError)            a view's offset is no multiple of 64 KiB
     |   +- FileInvalid           (ValueError)            an empty file cannot be mapped
     |   +- ViewInUse             (BufferError)           unmap() while exported buffers are alive; nothing was unmapped
     |   +- ObjectCorrupt                                 what lies in shared memory cannot be, or a lock is stuck
     |   +- WaitInterrupted       (InterruptedError)      an alertable wait was ended by portway.alert()
     +- PipeError                 (OSError)               named pipes
     |   +- PipeNotFound          (FileNotFoundError)     no pipe of that name; the message lists where was looked
     |   +- PipeBusy              (BlockingIOError)       every instance is in use, or unread data is in the way
     |   +- BrokenPipe            (BrokenPipeError)       the other end has gone and everything it wrote was read
     |   |   +- NoData                                    a write to an end that has gone
     |   +- PipeEmpty             (BlockingIOError)       a non-blocking read of an empty pipe
     |   +- PipeNotConnected      (ConnectionError)       the server has disconnected this client
     |   +- PipeListening                                 nobody has connected to this instance yet
     |   +- PipeConnected                                 the instance has its client already
     |   +- BadPipe                                       not possible with this type or read mode of pipe
     |   +- MoreData                                      part of a message: `data`, or `count` in the caller's buffer
     |   +- MessageTooLarge                               above max_message; it can still be read in parts
     |   +- MessageAbandoned                              its writer gave up in the middle of this message
     |   +- AmbiguousName                                 several .NET pipes differ from the name only in case
     +- SuperviseError                                    `portway run` and its verbs
         +- AddressInUse          (OSError)               somebody else listens there
         +- NameInUse                                     a service of this name runs already
         +- NotRunning            (LookupError)           no service of this name runs
         +- CommandNotFound       (FileNotFoundError)     the command does not exist or cannot be executed
         +- GenerationFailed                              the new generation did not take over; the old one serves

Every class says in ``code`` which Win32 or Winsock error a Windows program would see in its place; `for_code` goes the
other way. ``hint`` holds the way out when the message has one: ``str(error)`` ends with it.
"""

from __future__ import annotations

__all__ = [
    "AccessDenied", "AddressInUse", "AlreadyExists", "AmbiguousName", "BadPathName", "BadPipe", "BrokenPipe",
    "CommandNotFound", "ConfigurationError", "FileInvalid", "GenerationFailed", "HandoffError", "HandoffRefused",
    "InformationExpired", "InformationUsed", "InvalidAddress", "InvalidHandle", "InvalidInformation",
    "InvalidParameter", "KernelObjectError", "MappedAlignment", "MessageAbandoned", "MessageTooLarge",
    "MissingExtra", "MoreData", "NameInUse", "NameTooLong", "NoData", "NotEnoughMemory", "NotOwner", "NotRunning",
    "NotSupported", "ObjectClosed", "ObjectCorrupt", "ObjectNotFound", "OperationAborted", "OperationTimeout",
    "PathNotFound", "PipeBusy", "PipeConnected", "PipeEmpty", "PipeError", "PipeListening", "PipeNotConnected",
    "PipeNotFound", "PortwayError", "ProcessNotFound", "ProviderNotFound", "SourceGone", "SuperviseError",
    "TooManyDescriptors", "TooManyHolders", "TooManyPosts", "UnsupportedSocket", "ViewInUse", "WaitInterrupted",
    "WrongProcess", "for_code",
]  # fmt: skip


class PortwayError(Exception):
    """The root. ``hint`` is the way out, one sentence or None; ``code`` the Win32 error number of the class."""

    code: int = 0
    hint: str | None

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        # Not super().__init__(message, hint): OSError would read two arguments as (errno, strerror).
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[PortwayError], message: str, hint: str | None) -> PortwayError:
    return kind(message, hint=hint)


class InvalidAddress(PortwayError, ValueError):
    code = 123  # ERROR_INVALID_NAME


class NameTooLong(InvalidAddress):
    code = 206  # ERROR_FILENAME_EXCED_RANGE


class PathNotFound(InvalidAddress):
    code = 3  # ERROR_PATH_NOT_FOUND


class BadPathName(InvalidAddress):
    code = 161  # ERROR_BAD_PATHNAME


class ConfigurationError(PortwayError, ValueError):
    code = 1610  # ERROR_BAD_CONFIGURATION


class NotSupported(PortwayError, OSError):
    code = 50  # ERROR_NOT_SUPPORTED


class AccessDenied(PortwayError, PermissionError):
    code = 5  # ERROR_ACCESS_DENIED


class OperationTimeout(PortwayError, TimeoutError):
    code = 1460  # ERROR_TIMEOUT


class OperationAborted(PortwayError):
    code = 995  # ERROR_OPERATION_ABORTED


class ObjectClosed(PortwayError, ValueError):
    code = 6  # ERROR_INVALID_HANDLE


class MissingExtra(PortwayError, ImportError):
    code = 126  # ERROR_MOD_NOT_FOUND


class HandoffError(PortwayError):
    code = 10022  # WSAEINVAL


class ProcessNotFound(HandoffError, ProcessLookupError):
    code = 87  # ERROR_INVALID_PARAMETER, as OpenProcess gives it


class UnsupportedSocket(HandoffError, ValueError):
    code = 10038  # WSAENOTSOCK


class InvalidInformation(HandoffError, ValueError):
    code = 13  # ERROR_INVALID_DATA


class InformationExpired(HandoffError):
    code = 1460  # ERROR_TIMEOUT


class InformationUsed(HandoffError):
    code = 10022  # WSAEINVAL


class WrongProcess(HandoffError):
    code = 10022  # WSAEINVAL


class SourceGone(HandoffError, ConnectionError):
    code = 10101  # WSAEDISCON


class TooManyDescriptors(HandoffError):
    code = 10024  # WSAEMFILE


class ProviderNotFound(HandoffError, LookupError):
    code = 10106  # WSAEPROVIDERFAILEDINIT


class HandoffRefused(HandoffError, ConnectionError):
    code = 10061  # WSAECONNREFUSED


class KernelObjectError(PortwayError):
    code = 1  # ERROR_INVALID_FUNCTION


class ObjectNotFound(KernelObjectError, FileNotFoundError):
    code = 2  # ERROR_FILE_NOT_FOUND


class AlreadyExists(KernelObjectError, FileExistsError):
    code = 183  # ERROR_ALREADY_EXISTS


class InvalidHandle(KernelObjectError, TypeError):
    code = 6  # ERROR_INVALID_HANDLE


class NotOwner(KernelObjectError, RuntimeError):
    code = 288  # ERROR_NOT_OWNER


class TooManyPosts(KernelObjectError, ValueError):
    code = 298  # ERROR_TOO_MANY_POSTS


class TooManyHolders(KernelObjectError, OSError):
    code = 1450  # ERROR_NO_SYSTEM_RESOURCES


class NotEnoughMemory(KernelObjectError, MemoryError):
    code = 8  # ERROR_NOT_ENOUGH_MEMORY


class InvalidParameter(KernelObjectError, ValueError):
    code = 87  # ERROR_INVALID_PARAMETER


class MappedAlignment(KernelObjectError, ValueError):
    code = 1132  # ERROR_MAPPED_ALIGNMENT


class FileInvalid(KernelObjectError, ValueError):
    code = 1006  # ERROR_FILE_INVALID


class ViewInUse(KernelObjectError, BufferError):
    code = 1224  # ERROR_USER_MAPPED_FILE


class ObjectCorrupt(KernelObjectError):
    code = 1392  # ERROR_FILE_CORRUPT


class WaitInterrupted(KernelObjectError, InterruptedError):
    code = 192  # WAIT_IO_COMPLETION


class PipeError(PortwayError, OSError):
    code = 230  # ERROR_BAD_PIPE


class PipeNotFound(PipeError, FileNotFoundError):
    code = 2  # ERROR_FILE_NOT_FOUND


class PipeBusy(PipeError, BlockingIOError):
    code = 231  # ERROR_PIPE_BUSY


class BrokenPipe(PipeError, BrokenPipeError):
    code = 109  # ERROR_BROKEN_PIPE


class NoData(BrokenPipe):
    code = 232  # ERROR_NO_DATA: the pipe is being closed


class PipeEmpty(PipeError, BlockingIOError):
    code = 232  # ERROR_NO_DATA, as PIPE_NOWAIT gives it


class PipeNotConnected(PipeError, ConnectionError):
    code = 233  # ERROR_PIPE_NOT_CONNECTED


class PipeListening(PipeError):
    code = 536  # ERROR_PIPE_LISTENING


class PipeConnected(PipeError):
    code = 535  # ERROR_PIPE_CONNECTED


class BadPipe(PipeError):
    code = 230  # ERROR_BAD_PIPE


class MoreData(PipeError):
    """`data` is the part that was read (b"" when it went into the caller's buffer), `count` its size, `left` what the
    message has still; the next reads give the rest."""

    code = 234  # ERROR_MORE_DATA

    def __init__(
        self, message: str = "", *, hint: str | None = None, data: bytes = b"", count: int = 0, left: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.data, self.count, self.left = data, count or len(data), left

    def __reduce__(self) -> tuple[object, ...]:
        return _more_data, (self.message, self.hint, self.data, self.count, self.left)


def _more_data(message: str, hint: str | None, data: bytes, count: int, left: int) -> MoreData:
    return MoreData(message, hint=hint, data=data, count=count, left=left)


class MessageTooLarge(PipeError):
    code = 111  # ERROR_BUFFER_OVERFLOW


class MessageAbandoned(PipeError):
    code = 995  # ERROR_OPERATION_ABORTED, by the other end


class AmbiguousName(PipeError):
    code = 2  # ERROR_FILE_NOT_FOUND


class SuperviseError(PortwayError):
    code = 1064  # ERROR_EXCEPTION_IN_SERVICE


class AddressInUse(SuperviseError, OSError):
    code = 10048  # WSAEADDRINUSE


class NameInUse(SuperviseError):
    code = 1056  # ERROR_SERVICE_ALREADY_RUNNING


class NotRunning(SuperviseError, LookupError):
    code = 1062  # ERROR_SERVICE_NOT_ACTIVE


class CommandNotFound(SuperviseError, FileNotFoundError):
    code = 2  # ERROR_FILE_NOT_FOUND


class GenerationFailed(SuperviseError):
    code = 1067  # ERROR_PROCESS_ABORTED


def for_code(code: int) -> type[PortwayError]:
    """The first class of the tree, drawn order, that stands for this Win32 or Winsock code; `PortwayError` if none."""
    pending: list[type[PortwayError]] = [PortwayError]
    while pending:
        kind = pending.pop(0)
        if kind.code == code:
            return kind
        pending += kind.__subclasses__()
    return PortwayError
