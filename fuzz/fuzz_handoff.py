"""Any bytes: a record or `InvalidInformation`; and any messages, with descriptors, on a line to a live inbox.

    python fuzz/fuzz_handoff.py [--smoke] [atheris options]

With atheris installed it is a coverage-guided fuzz target; ``--smoke``, or no atheris, runs some thousand random
inputs from a seed that is printed. It ends with an error when anything but an error of portway comes out, when the
native shortcut and the decoder disagree, or when a descriptor stays open.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time
from contextlib import suppress

import portway
from portway import SocketInformation, _accel
from portway.errors import InvalidInformation, OperationTimeout, PortwayError
from portway.kernel.record import myself
from portway.kernel.session import inbox_name
from portway.wire import handoff as wire
from portway.wire.framing import FrameReader, FrameTooLarge

SMOKE = 40_000


def seeds() -> list[bytes]:
    """Good messages, to mutate."""
    pid, started = myself()
    records = []
    for flags, descriptors, luggage in ((32, 0, b""), (32 | 8, 0, b""), (32 | 4, 0, b"state"), (32, 2, b"x" * 300)):
        head = (flags, 1, 1, 0, pid, started, pid, started, 0, -1, time.monotonic_ns() + 10**12, 1.5, os.urandom(16))
        records.append(wire.encode_record((*head, descriptors), b"", b"", b"kernel", b"", b"", luggage))
    claims = [wire.Claim(wire.nonce_of(one), time.monotonic_ns() + 10**12, 1, wire.proof(one)) for one in records]
    return [
        *records, wire.pack_records(records[:2]), wire.pack_records(records), wire.pack_claims(claims),
        wire.pack_head(records[3], 100), wire.pack_rest(records[3], 100, 5000), wire.pack_ack(7),
        wire.pack_refused("no"),
    ]  # fmt: skip


def decode(data: bytes) -> None:
    """Every decoder on the same bytes."""
    try:
        info = SocketInformation(data)
    except InvalidInformation:
        pass
    else:
        assert bytes(info) == data
        _ = repr(info), info.local_address, info.peer_address, info.options, info.timeout, info.to_text(), info.provider
    for call in (wire.unpack_records, wire.unpack_claims, lambda one: wire.unpack_count(one, 8)):
        with suppress(InvalidInformation):
            call(data)  # type: ignore[operator]
    with suppress(InvalidInformation):
        SocketInformation.from_text(data.decode("latin-1"))
    with suppress(FrameTooLarge):
        FrameReader(1000).receive(data)
    if _accel.handoff.split is not None:
        agree(data)


def agree(data: bytes) -> None:
    """What the native module takes for plain records must be records to the decoder."""
    pid, started = myself()
    count = struct.unpack_from("<H", data, 1)[0] if len(data) > 2 else 0
    plain = _accel.handoff.split(data, list(range(min(count, 300))), pid, started, pid)
    if plain is not None:
        infos = [SocketInformation(one) for one in wire.unpack_records(data)]
        assert [(one.head.expires_ns, bytes(one)) for one in infos] == [one[:2] for one in plain]


class Inbox:
    """A live one, and a line to it that is opened again when the inbox ends it."""

    def __init__(self) -> None:
        self.box = portway.HandoffInbox()
        self.sample = socket.socket(socket.AF_UNIX)
        self.line: socket.socket | None = None
        self.limit = len(os.listdir("/proc/self/fd")) + 8

    def feed(self, data: bytes, count: int) -> None:
        if self.line is None:
            self.line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.line.connect(inbox_name(*myself()))
            self.line.setblocking(False)
        try:
            socket.send_fds(self.line, [data], [self.sample.fileno()] * count)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            self.line.close()
            self.line = None
        self.drain()

    def drain(self) -> None:
        while True:
            try:
                self.box.receive(0).close()
            except OperationTimeout:
                break
            except PortwayError:
                pass

    def check(self) -> None:
        """Nothing stays open but what waits for socket_from() or for the rest of a record."""
        if self.line is not None:
            self.line.close()
            self.line = None
        self.drain()
        for _, fds in self.box._addressed.values():
            for fd in fds:
                os.close(fd)
        self.box._addressed.clear()
        there = len(os.listdir("/proc/self/fd"))
        assert there <= self.limit, f"{there} descriptors are open"


def one_input(inbox: Inbox, data: bytes) -> None:
    """The first byte: how many descriptors come with the rest."""
    count, rest = (data[0] % 6, data[1:]) if data else (0, b"")
    decode(rest)
    inbox.feed(rest, count)


def smoke(rounds: int) -> None:
    seed = random.randrange(2**32)
    print(f"fuzz_handoff: {rounds} inputs, seed {seed}, implementation {_accel.name}")
    rng, good, inbox = random.Random(seed), seeds(), Inbox()
    for turn in range(rounds):
        data = bytearray(rng.choice(good)) if rng.random() < 0.8 else bytearray(rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data) + 1) :]
        one_input(inbox, bytes([rng.randrange(6)]) + bytes(data))
        if turn % 100 == 99:
            inbox.check()
    inbox.check()
    print("fuzz_handoff: nothing came out but errors of portway, nothing stayed open")


def main() -> None:
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None or "--smoke" in sys.argv:
        smoke(SMOKE)
        return
    atheris.instrument_all()
    inbox, turns = Inbox(), 0

    def test(data: bytes) -> None:
        nonlocal turns
        one_input(inbox, data)
        turns += 1
        if turns % 100 == 0:
            inbox.check()

    atheris.Setup(sys.argv, test)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
