"""What `portway doctor` says of named pipes: where they live, who else sees the same place, what lies in the way.

Nobody's server is connected to: only one that is made here.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["dotnet_files", "named_pipes", "same_places"]

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO
_PRIVATE_TMP = re.compile(r"systemd-private-[0-9a-f]+-(.+)-\w{6}(?:/tmp)?$")


def named_pipes() -> tuple[bool, str]:
    """Serves a pipe, opens it, and asks the kernel what `wait_pipe` and `pipe ls` ask."""
    import portway

    from ..kernel.device import Device
    from ..kernel.netinfo import unix_queue
    from ..kernel.pipe_name import dotnet_folder

    name = f"portway-doctor-{os.getpid()}"
    with portway.NamedPipeServer(name, mode="byte", max_instances=2, backlog=2) as server:
        inode = os.fstat(server.serving.listening[0].listener.fileno()).st_ino  # type: ignore[union-attr]
        told = unix_queue(inode) == 0
        with portway.NamedPipeClient(name) as client:
            told = told and unix_queue(inode) == 1
            with server.accept(5) as pipe:
                client.send(b"x")
                pipe.receive(1, timeout=5)
        front = server.dotnet_path
    says = [f"in {Device('pipe').own().path}"]
    if os.environ.get("PORTWAY_ROOT"):
        says.append("PORTWAY_ROOT is set: only programs that have it too meet these pipes")
    if not told:
        says.append("the kernel does not tell of waiting connections (sock_diag): an instance that a client has opened "
                    "and its server not taken yet is shown as listening, and wait_pipe may return early")  # fmt: skip
    tmpdir = os.environ.get("TMPDIR")
    where = f"TMPDIR is {tmpdir}" if tmpdir else "TMPDIR is not set"
    says.append(f".NET's in {dotnet_folder()} ({where}; .NET programs and portway must have the same)")
    room = _room()
    if room <= 0 or front is None:
        says.append(f"its path is so long that {'no name fits' if room <= 0 else 'few names fit'} into the 107 bytes "
                    "of a socket's path: .NET programs cannot be reached, set a shorter TMPDIR for both")  # fmt: skip
    elif room < 40:
        says.append(f"names of up to {room} bytes only are open to .NET, a shorter TMPDIR gives more")
    return room > 0, "; ".join(says)


def _room() -> int:
    """Bytes of a name that .NET's path has room for."""
    from ..kernel.pipe_name import DOTNET_PREFIX, MAX_SOCKET_PATH, dotnet_folder

    return MAX_SOCKET_PATH - len(os.fsencode(os.path.join(dotnet_folder(), DOTNET_PREFIX)))


# -- who else is there ------------------------------------------------------------------------------------------------


def same_places() -> tuple[bool, str]:
    """Whether other programs of the machine see the same /tmp, processes and sockets."""
    says = [one for one in (_private_tmp(), *_namespaces()) if one]
    if says:
        return True, "; ".join(says)
    seen = os.access("/proc/1/root/tmp", os.R_OK)
    return True, "/tmp, processes and sockets are " + (
        "those of process 1" if seen else "the machine's, as far as can be told: process 1 is closed to us"
    )


def _private_tmp() -> str | None:
    mounts = ""
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text()
    unit = private_tmp(mounts)
    if unit:
        return (f"systemd's PrivateTmp of {unit}: pipes in /tmp are seen by that unit only; PrivateTmp=no, "
                "JoinsNamespaceOf=, or an administrator's /run/portway and another TMPDIR for both")  # fmt: skip
    try:
        ours, theirs = os.stat("/tmp"), os.stat("/proc/1/root/tmp")
    except OSError:
        return None
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        return "/tmp is not that of process 1 (a container or a private mount): only programs with this one meet"
    return None


def private_tmp(mountinfo: str) -> str | None:
    """The unit whose private /tmp this process has. Source: proc_pid_mountinfo(5); systemd.exec(5) PrivateTmp."""
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if len(fields) > 4 and fields[4] == "/tmp" and (found := _PRIVATE_TMP.search(fields[3])):
            return found[1]
    return None


def _namespaces() -> list[str]:
    effects = {
        "pid": "clients outside it have pid 0 here",
        "net": "sock_diag tells of its own sockets only, so wait_pipe may return early for a server outside",
        "mnt": "names are shared as far as /tmp (or /run/portway) is the same mount",
    }
    says = []
    with suppress(OSError):
        if os.stat("/proc/self/ns/pid").st_ino != FIRST_PID_NAMESPACE:
            says.append(f"a container's pid namespace: {effects['pid']}")
    for kind, effect in effects.items():
        with suppress(OSError):
            if os.stat(f"/proc/self/ns/{kind}").st_ino != os.stat(f"/proc/1/ns/{kind}").st_ino:
                says.append(f"another {kind} namespace than process 1: {effect}")
    return says


# -- what lies at .NET's paths -----------------------------------------------------------------------------------------


def dotnet_files() -> tuple[bool, str]:
    """Files that are no living pipe of ours; looked at without their owners noticing."""
    from ..kernel.netinfo import look_at
    from ..kernel.pipe_list import list_pipes
    from ..kernel.pipe_name import DOTNET_PREFIX, dotnet_folder

    ours = [one for one in list_pipes() if one.kind == "portway"]
    folder, known = dotnet_folder(), {one.dotnet_path for one in ours if one.dotnet_state in ("ours", "closed")}
    found: dict[str, list[str]] = {}
    try:
        names = sorted(one for one in os.listdir(folder) if one.startswith(DOTNET_PREFIX))
    except OSError as error:
        return False, f"{folder}: {error.strerror}; byte pipes need it, set TMPDIR to a folder that is there"
    for name in names:
        path = os.path.join(folder, name)
        if path not in known and (state := look_at(path).state) != "absent":
            found.setdefault(state, []).append(name)
    meaning = {
        "live": "served by other programs",
        "dead": "stale: their server was killed; a new one of the same user removes them",
        "denied": "another user's",
        "other": "no sockets: they are in the way of pipes with those names",
    }
    says = [f"{_some(found[state])} {what}" for state, what in meaning.items() if state in found]
    shared = os.stat(folder)
    if shared.st_mode & stat.S_IWOTH and not shared.st_mode & stat.S_ISVTX:
        says.append(f"{folder} is writable for everybody without the sticky bit: anybody can take any name there")
    return True, "; ".join(says) or f"nothing but portway's pipes in {folder}"


def _some(names: list[str]) -> str:
    shown = ["".join(sign if sign.isprintable() else "?" for sign in one) for one in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(shown)}{more}:"
