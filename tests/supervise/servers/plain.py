"""A plain Python server that knows nothing of portway: LISTEN_FDS, accept(), one thread a connection, TERM finishes.

Answers every request, however long the connection lives, with "GENERATION PID". PLAIN_* in the environment makes it
misbehave: PLAIN_CRASH=before (exits at once), PLAIN_DEAF=1 (never accepts), PLAIN_SLOW=seconds a request,
PLAIN_STUBBORN=1 (ignores TERM), PLAIN_UNWELL=1 (503 for /health), PLAIN_NOTIFY=1 (says READY=1),
PLAIN_CRASH_AFTER=seconds.
"""

import os
import select
import signal
import socket
import sys
import threading
import time

SLOW = float(os.environ.get("PLAIN_SLOW", "0"))
UNWELL = bool(os.environ.get("PLAIN_UNWELL"))
stopping = threading.Event()
running = []


def serve(connection):
    with connection:
        pending = b""
        while True:
            data = connection.recv(65536)
            if not data:
                return
            pending += data
            while b"\r\n\r\n" in pending:
                head, _, pending = pending.partition(b"\r\n\r\n")
                if head.startswith(b"GET /crash"):
                    os._exit(9)
                time.sleep(SLOW)
                body = f"{os.environ.get('PORTWAY_GENERATION')} {os.getpid()}".encode()
                status = b"503 No" if b"/health" in head and UNWELL else b"200 OK"
                connection.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
                if b"connection: close" in head.lower() or stopping.is_set():
                    return


def main():
    if os.environ.get("PLAIN_CRASH") == "before":
        print("Traceback: this release is broken", flush=True)
        raise SystemExit(3)
    if not os.environ.get("PLAIN_STUBBORN"):
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"hello from generation {os.environ.get('PORTWAY_GENERATION')}", flush=True)
    assert int(os.environ["LISTEN_PID"]) == os.getpid(), "LISTEN_PID is not ours"
    fds = range(3, 3 + int(os.environ["LISTEN_FDS"]))
    listeners = [socket.socket(fileno=fd) for fd in fds]
    if os.environ.get("PLAIN_DEAF"):
        signal.pause()
    if os.environ.get("PLAIN_CRASH_AFTER"):
        threading.Timer(float(os.environ["PLAIN_CRASH_AFTER"]), os._exit, [7]).start()
    for listener in listeners:
        listener.setblocking(False)
    if os.environ.get("PLAIN_NOTIFY"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(b"READY=1\nSTATUS=fine", "\0" + os.environ["NOTIFY_SOCKET"][1:])
    while not stopping.is_set():
        for listener in select.select(listeners, [], [], 0.05)[0]:
            try:
                connection = listener.accept()[0]
            except BlockingIOError:
                continue
            connection.setblocking(True)
            thread = threading.Thread(target=serve, args=(connection,), daemon=True)
            thread.start()
            running.append(thread)
    for listener in listeners:
        listener.close()
    for thread in running:
        thread.join(None if SLOW else 0.2)


if __name__ == "__main__":
    sys.exit(main())
