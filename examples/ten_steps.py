"""The classic hand-over of a connected socket between two unrelated processes, in its ten steps.

    python examples/ten_steps.py            runs both sides
    python examples/ten_steps.py source PORT CONTROL | destination CONTROL

The source talks to a client, reads more than it answers, and hands the connection to the destination, which the
client never notices.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import portway


def source(port: int, control: str) -> None:
    connection = socket.create_connection(("127.0.0.1", port))  # 1. a live connection
    connection.sendall(b"hello from the source\n")
    seen = connection.recv(100)  # it reads "first second", and answers only the first
    connection.sendall(b"answer to " + seen.split()[0] + b"\n")
    with socket.socket(socket.AF_UNIX) as ipc:  # 2. any IPC: here a Unix socket
        ipc.connect(control)
        pid = int(ipc.recv(20))  # 3. ask for the target's process id
        info = portway.duplicate_socket(connection, pid, unread=seen.split()[1], state=b"count=1")  # 4. duplicate
        ipc.sendall(bytes(info))  # 5. send the record
        ipc.shutdown(socket.SHUT_WR)
        ipc.recv(1)  # 9. the destination has it
    connection.close()  # 10. close here; the connection lives
    print(f"source {os.getpid()}: handed over by {info.way}, and ends")


def destination(control: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(control)
        listener.listen()
        print("ready", flush=True)
        ipc, _ = listener.accept()
    with ipc:
        ipc.sendall(str(os.getpid()).encode())
        record = b"".join(iter(lambda: ipc.recv(65536), b""))  # 6. receive the record
        with portway.socket_from(record) as connection:  # 7. create the shared descriptor
            ipc.sendall(b"k")
            print(f"destination {os.getpid()}: unread {connection.unread!r}, state {connection.state!r}")
            connection.sendall(b"answer to " + connection.unread + b" from pid %d\n" % os.getpid())  # 8. use it


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        control = str(Path(folder, "control"))
        me = [sys.executable, __file__]
        taker = subprocess.Popen([*me, "destination", control], stdout=subprocess.PIPE, text=True)
        assert taker.stdout is not None and taker.stdout.readline() == "ready\n"
        giver = subprocess.Popen([*me, "source", str(server.getsockname()[1]), control])
        client, _ = server.accept()
        with client, client.makefile("r") as lines:
            print("client:", lines.readline().strip())
            client.sendall(b"first second")
            print("client:", lines.readline().strip())
            print("client:", lines.readline().strip())
        print(taker.communicate(timeout=10)[0].strip())
        assert giver.wait(10) == 0 and taker.returncode == 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["source", port, control]:
            source(int(port), control)
        case ["destination", control]:
            destination(control)
        case _:
            main()
