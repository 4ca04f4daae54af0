"""A client far away: in a network namespace of its own, its packets go by a TUN device, its handshake takes as long as
it likes. Run by test_distant.py; says ANSWERED when a connection that was half open during a reload got its answer."""

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

HERE, THERE, PORT = "10.9.0.1", "10.9.0.2", 8000
FIN, SYN, ACK, PSH = 1, 2, 16, 8


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Connection:
    def __init__(self, tun, port):
        self.tun, self.port, self.seq, self.ack = tun, port, 1000, 0

    def send(self, flags, data=b""):
        head = struct.pack("!HHIIBBHHH", self.port, PORT, self.seq, self.ack, 5 << 4, flags, 65535, 0, 0)
        ends = socket.inet_aton(THERE) + socket.inet_aton(HERE)
        check = checksum(ends + struct.pack("!BBH", 0, 6, len(head) + len(data)) + head + data)
        segment = head[:16] + struct.pack("!H", check) + head[18:] + data
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + ends
        os.write(self.tun, ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + segment)
        self.seq += len(data) + bool(flags & SYN)

    def receive(self, seconds=10.0):
        """(flags, data) of the next segment for this connection."""
        end = time.monotonic() + seconds
        while select.select([self.tun], [], [], max(0, end - time.monotonic()))[0]:
            packet = os.read(self.tun, 65536)
            if packet[0] >> 4 != 4 or packet[9] != 6 or struct.unpack_from("!H", packet, 22)[0] != self.port:
                continue
            segment = packet[(packet[0] & 15) * 4 :]
            seq, flags, data = struct.unpack_from("!I", segment, 4)[0], segment[13], segment[(segment[12] >> 4) * 4 :]
            self.ack = seq + len(data) + bool(flags & (SYN | FIN))
            return flags, data
        raise SystemExit("no segment came")


def wait_for(path, text):
    end = time.monotonic() + 20
    while not re.search(text, Path(path).read_text()):
        assert time.monotonic() < end, f"no {text}: {Path(path).read_text()}"
        time.sleep(0.01)


def main():
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
    for words in ("link set lo up", f"addr add {HERE}/24 dev tun0", "link set tun0 up"):
        subprocess.run(["ip", *words.split()], check=True)
    log = sys.argv[1]
    portway = [sys.executable, "-m", "portway"]
    command = [*portway, "run", "--name", "far", "--bind", f"{HERE}:{PORT}", "--ready-hold", "0.1", "--", *sys.argv[2:]]
    with open(log, "wb") as err:
        service = subprocess.Popen(command, stderr=err)
    try:
        wait_for(log, "generation 1 serves")
        connection = Connection(tun, 40000)
        connection.send(SYN)
        assert connection.receive()[0] & SYN, "SYN-ACK"
        subprocess.run([*portway, "reload", "far"], check=True, stderr=subprocess.DEVNULL)
        time.sleep(1)  # the way is long: well over --settle
        connection.send(ACK)
        connection.send(ACK | PSH, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        (worker,) = re.findall(r"generation 1 started \(pid (\d+)\)", Path(log).read_text())
        answer = b""
        while not answer.endswith(b"1 %d" % int(worker)):
            flags, data = connection.receive()
            if flags & SYN:
                continue  # the SYN-ACK again
            answer += data
            assert data or not flags & (FIN | 4), f"ended after {answer}"
        print("ANSWERED", flush=True)
        wait_for(log, "generation 1 ended")
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    main()
