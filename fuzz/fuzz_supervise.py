"""What reaches the supervisor from outside: binds, packets on a control line, notify datagrams, control requests, a
state file. Any bytes: a value, silence, or an error of ours.

    python fuzz/fuzz_supervise.py [corpus folder, libFuzzer options]     coverage-guided, needs atheris
    python fuzz/fuzz_supervise.py --smoke                                some seconds of seeded mutations, needs nothing
"""

from __future__ import annotations

import json
import random
import socket
import sys

from portway.errors import ConfigurationError, InvalidAddress
from portway.supervise.binds import parse_bind
from portway.supervise.control import Control, Request
from portway.supervise.loop import Loop
from portway.supervise.restore import load_plan
from portway.supervise.worker import Worker

STATE = {
    "version": 1, "number": 2, "reloads": 1, "pid": 7, "serving": 2,
    "plan": {"name": "web", "given": {"command": ["x"]}, "file": None, "environ": {}}, "options": {"name": "web"},
    "groups": [{"bind": "127.0.0.1:80", "ready": 0, "members": [{"inode": 5, "generation": 2, "path": ""}]}],
    "generations": [{"number": 2, "phase": "serving", "options": {"name": "web"},
                     "workers": [{"pid": 9, "start": 3, "line_inode": 8}]}],
}  # fmt: skip
SEEDS = [
    b"[::1]:80,name=x", b"unix:/run/x,mode=0660,owner=a:b", b"udp::53", b"fd:web",
    b'{"verb": "hello", "pid": 1, "hook": 1, "adopts": true}', b'{"verb": "status", "connections": 3, "text": "x"}',
    b'{"verb": "drained"}', b"READY=1\nSTATUS=up\nWATCHDOG=1", b'{"verb": "reload", "command": ["x"]}\n',
    json.dumps(STATE).encode(),
]  # fmt: skip
LOOP = Loop()
LISTENER = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
CONTROL = Control(LOOP, LISTENER, lambda request: request.done(ok=True))


def one_input(data: bytes) -> None:
    try:
        parse_bind(data.decode(errors="replace"))
    except InvalidAddress:
        pass
    worker = Worker(1, 0)
    worker.obey(data)
    worker.notified(data)
    assert len(worker.text) <= 500 and (worker.connections is None or isinstance(worker.connections, int))
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        state = None
    try:
        load_plan(state)
    except ConfigurationError:
        pass


def one_request(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        request = Request(CONTROL, ours)
        theirs.sendall(data[:60_000] + b"\n")
        request.read()
        if request.sock.fileno() >= 0:
            request.close()


def smoke(count: int = 40_000) -> None:
    rng = random.Random(1)
    for number in range(count):
        data = bytearray(rng.choice(SEEDS))
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    del data[at : at + rng.randrange(1, 20)]
                case 1:
                    data[at:at] = rng.choice((rng.randbytes(3), b"null", b"[]", b"-1", b'""', b"1e999", b"[" * 2000))
                case _ if at < len(data):
                    data[at] = rng.choice((0, 0xFF, 0x22, 0x2C, rng.randrange(256)))
        one_input(bytes(data))
        if number % 10 == 0:
            one_request(bytes(data))
    print(f"fuzz_supervise: {count} inputs")


def main() -> None:
    if "--smoke" in sys.argv:
        smoke()
        return
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
