"""Settings for all tests: machines are shared, so no example is judged by its time.

``make test-gpu`` runs where pytest alone is installed of what the tests need.
"""

from importlib.util import find_spec

import pytest

from tests.slow import is_slow

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("shared", deadline=None)
    settings.load_profile("shared")

# By CPU-seconds, most first: with two workers (make test), none is left alone with a long file at the end.
LONG = (
    *(
        "test_servers",
        "test_layouts",
        "test_experts",
        "test_end_to_end",
        "test_checkpoint",
        "test_watchdog",
        "test_rollout",
    ),
    *(
        "test_offload",
        "test_convert_commands",
        "test_gpu_report",
        "test_smollm2",
        "test_kill",
        "test_benchmarks",
        "test_health",
    ),
    *("test_damage", "test_full_disk", "test_frozen", "test_triton_head", "test_overlap"),
    *("test_launch", "test_reward", "test_prepare", "test_plan", "test_teacher_traces", "test_snippets"),
    "test_reward_functions",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
