"""Output never holds a worker up, is passed on whole, and does not fill the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import PLAIN, World, get, until

QUICK = ("--ready-hold", "0.1")
WEB = ("--name", "web", "--bind", "127.0.0.1:0")


@pytest.mark.slow
def test_much_output_arrives_whole_and_is_trimmed(world: World) -> None:
    code = (
        "import sys, time\n"
        "for n in range(200_000): sys.stdout.write(f'{n:08d} ' + 'x' * 80 + '\\n')\n"
        "print('END', flush=True); time.sleep(100)"
    )
    web = world.start(
        "--name", "web", "--ready", "delay:0", *QUICK, "--", sys.executable, "-c", code, PYTHONUNBUFFERED=""
    )
    web.serves(1)
    until(lambda: web.printed().endswith("[1.0] END\n"), "all of it", 60)
    lines = web.printed().splitlines()
    assert len(lines) == 200_001
    assert all(line.startswith(f"[1.0] {n:08d} x") for n, line in enumerate(lines[:-1]))
    (file,) = (world.root / "run" / "web" / "output").iterdir()
    assert file.stat().st_size > 17 << 20
    assert file.stat().st_blocks * 512 < 8 << 20
    shown = world.run("logs", "web", "-n", "3").stdout.splitlines()
    assert shown[-1] == "[1.0] END" and shown[0].startswith("[1.0] 00199998 x")


def test_nobody_reads_our_output_and_the_workers_do_not_care(world: World) -> None:
    code = f"print('x' * 3_000_000, flush=True)\nexec(open({str(PLAIN[1])!r}).read())"
    command = [sys.executable, "-m", "portway", "run", *WEB, *QUICK, "--", sys.executable, "-c", code]
    err = world.root / "err"
    with err.open("wb") as file:
        process = subprocess.Popen(command, env=world.environ, cwd=world.root, stdout=subprocess.PIPE, stderr=file)
    world.processes.append(process)
    assert process.stdout is not None
    until(lambda: "generation 1 serves" in err.read_text(), err.read_text())
    port = int(err.read_text().split("127.0.0.1:")[1].split()[0])
    assert get(("127.0.0.1", port)).startswith("1 ")
    data = b""
    while b"hello from" not in data:
        data += os.read(process.stdout.fileno(), 65536)
    assert data.count(b"x") == 3_000_000 and data.startswith(b"[1.0] xxx")
    process.stdout.close()  # and now nobody ever will
    process.send_signal(signal.SIGHUP)
    until(lambda: "generation 1 ended" in err.read_text(), err.read_text())
    assert get(("127.0.0.1", port)).startswith("2 ")
    process.terminate()
    assert process.wait(20) == 0


def test_files_of_long_gone_generations_are_removed(world: World) -> None:
    web = world.start(*WEB, "--ready-hold", "0", "--settle", "0", "--", *PLAIN)
    web.serves(1)
    for number in range(2, 8):
        assert web.reloaded() == number
        web.gone(number - 1)
    names = sorted(os.listdir(world.root / "run" / "web" / "output"))
    assert names == ["4.0.out", "5.0.out", "6.0.out", "7.0.out"]


@pytest.mark.slow
def test_size_and_age_replace_a_generation(world: World) -> None:
    code = (
        "import os\nif os.environ['PORTWAY_GENERATION'] == '1': x = b'1' * (200 << 20)\n"
        f"exec(open({str(PLAIN[1])!r}).read())"
    )
    web = world.start(*WEB, *QUICK, "--max-rss", "150M", "--", sys.executable, "-c", code)
    web.serves(1)
    web.serves(2)
    assert "worker 0 holds 2" in web.said() and "more than 150 MiB: replacing it" in web.said()
    web.stop()
    web = world.start(*WEB, *QUICK, "--max-age", "1", "--", *PLAIN)
    web.serves(1)
    web.serves(2)
    assert "is older than 1 s" in web.said()


def test_chdir_is_resolved_anew_for_each_generation(world: World) -> None:
    for name in ("one", "two"):
        (world.root / name).mkdir()
    link = world.root / "current"
    link.symlink_to("one")
    code = "import os, time; print('AT', os.getcwd(), flush=True); time.sleep(100)"
    web = world.start(
        "--name", "web", "--ready", "delay:0", *QUICK, "--chdir", str(link), "--", sys.executable, "-c", code
    )
    web.serves(1)
    until(lambda: f"[1.0] AT {Path(os.path.realpath(world.root / 'one'))}" in web.printed(), web.printed())
    link.unlink()
    link.symlink_to("two")
    os.kill(web.workers()[0], signal.SIGKILL)  # a worker that starts again runs its generation's release
    until(lambda: web.printed().count("[1.0] AT") == 2, web.printed())
    assert "two" not in web.printed()
    assert web.reloaded() == 2
    until(lambda: "[2.0] AT" in web.printed(), web.printed())
    assert web.printed().splitlines()[-1].endswith("/two")
