"""Recorded rollouts: read back bit for bit, written atomically, in the format that others rely on."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.errors import UserError
from megatron_dypo.records import Group, Prompt, Response, Teacher
from megatron_dypo.rollout.recording import record, replay, require_steps, step_file

PROMPT = Prompt("p-1", "5", (Teacher("left", "a"), Teacher("last", "b")), text="2+3=")
PROMPTS = {"p-1": PROMPT, "é\u2028": Prompt("é\u2028", "6", (), text="3+3=")}

log_prob = st.floats(-1e4, 0, width=32)
response = st.builds(
    lambda tokens, reward, reason, fault: Response(
        np.array([token for token, _ in tokens], np.int32),
        np.array([logp for _, logp in tokens], np.float32),
        reason,
        reward,
        fault=fault,
    ),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), log_prob), min_size=1, max_size=8),
    st.floats(-1, 1),
    st.sampled_from(["stop", "length"]),
    st.none() | st.text(),
)
group = st.builds(
    lambda prompt, ids, responses, version, draw: Group(
        prompt,
        np.array(ids, np.int32),
        [replace(response, weight_version=version) for response in responses],
        None,
        draw if prompt is PROMPT else None,
    ),
    st.sampled_from(list(PROMPTS.values())),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8),
    st.lists(response, min_size=2, max_size=2),
    st.integers(0, 10**6),
    st.none() | st.permutations([0, 1]).map(tuple) | st.just(()),
)


def one_group(version: int = 7) -> Group:
    answers = [
        Response(np.array([5, 1], np.int32), np.array([-0.1, -0.2], np.float32), "stop", reward, version)
        for reward in (1.0, 0.0)
    ]
    return Group(PROMPT, np.array([2, 3], np.int32), answers, teacher_indices=(1,))


def replayed_from(folder: Path, step: int, vocab_size: int = 2**31, longest: int = 16) -> list[Group]:
    return replay(folder, step, PROMPTS, 2, vocab_size=vocab_size, longest=longest)


def same(ours: Group, theirs: Group) -> bool:
    """Return whether ids, log-probs and everything else are equal to the last bit."""
    for mine, other in zip(ours.responses, theirs.responses, strict=True):
        assert (
            (mine.ids.dtype, mine.logprobs.dtype) == (other.ids.dtype, other.logprobs.dtype) == (np.int32, np.float32)
        )
        assert mine.logprobs.tobytes() == other.logprobs.tobytes()
    return str(asdict(ours)) == str(asdict(theirs))


@settings(deadline=None)
@given(st.lists(group, min_size=1, max_size=4))
def test_what_is_recorded_is_replayed_bit_for_bit(tmp_path_factory, groups):
    folder = tmp_path_factory.getbasetemp() / "rollouts"
    record(folder, 3, groups)
    replayed = replayed_from(folder, 3)
    assert all(same(ours, theirs) for ours, theirs in zip(groups, replayed, strict=True))


def test_a_line_has_exactly_the_keys_that_others_read(tmp_path):
    record(tmp_path, 1, [one_group()])
    (line,) = (tmp_path / "step_000001.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": "p-1",
        "prompt_ids": [2, 3],
        "teacher_indices": [1],
        "responses": [
            {
                "ids": [5, 1],
                "logprobs": [float(np.float32(-0.1)), float(np.float32(-0.2))],
                "reward": 1.0,
                "finish_reason": "stop",
            },
            {
                "ids": [5, 1],
                "logprobs": [float(np.float32(-0.1)), float(np.float32(-0.2))],
                "reward": 0.0,
                "finish_reason": "stop",
            },
        ],
        "weight_version": 7,
    }


def test_ground_truth_and_teachers_come_from_the_data_and_the_regime_is_graded_anew(tmp_path):
    record(tmp_path, 1, [one_group()])
    (replayed,) = replayed_from(tmp_path, 1)
    assert replayed.prompt is PROMPT
    assert replayed.regime is None


def test_recording_a_step_again_overwrites_it_and_no_other(tmp_path):
    first, second = one_group(), one_group(version=8)
    for step, written in ((1, first), (2, first), (2, second)):
        record(tmp_path, step, [written])
    assert [replayed_from(tmp_path, step)[0].weight_version for step in (1, 2)] == [7, 8]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]


def test_a_recording_that_fails_leaves_what_was_there(tmp_path):
    bad = one_group()
    bad.responses[1].reward = object()
    with pytest.raises(TypeError):
        record(tmp_path / "new", 1, [one_group(), bad])
    assert not (tmp_path / "new" / "step_000001.jsonl").exists()
    record(tmp_path, 1, [one_group()])
    (tmp_path / "step_000001.jsonl.tmp").mkdir()  # the temporary file cannot be written
    with pytest.raises(IsADirectoryError):
        record(tmp_path, 1, [one_group(), one_group()])
    assert len(replayed_from(tmp_path, 1)) == 1


# --- what cannot be replayed


def edited(folder: Path, **changes: object) -> Path:
    """Return a recording whose second line differs in these keys (``...``: left out)."""
    record(folder, 1, [one_group(), one_group()])
    path = folder / "step_000001.jsonl"
    first, second = path.read_text().splitlines()
    line = {name: kept for name, kept in (json.loads(second) | changes).items() if kept is not ...}
    path.write_text(f"{first}\n{json.dumps(line)}\n")
    return path


RESPONSE = {"ids": [5, 1], "logprobs": [-0.1, -0.2], "reward": 1.0, "finish_reason": "stop"}


def npy(header: str, content: bytes = b"") -> str:
    """Return the base64 of an ``.npy`` file, as ``experts`` are written."""
    return b64encode(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + content).decode()


def of_experts(dtype: str = "<i2", shape: str = "(3, 1, 2)", content: bytes = bytes(12)) -> str:
    return npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}", content)


def archive() -> str:
    stream = io.BytesIO()
    np.savez(stream, experts=np.zeros((3, 1, 2), np.int16))
    return b64encode(stream.getvalue()).decode()


EXPERTS = [
    (5, "experts must be of type str, not int"),
    ("###", "base64"),
    ("", "EOF"),
    (archive(), "the magic string is not correct"),
    (npy("'" * 3), "EOF in multi-line string"),
    (npy("{[]: 1}"), "unhashable"),
    (of_experts(dtype="|O"), "experts [3, 1, 2] (object) of 4 tokens"),
    (of_experts(shape="(4, 1, 2)"), "experts [4, 1, 2] (int16) of 4 tokens"),
    (of_experts(shape="(3, 0, 2)"), "experts [3, 0, 2]"),
    (of_experts(shape="(3, 200000, 200000)"), "12 bytes do not hold [3, 200000, 200000] of int16"),
    (of_experts(content=bytes(14)), "14 bytes do not hold [3, 1, 2] of int16"),
    (of_experts(content=b"\xff" * 12), "experts -1 to -1"),
    (of_experts(dtype="<u2", content=b"\xff" * 12), "experts 65535 to 65535"),
]


@pytest.mark.parametrize(
    "changes, about",
    [
        ({"id": "stranger"}, "'stranger' is not in data.train"),
        ({"id": ...}, "id"),
        ({"weight_version": ...}, "weight_version"),
        ({"prompt_ids": []}, "prompt_ids"),
        ({"prompt_ids": ["x"]}, "'x' is not a token id"),
        ({"prompt_ids": [2, -1]}, "-1 is not a token id"),
        ({"prompt_ids": [True]}, "True is not a token id"),
        ({"prompt_ids": 2}, "int"),
        (
            {"responses": [RESPONSE, RESPONSE | {"ids": [5, 2**31]}]},
            f"{2**31} is not a token id of a vocabulary of {2**31}",
        ),
        ({"responses": [RESPONSE, RESPONSE | {"ids": [5, 1.5]}]}, "1.5 is not a token id"),
        ({"responses": [RESPONSE, RESPONSE | {"reward": 10**400}]}, "too large"),
        ({"teacher_indices": [2]}, "teacher_indices"),
        ({"teacher_indices": [-1]}, "teacher_indices"),
        ({"teacher_indices": [0.5]}, "teacher_indices"),
        ({"teacher_indices": "0"}, "teacher_indices must be of type list, not str"),
        ({"weight_version": "3"}, "weight_version must be of type int, not str"),
        (
            {"responses": [RESPONSE, RESPONSE | {"finish_reason": None}]},
            "finish_reason must be of type str, not NoneType",
        ),
        ({"responses": [RESPONSE, RESPONSE | {"logprobs": [[-0.1], [-0.2]]}]}, "2 ids and 2 logprobs"),
        ({"responses": 3}, "int"),
        ({"responses": []}, "0 responses, but rollout.samples_per_prompt is 2"),
        ({"responses": [RESPONSE] * 3}, "3 responses, but rollout.samples_per_prompt is 2"),
        ({"responses": [RESPONSE, RESPONSE | {"logprobs": [-0.1]}]}, "2 ids and 1 logprobs"),
        ({"responses": [RESPONSE, RESPONSE | {"ids": [], "logprobs": []}]}, "0 ids and 0 logprobs"),
        ({"responses": [RESPONSE, RESPONSE | {"reward": None}]}, "NoneType"),
        ({"responses": [RESPONSE, {"ids": [1], "logprobs": [0.0], "reward": 0.0}]}, "finish_reason"),
        *(({"responses": [RESPONSE, RESPONSE | {"experts": text}]}, about) for text, about in EXPERTS),
    ],
)
def test_an_unusable_line_is_named_by_file_and_number(tmp_path, changes, about):
    path = edited(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        replayed_from(tmp_path, 1)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert about in str(caught.value)


@pytest.mark.parametrize(
    "limits, about",
    [
        ({"vocab_size": 5}, "5 is not a token id of a vocabulary of 5"),
        ({"longest": 3}, "2 + 2 tokens of prompt and response, more than the model's 3"),
    ],
)
def test_what_the_model_cannot_take_is_named_by_file_and_number(tmp_path, limits, about):
    record(tmp_path, 1, [one_group()])
    assert len(replayed_from(tmp_path, 1, vocab_size=6, longest=4)) == 1
    with pytest.raises(UserError) as caught:
        replayed_from(tmp_path, 1, **limits)
    assert str(caught.value).startswith(f"{tmp_path}/step_000001.jsonl:1: ")
    assert about in str(caught.value)


def test_an_empty_step_is_named(tmp_path):
    (tmp_path / "step_000001.jsonl").touch()
    with pytest.raises(UserError, match=r"step_000001\.jsonl: holds no group"):
        replayed_from(tmp_path, 1)


@pytest.mark.parametrize("line", [b"[" * 100_000, b"{cut", b"null", b"[]", b"5", b'"text"', b"\xff\xfe", b""])
def test_a_garbage_line_is_named_by_file_and_number(tmp_path, line):
    record(tmp_path, 1, [one_group()])
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError) as caught:
        replayed_from(tmp_path, 1)
    assert str(caught.value).startswith(f"{path}:2: not a recorded rollout")


def test_the_first_step_that_was_never_recorded_is_named(tmp_path):
    record(tmp_path, 1, [one_group()])
    require_steps(tmp_path, range(1, 2))
    for ask in (lambda: replayed_from(tmp_path, 2), lambda: require_steps(tmp_path, range(1, 4))):
        with pytest.raises(UserError, match=r"rollout\.replay: .*step_000002\.jsonl: no recorded step 2"):
            ask()


def test_rewards_of_drawn_traces_are_recorded_where_there_are_any(tmp_path):
    scored, plain = replace(one_group(), teacher_rewards=(0.25,)), one_group()
    record(tmp_path, 1, [scored, plain])
    assert ["teacher_rewards" in json.loads(line) for line in step_file(tmp_path, 1).read_text().splitlines()] == [1, 0]
    assert [each.teacher_rewards for each in replayed_from(tmp_path, 1)] == [(0.25,), ()]
