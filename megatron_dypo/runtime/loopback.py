"""``torchrun --rdzv-backend loopback``: one machine, with the launcher's store on 127.0.0.1 only.

torchrun's own rendezvous, including ``--standalone``, listens on all interfaces, and anyone who reaches it can write to
the job. setup.py registers this one with torchrun.
"""

from __future__ import annotations

import datetime
import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

_ADDRESS = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent: it waits for no other agent and shares its store with its ranks."""

    def __init__(self, parameters: RendezvousParameters):
        if parameters.max_nodes != 1:
            raise ValueError("--rdzv-backend loopback is for one node")
        self._run_id = parameters.run_id

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open an empty store; called at the start and at every restart of the ranks."""
        server = socket.create_server((_ADDRESS, 0))
        port = server.getsockname()[1]
        self._store = TCPStore(
            _ADDRESS,
            port,
            is_master=True,
            timeout=datetime.timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )
        return RendezvousInfo(PrefixStore("agent", self._store), 0, 1, RendezvousStoreInfo(_ADDRESS, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def handler() -> type[LoopbackRendezvous]:
    """Return the rendezvous class; torchrun's entry point."""
    return LoopbackRendezvous
