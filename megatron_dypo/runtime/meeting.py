"""``python -m megatron_dypo.runtime.meeting HOST:PORT``: is that port free, or a store that nodes of a job meet at?

torchrun waits without a word, longer than any deadline it is given, for a program on that port that is not one of its
stores. launch/multi_node.sh asks here first.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading

from megatron_dypo.cli import run_tool
from megatron_dypo.errors import UserError

SECONDS = 20.0  # for an answer, the import of torch included
PATIENCE = datetime.timedelta(seconds=SECONDS / 2)


def check_meeting(address: str) -> None:
    """Raise UserError where ``HOST:PORT`` is no address, or where what listens there does not answer as a store does.

    Nothing that listens yet is fine, and so is a name that cannot be looked up yet: the first node may still be coming.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"HEAD={address}: not of the form host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except OSError:
        return

    answered = threading.Event()
    threading.Thread(target=_meet, args=(host.strip("[]"), int(port), answered), daemon=True).start()
    if not answered.wait(SECONDS):
        raise UserError(
            f"HEAD={address}: another program listens at this port, which does not answer as torchrun's store does: "
            "take another port, the same on all nodes"
        )


def _meet(host: str, port: int, answered: threading.Event) -> None:
    """Set ``answered`` once a store has answered. A program that is none may keep this waiting for ever."""
    from torch.distributed import DistError, TCPStore

    with contextlib.suppress(DistError):
        TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        answered.set()


def main() -> int:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # the store's own account of a failure has 30 lines
    check_meeting(sys.argv[1])
    return 0


if __name__ == "__main__":
    run_tool("launch/multi_node.sh", main)
