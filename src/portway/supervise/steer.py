"""Which listener of a SO_REUSEPORT group gets new connections: a classic BPF program of the kernel's own.

``SO_ATTACH_REUSEPORT_CBPF`` (socket(7)) sets one program for the whole group. It sees the packet that opens a
connection and returns the place of a listener in the group; it needs no privilege. A place that does not exist makes
the kernel choose among all by hash, which is why `sockets.TcpGroup` keeps account of the places.
"""

from __future__ import annotations

import ctypes
import socket
import struct

from ..errors import NotSupported

__all__ = ["steer"]

_SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h
_NET = 0xFFF00000  # SKF_NET_OFF, linux/filter.h: offsets from the IP header on
_LD_B, _LD_H_IND, _LDX, _TAX, _RET = 0x30, 0x48, 0x01, 0x07, 0x06
_AND, _LSH, _RSH, _JA, _JEQ = 0x54, 0x64, 0x74, 0x05, 0x15


def steer(listener: socket.socket, place: int, *, probe: tuple[int, int] | None = None) -> None:
    """From now on new connections of the group that `listener` is in go to its member at `place`, counted from 0.

    ``probe=(port, other)`` sends those that come from source port `port` to the place `other` instead: a readiness
    probe reaches a generation that nobody else reaches. The change is atomic.
    """
    code = [(_RET, 0, 0, place)] if probe is None else _with_probe(place, *probe)
    body = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(body))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)
    except OSError as error:
        raise NotSupported(
            f"SO_ATTACH_REUSEPORT_CBPF: {error.strerror}; new connections cannot be sent to one generation",
            hint="use Linux 4.5 or later, or pass the socket in (--bind fd:NAME) to share it",
        ) from error


def _with_probe(place: int, port: int, other: int) -> list[tuple[int, int, int, int]]:
    return [
        (_LD_B, 0, 0, _NET),  # A = version and header length
        (_RSH, 0, 0, 4),
        (_JEQ, 0, 5, 4),  # not IPv4: to "X = 40"
        (_LD_B, 0, 0, _NET),
        (_AND, 0, 0, 15),
        (_LSH, 0, 0, 2),
        (_TAX, 0, 0, 0),  # X = length of the IPv4 header
        (_JA, 0, 0, 1),
        (_LDX, 0, 0, 40),  # X = length of the IPv6 header
        (_LD_H_IND, 0, 0, _NET),  # A = source port, the first two bytes of the TCP header
        (_JEQ, 0, 1, port),
        (_RET, 0, 0, other),
        (_RET, 0, 0, place),
    ]
