"""A client whose handshake is under way when the service reloads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from running import HERE, PLAIN, World


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
                    reason="needs root, /dev/net/tun and ip for a network of its own")  # fmt: skip
def test_half_open_connection_is_answered_by_the_old_generation(world: World) -> None:
    log = world.root / "log"
    done = subprocess.run(
        ["unshare", "-n", sys.executable, str(HERE / "servers" / "distant.py"), str(log), *PLAIN],
        env=world.environ, cwd=world.root, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + log.read_text()
    assert "ANSWERED" in done.stdout
