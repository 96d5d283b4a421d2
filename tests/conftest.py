"""Settings for all tests: machines are shared, so no example is judged by its time.

``make test-gpu`` runs with only pytest installed of the tests' requirements.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.full_disk import small_disk
from tests.slow import is_slow

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("shared", deadline=None)
    settings.load_profile("shared")

# Files over about 12 seconds, longest first, then the other slow ones, then the fast ones: with two workers that take
# one file at a time (make test), neither is left with a long one at the end.
LONG = (
    "servers", "layouts", "moe", "end_to_end", "watchdog", "checkpoint", "rollout", "offload", "gpu_report", "stages",
    "smollm2", "triton_head", "kill", "import_export", "reference", "planner", "side_model", "critic", "tokenizers",
    "dataprep", "reward", "fuzz", "teacher_traces", "damage", "probe", "answers", "adam_state", "full_disk", "router",
    "sync_faults", "trace", "reward_functions", "async_rollout", "relift", "snippets", "ports",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(LONG)), item.path not in slow))


@pytest.fixture
def disk(tmp_path, request) -> Iterator[Path]:
    """A file system of 256 KiB. Where this process may not mount one, the test runs again as root of a namespace."""
    try:
        with small_disk(tmp_path / "disk") as folder:
            yield folder
            return
    except OSError as error:
        if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip(f"no way to mount a small file system here: {error}")
    again = subprocess.run(["unshare", "-rm", sys.executable, "-m", "pytest", request.node.nodeid], capture_output=True)
    assert again.returncode == 0, again.stdout.decode()
    pytest.skip("passed in a mount namespace")
