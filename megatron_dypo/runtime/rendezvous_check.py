"""``python -m megatron_dypo.runtime.rendezvous_check HOST:PORT``: check that the port is free or a rendezvous store.

If another program listens on that port, torchrun waits in silence, longer than any deadline it is given.
launch/multi_node.sh checks the port here first.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import run_tool

SECONDS = 10.0  # to wait for an answer
_MEET = """\
import sys
from torch.distributed import TCPStore
print(flush=True)
TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False)
"""


def check_rendezvous(address: str) -> None:
    """Raise UserError if ``HOST:PORT`` is not an address, or if its listener does not answer as a store does.

    A port without a listener is fine, and so is a name that does not resolve yet: the first node may still be coming
    up.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"HEAD={address}: not of the form host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except OSError:
        return

    # In a separate process: torch's constructor ignores its deadline if the listener is not a store.
    command = [sys.executable, "-c", _MEET, host.strip("[]"), port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        if child.stdout is not None:
            child.stdout.readline()  # torch is imported
        try:
            met = child.wait(SECONDS) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            met = False
    if not met:
        raise UserError(
            f"HEAD={address}: another program listens at this port, which does not answer as torchrun's store does: "
            "take another port, the same on all nodes"
        )


def main() -> int:
    check_rendezvous(sys.argv[1])
    return 0


if __name__ == "__main__":
    run_tool("launch/multi_node.sh", main)
