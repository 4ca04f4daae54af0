"""Any bytes in the inbox or on a reply socket: a decoded message, or InvalidInformation, and nothing else.

    python fuzz/fuzz_handover.py [corpus folder, libFuzzer options]     coverage-guided, needs atheris
    python fuzz/fuzz_handover.py --smoke                                some seconds of seeded mutations, needs nothing
"""

from __future__ import annotations

import random
import sys

from portway.errors import InvalidInformation
from portway.wire import handover

SEEDS = [
    handover.encode([handover.Moving("http/1.1", b"GET / HT", b"{}")] * 3, 1)[0],
    handover.encode([handover.Moving("line/1", b"u" * 70_000, b"")], 2)[0],
    handover.encode_answer(True, 0, 3),
    handover.encode_answer(False, 1, 1, "the successor is ending itself"),
]


def one_input(data: bytes) -> None:
    try:
        header = handover.decode_header(data)
        if header.moving is None:
            handover.decode_payload(header.entries, data)
        else:
            again, _ = handover.encode(header.moving, header.generation)
            assert handover.decode_header(again).moving == header.moving
    except InvalidInformation:
        pass
    try:
        handover.decode_answer(data, 252)
    except InvalidInformation:
        pass


def smoke(count: int = 200_000) -> None:
    rng = random.Random(1)
    for _ in range(count):
        data = bytearray(rng.choice(SEEDS))
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    del data[at:]
                case 1:
                    data[at:at] = rng.randbytes(rng.randrange(1, 20))
                case _ if at < len(data):
                    data[at] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
        one_input(bytes(data))
    print(f"fuzz_handover: {count} inputs")


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
