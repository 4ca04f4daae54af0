r"""The classic pair: a server on ``\\.\pipe\HelloWorld`` that reads each client's request and answers it.

    python examples/pipe_pair.py                     runs both sides, by both APIs
    python examples/pipe_pair.py native-server | native-client | easy-server | easy-client [--everyone]

The native functions are the article's program call by call (`portway.win32pipe` has the names of pywin32's win32pipe
and win32file); the easy ones do the same. Either client talks to either server: there is only one kind of pipe.
"""

from __future__ import annotations

import subprocess
import sys

import portway
from portway import win32pipe as win
from portway.errors import PipeBusy, PipeNotFound

PIPE = r"\\.\pipe\HelloWorld"
BUFFER = 1024
CLIENTS = 2

# Who may connect. The article makes a security descriptor with a NULL DACL, "everyone, everything":
#
#     SetSecurityDescriptorDacl(&sd, TRUE, NULL, FALSE)
#
# because a server that runs as a service could otherwise not be reached by the programs of the user at the desktop. It
# works, and it is more than that needs: any account, guests and every exploited daemon included, may then talk to the
# server, and on Windows may change the pipe's security and make further instances of it, so take its clients away.
#
# portway's default is the owner only, and the kernel holds everybody else off before a byte is read. Where others have
# to connect, grant just that: Security.group("desk") or Security.uids("alice"). Security.everyone() is the article's
# permissive choice as far as it can be right: everyone may connect, read and write, nobody but the owner may ever
# control the pipe. Whoever takes it must treat every request as hostile; pipe.peer tells who it comes from.
SAFE = None  # the same as portway.Security.owner()


def answer_to(request: bytes) -> bytes:
    return b"Default answer from server" if not request else b"Hello, " + request


# -- call by call -----------------------------------------------------------------------------------------------------


def native_server(security: portway.Security | None, clients: int) -> None:
    pipe = win.CreateNamedPipe(
        PIPE, win.PIPE_ACCESS_DUPLEX, win.PIPE_TYPE_MESSAGE | win.PIPE_READMODE_MESSAGE | win.PIPE_WAIT,
        win.PIPE_UNLIMITED_INSTANCES, BUFFER, BUFFER, win.NMPWAIT_USE_DEFAULT_WAIT, security,
    )  # fmt: skip
    print("native server: waits", flush=True)
    for _ in range(clients):
        win.ConnectNamedPipe(pipe)  # 0, or ERROR_PIPE_CONNECTED: somebody was faster than the call
        _, request = win.ReadFile(pipe, BUFFER)
        print(f"native server: {request.decode()!r} from pid {win.GetNamedPipeClientProcessId(pipe)}", flush=True)
        win.WriteFile(pipe, answer_to(request))
        win.FlushFileBuffers(pipe)  # the answer has been read; DisconnectNamedPipe would throw it away
        win.DisconnectNamedPipe(pipe)  # and the same instance takes the next one
    win.CloseHandle(pipe)


def native_client(who: str) -> bytes:
    while True:
        try:
            pipe = win.CreateFile(PIPE, win.GENERIC_READ | win.GENERIC_WRITE, 0, None, win.OPEN_EXISTING, 0, None)
            break
        except PipeBusy:  # every instance has a client: ERROR_PIPE_BUSY
            win.WaitNamedPipe(PIPE, 20_000)  # when it returns, somebody else may still be faster: hence the loop
    win.SetNamedPipeHandleState(pipe, win.PIPE_READMODE_MESSAGE, None, None)  # a client's handle reads bytes at first
    win.WriteFile(pipe, who.encode())
    code, reply = win.ReadFile(pipe, 8)  # a small buffer, to show what a message larger than it does
    while code == win.ERROR_MORE_DATA:
        code, more = win.ReadFile(pipe, BUFFER)
        reply += more
    win.CloseHandle(pipe)
    return reply


# -- the same, easy ---------------------------------------------------------------------------------------------------


def easy_server(security: portway.Security | None, clients: int) -> None:
    with portway.NamedPipeServer(PIPE, mode="message", security=security) as server:
        print("easy server: waits", flush=True)
        for _ in range(clients):
            with server.accept() as pipe:  # leaving it loses nothing: the client can read the answer still
                request = pipe.receive()
                print(f"easy server: {request.decode()!r} from pid {pipe.peer.pid}", flush=True)
                pipe.send(answer_to(request))
    # For as many clients as come, each in a thread of its own:  server.serve(handler)


def easy_client(who: str) -> bytes:
    with portway.NamedPipeClient(PIPE, timeout=20) as pipe:  # waits for a free instance; by messages, as the pipe is
        pipe.send(who.encode())
        return pipe.receive()
    # In one line:  portway.call_pipe(PIPE, who.encode())


SERVERS = {"native-server": native_server, "easy-server": easy_server}
CLIENTS_OF = {"native-client": native_client, "easy-client": easy_client}


def pair(server: str) -> None:
    """One server as a process, and both kinds of client."""
    command = [sys.executable, __file__, server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        print(process.stdout.readline(), end="")
        for name, client in CLIENTS_OF.items():
            reply = client(name)
            assert reply == b"Hello, " + name.encode(), reply
            print(f"{name}: {reply.decode()!r}")
        print(process.stdout.read(), end="")
    assert process.returncode == 0, process.returncode
    try:
        portway.wait_pipe(PIPE, 0)
    except PipeNotFound:
        print(f"{server} has ended, and its name with it")


def main(words: list[str]) -> None:
    security = portway.Security.everyone() if "--everyone" in words else SAFE
    if words and words[0] in SERVERS:
        SERVERS[words[0]](security, CLIENTS)
    elif words and words[0] in CLIENTS_OF:
        print(CLIENTS_OF[words[0]]("a client").decode())
    else:
        for server in SERVERS:
            pair(server)


if __name__ == "__main__":
    main(sys.argv[1:])
