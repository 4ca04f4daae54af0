"""A pipe's record and the packets of its messages from outside: any bytes end in an error of ours or in a result.

python fuzz/fuzz_pipe.py [-max_total_time=60]     with atheris
python fuzz/fuzz_pipe.py --smoke | --seconds 60   without: random bytes, and records and packets that are nearly right
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
import tempfile
import time

ROOT = tempfile.mkdtemp(prefix="pw-fuzz-", dir="/tmp")
os.environ["PORTWAY_ROOT"] = ROOT
os.environ["TMPDIR"] = ROOT

import portway  # noqa: E402
from portway import errors  # noqa: E402
from portway.kernel.ofdlock import try_lock  # noqa: E402
from portway.kernel.pipe_end import PipeEnd  # noqa: E402
from portway.kernel.pipe_name import parse_pipe_name  # noqa: E402
from portway.wire import pipe as wire  # noqa: E402

EXPECTED = (errors.InvalidAddress, errors.NotSupported, errors.ObjectCorrupt, errors.PipeError, errors.OperationTimeout,
            errors.AccessDenied, errors.InvalidParameter)  # fmt: skip
HEADER = wire.Header("p", True, wire.Direction.DUPLEX, 255, 0, 0, 50, wire.Flag.SHARED, 1, "")
LISTENING = wire.FREE._replace(generation=1, state=wire.LineState.LISTENING, inode=12345)
FOLDER = f"{ROOT}/portway-pipe-{os.geteuid()}/{parse_pipe_name('p').key}"


def parsers(data: bytes) -> None:
    """Those of wire/, alone."""
    for parse in (
        lambda: wire.unpack_header(data, "fuzz"), lambda: list(wire.unpack_lines(data)),
        lambda: wire.unpack_packet_head(data), lambda: parse_pipe_name(data.decode("utf-8", "surrogateescape")),
    ):  # fmt: skip
        try:
            parse()
        except (*EXPECTED, ValueError) as error:
            assert isinstance(error, (*EXPECTED, ValueError))


def record(data: bytes) -> None:
    """Two bytes: where; the rest is written there into a record that somebody holds; then everything a client asks."""
    page = bytearray(wire.pack_header(HEADER) + wire.pack_line(LISTENING) * 3)
    at = int.from_bytes(data[:2], "little") % len(page)
    page[at : at + len(data) - 2] = data[2:]
    with open(f"{FOLDER}/record", "wb", buffering=0) as file:
        file.write(page)
        for byte in (16, 17, 300):
            try_lock(file.fileno(), byte)
        for call in (
            lambda: portway.NamedPipeClient("p").close(), lambda: portway.wait_pipe("p", 0),
            lambda: portway.call_pipe("p", b"x", timeout=0),
        ):  # fmt: skip
            try:
                call()
            except EXPECTED:
                pass


def packets(data: bytes) -> None:
    """Cut into packets by their first two bytes, sent to a native end that reads all there is in one way or another."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        end = PipeEnd(
            theirs.detach(), message=True, access=3, read_message=True, max_message=1 << 20, timeout=0, name="f"
        )
        with end:
            at, ours_size = 1, 0
            while at + 2 <= len(data) and ours_size < 60_000:
                size = int.from_bytes(data[at : at + 2], "little") % 2000
                ours.send(data[at + 2 : at + 2 + size])
                at, ours_size = at + 2 + size, ours_size + size
            for number in range(40):
                try:
                    way = (data[0] + number) % 5
                    if way == 0:
                        end.receive(timeout=0)
                    elif way == 1:
                        end.receive(3, timeout=0)
                    elif way == 2:
                        end.peek(5)
                    elif way == 3:
                        end.read_mode = "byte"
                    else:
                        end.read_mode = "message"
                except errors.OperationTimeout:
                    if way < 2:
                        break
                except (*EXPECTED, errors.BrokenPipe):
                    pass


def one_input(data: bytes) -> None:
    parsers(data)
    if len(data) > 3:
        record(data)
        packets(data)


def nearly(noise: random.Random) -> bytes:
    """Packets whose heads are right more often than not, with their sizes before them."""
    out = bytes([noise.randrange(256)])
    for _ in range(noise.randrange(8)):
        size = noise.choice([0, 1, 10, 500])
        left = noise.choice([size, size, size + 1, 0, 1 << 40])
        packet = (noise.choice([0, 0, 0, 1, 2]) << 56 | left).to_bytes(8, "little") + noise.randbytes(size)
        out += len(packet).to_bytes(2, "little") + packet
    return out


def main() -> None:
    os.makedirs(FOLDER, mode=0o700)
    os.chmod(os.path.dirname(FOLDER), 0o711)
    try:
        if "--smoke" in sys.argv or "--seconds" in sys.argv:
            limit = 8.0 if "--smoke" in sys.argv else float(sys.argv[sys.argv.index("--seconds") + 1])
            noise, count = random.Random(), 0
            until = time.monotonic() + limit
            while time.monotonic() < until:
                one_input(nearly(noise) if count % 2 else noise.randbytes(noise.choice([8, 40, 400, 3000])))
                count += 1
            print(f"{count} inputs")
            return
        import atheris

        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    main()
