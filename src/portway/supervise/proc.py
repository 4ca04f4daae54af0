"""What /proc says about the processes of a worker: who belongs to it, what it accepts on, how much it holds.

Sources: proc(5) stat, fd, fdinfo (epoll: ``tfd:`` lines), syscall, net/tcp, net/unix. Everything here races with
processes that end; what has ended is left out.
"""

from __future__ import annotations

import os
import platform
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

__all__ = [
    "Process", "accepting", "connections", "find_descriptor", "half_open", "holder_of", "is_held", "members",
    "other_listeners", "rss", "socket_inodes", "table",
]  # fmt: skip

_POLLIN = 1
_TCP_ESTABLISHED, _TCP_SYN_RECV, _TCP_LISTEN = "01", "03", "0A"
# accept, accept4, poll, ppoll, select, pselect6; epoll is seen in fdinfo. asm/unistd.h of each architecture.
_CALLS = {
    "x86_64": {43: "accept", 288: "accept", 7: "poll", 271: "poll", 23: "select", 270: "select"},
    "aarch64": {202: "accept", 242: "accept", 73: "poll", 72: "select"},
}.get(platform.machine(), {})


class Process(NamedTuple):
    pid: int
    parent: int
    group: int
    start: int


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def table() -> dict[int, Process]:
    """Every process that runs now (no zombies), by pid."""
    found = {}
    for pid in _pids():
        stat = _read(f"/proc/{pid}/stat")
        fields = stat[stat.rfind(b")") + 2 :].split()
        if len(fields) > 19 and fields[0] not in (b"Z", b"X"):
            found[pid] = Process(pid, int(fields[1]), int(fields[2]), int(fields[19]))
    return found


def members(leader: int, processes: dict[int, Process]) -> list[int]:
    """`leader`, its descendants and its process group: all that one worker is made of."""
    found = {leader} & processes.keys()
    found |= {one.pid for one in processes.values() if one.group == leader}
    grew = True
    while grew:
        more = {one.pid for one in processes.values() if one.parent in found} - found
        found |= more
        grew = bool(more)
    return sorted(found)


def socket_inodes(pid: int) -> dict[int, int]:
    """Descriptor -> inode of the sockets of a process; empty where that may not be read."""
    found: dict[int, int] = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found[int(name)] = int(target[8:-1])
    return found


def find_descriptor(pids: Iterable[int], inode: int) -> tuple[int, int] | None:
    """(pid, descriptor) of a process that holds this socket."""
    for pid in pids:
        for fd, one in socket_inodes(pid).items():
            if one == inode:
                return pid, fd
    return None


def is_held(inode: int) -> bool:
    """Whether a process other than this one holds the socket, of those we may look into."""
    return find_descriptor((pid for pid in _pids() if pid != os.getpid()), inode) is not None


def holder_of(inode: int) -> tuple[int, str] | None:
    """(pid, command) of some process that holds this socket, of those we may look into."""
    found = find_descriptor(_pids(), inode)
    if found is None:
        return None
    return found[0], _read(f"/proc/{found[0]}/comm").decode(errors="replace").strip()


def accepting(pid: int, wanted: set[int]) -> set[int]:
    """Which of the sockets `wanted` (inodes) this process waits on: in an epoll set, or a thread of it blocks in
    accept, poll or select on one. The latter needs a known architecture and the right to look."""
    sockets = {fd: inode for fd, inode in socket_inodes(pid).items() if inode in wanted}
    if not sockets:
        return set()
    watched = _in_epoll(pid) | (_in_call(pid, max(sockets)) if _CALLS else set())
    return {inode for fd, inode in sockets.items() if fd in watched}


def _in_epoll(pid: int) -> set[int]:
    found: set[int] = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}") != "anon_inode:[eventpoll]":
                continue
        except OSError:
            continue
        for line in _read(f"/proc/{pid}/fdinfo/{name}").splitlines():
            words = line.split()
            if len(words) >= 4 and words[0] == b"tfd:" and int(words[3], 16) & _POLLIN:
                found.add(int(words[1]))
    return found


def _in_call(pid: int, highest: int) -> set[int]:
    found: set[int] = set()
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        words = _read(f"/proc/{pid}/task/{thread}/syscall").split()
        if len(words) < 4 or not words[0].isdigit():
            continue  # b"running"
        call, first, second = _CALLS.get(int(words[0])), int(words[1], 16), int(words[2], 16)
        if call == "accept":
            found.add(first)
        elif call == "poll":
            found |= _polled(pid, first, min(second, 4096))
        elif call == "select":
            found |= _selected(pid, second, min(first, 4096, highest + 1))
    return found


def _memory(pid: int, at: int, size: int) -> bytes:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            file.seek(at)
            return file.read(size)
    except (OSError, ValueError, OverflowError):
        return b""


def _polled(pid: int, at: int, count: int) -> set[int]:
    data = _memory(pid, at, 8 * count)
    data = data[: len(data) - len(data) % 8]
    return {fd for fd, events, _ in struct.iter_unpack("=ihh", data) if events & _POLLIN}


def _selected(pid: int, at: int, count: int) -> set[int]:
    bits = int.from_bytes(_memory(pid, at, (count + 7) // 8), "little") if at else 0
    return {fd for fd in range(count) if bits >> fd & 1}


def rss(pids: Iterable[int]) -> int:
    """Resident bytes of these processes together; shared pages count in each."""
    page = os.sysconf("SC_PAGE_SIZE")
    fields = (_read(f"/proc/{pid}/statm").split() for pid in pids)
    return sum(int(one[1]) * page for one in fields if len(one) > 1)


def _net(name: str) -> Iterator[list[str]]:
    for line in _read(f"/proc/net/{name}").decode(errors="replace").splitlines()[1:]:
        yield line.split()


def connections(generations: dict[int, set[int]], ports: set[int], paths: set[str]) -> dict[int, int]:
    """Generation -> established connections, from the socket inodes its processes hold. A connection that two
    generations hold for a moment counts in both."""
    hexes = {f"{port:04X}" for port in ports}
    established = {int(f[9]) for name in ("tcp", "tcp6") for f in _net(name)
                   if len(f) > 9 and f[3] == _TCP_ESTABLISHED and f[1].rpartition(":")[2] in hexes}  # fmt: skip
    if paths:
        # Column 5 is the state, 3 is connected; an accepted socket carries its listener's bound name.
        established |= {int(f[6]) for f in _net("unix") if len(f) > 7 and f[5] == "03" and _ours(f[7], paths)}
    return {number: len(inodes & established) for number, inodes in generations.items()}


def half_open(ports: set[int]) -> set[tuple[str, str]]:
    """(our end, their end) of TCP connections to these local ports whose client has yet to complete the handshake."""
    hexes = {f"{port:04X}" for port in ports}
    return {(f[1], f[2]) for name in ("tcp", "tcp6") for f in _net(name)
            if len(f) > 9 and f[3] == _TCP_SYN_RECV and f[1].rpartition(":")[2] in hexes}  # fmt: skip


def _ours(bound: str, paths: set[str]) -> bool:
    folder, _, base = bound.rpartition("/")
    return bound in paths or any(folder == os.path.dirname(p) and base.startswith("." + os.path.basename(p)[:20])
                                 for p in paths)  # fmt: skip


def other_listeners(sockaddr: tuple[Any, ...], family: int, ours: set[int]) -> list[int]:
    """Inodes of TCP listeners at exactly this address, or on all addresses of its port, that are not `ours`."""
    v6 = family == socket.AF_INET6
    packed = socket.inet_pton(family, str(sockaddr[0]).partition("%")[0])
    words = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))  # the kernel prints host order words
    here, anywhere = words.hex().upper(), "0" * (32 if v6 else 8)
    port = f"{sockaddr[1]:04X}"
    return [int(f[9]) for f in _net("tcp6" if v6 else "tcp")
            if len(f) > 9 and f[3] == _TCP_LISTEN and f[1].rpartition(":")[2] == port
            and f[1].partition(":")[0] in (here, anywhere) and int(f[9]) not in ours]  # fmt: skip
