"""Any packets from the other end of a pipe, and any order of reading them: a result or an error of portway.

    python fuzz/fuzz_pipe_channel.py [--smoke] [atheris options]

With atheris installed it is a coverage-guided fuzz target; ``--smoke``, or no atheris, runs some thousand random
inputs from a seed that is printed. It ends with an error when anything but an error of portway comes out, when more
comes out than was put in, or when a descriptor stays open.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys

from portway import _accel, errors

SMOKE = 20_000
FULL = 65536


def packet(turn: int, rest: bytes) -> bytes:
    """The low bits choose the shape: raw bytes, a message, the beginning and the end of a long one, an abandonment."""
    shape = turn % 8
    if shape == 0:
        return rest
    if shape <= 3:
        return struct.pack("<Q", len(rest)) + rest
    if shape == 4:
        return struct.pack("<Q", FULL + len(rest)) + bytes(FULL)
    if shape == 5:
        return struct.pack("<Q", 1 << 56)
    return struct.pack("<Q", int.from_bytes(rest[:8].ljust(8, b"\0"), "little")) + rest


def read(channel, step: int) -> int:
    """One call; how many bytes it took out."""
    what, size = step % 8, (0, 1, 3, 10, 100, FULL - 1, FULL, 1 << 40)[step >> 3 & 7]
    buffer = bytearray(min(size, 2 * FULL))
    try:
        if what == 0:
            return len(channel.receive(timeout=0))
        if what <= 2:
            return len(channel.receive(size, 0))
        if what == 3:
            return channel.receive_into(buffer, 0)
        if what == 4:
            return len(channel.receive_nowait() or b"")
        if what == 5:
            data, total, left = channel.peek(size)
            assert len(data) <= size and total >= len(data) and (left >= 0 or not channel.message)
        elif channel.message:
            channel.read_message = not channel.read_message
    except errors.MoreData as more:
        return more.count
    except (errors.PipeError, errors.OperationTimeout):
        pass
    return 0


def moved(channel):
    """The channel as another process would go on with it."""
    try:
        state = channel.travel_state()
    except errors.PipeError:
        return channel
    message = channel.message
    new = _accel.pipe.Channel(channel.detach(), message=message, access=3, timeout=0)
    new.restore_travel(*state)
    return new


def one_input(data: bytes) -> None:
    """First byte: which type; then the packets, each a byte of shape, a byte of length and so many bytes; after a zero
    length, or 12 packets, the calls."""
    if not data:
        return
    message = data[0] & 1 == 0
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if message else socket.SOCK_STREAM)
    a.setblocking(False)
    at, put, got = 1, 0, 0
    for _ in range(12):
        if at + 1 >= len(data) or not data[at + 1]:
            break
        size = data[at + 1]
        try:
            put += a.send(packet(data[at], data[at + 2 : at + 2 + size]))
        except OSError:
            break
        at += 2 + size
    if data[0] & 2:
        a.close()
    channel = _accel.pipe.Channel(b.detach(), message=message, access=3, timeout=0, read_message=data[0] & 4 == 0)
    try:
        for step in data[at : at + 40]:
            if step == 255:
                channel = moved(channel)
            got += read(channel, step)
        assert got <= put, f"{got} bytes out of {put}"
    finally:
        channel.close()
        a.close()


def smoke(rounds: int) -> None:
    seed = random.randrange(2**32)
    print(f"fuzz_pipe_channel: {rounds} inputs, seed {seed}")
    rng, before = random.Random(seed), len(os.listdir("/proc/self/fd"))
    for _ in range(rounds):
        data = bytes([rng.randrange(8) & rng.choice([6, 7])])
        for _ in range(rng.randrange(8)):
            part = rng.randbytes(rng.choice([1, 3, 8, 9, 20]))
            data += bytes([rng.randrange(256), len(part)]) + part
        one_input(data + b"\0\0" + rng.randbytes(rng.randrange(40)) + b"\xff" * rng.randrange(2) + rng.randbytes(8))
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors stay open"
    print("fuzz_pipe_channel: nothing came out but errors of portway, nothing stayed open")


def main() -> None:
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None or "--smoke" in sys.argv:
        smoke(SMOKE)
        return
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
