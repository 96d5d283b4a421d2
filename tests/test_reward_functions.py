"""Rewards other than mathematics: tasks' own scores, users' functions and their possible faults; penalties; rules."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.config import load_config
from megatron_dypo.config.checks import warnings
from megatron_dypo.config.load import load_keys
from megatron_dypo.config.schema import Config, Objective, Reward
from megatron_dypo.data.tasks import dataset, generate
from megatron_dypo.errors import UserError
from megatron_dypo.preflight import check_inputs
from megatron_dypo.records import Group, Prompt, Response
from megatron_dypo.reward import RewardFunction, Score, build_reward, final_answer, worker_pool
from megatron_dypo.reward.scorers import has_form, penalty
from megatron_dypo.rollout.sampling import score
from megatron_dypo.training.metrics import batch_metrics

OWN = """
import os, subprocess, sys, threading, time
print("imported")

def compute(data_source, solution_str, ground_truth, extra_info):
    act = ACTS.get(solution_str)
    return act() if act else float(solution_str == ground_truth)

def lookup(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": extra_info["weight"] * (data_source == "here"), "id": extra_info["id"]}

def raises():
    raise ValueError("no\\nsuch thing")

def sleeps():
    time.sleep(1000)

def spins():
    while True:
        pass

def leaves():
    subprocess.Popen(["sleep", "1000"])
    return 1.0

def leaves_detached():
    subprocess.Popen(["sh", "-c", "setsid sleep 1001 & exit 0"]).wait()
    return 1.0

def forks():
    os.fork()
    return 1.0

def floods():
    print("x" * 100_000)
    os.write(1, b"[1.0, null, false]\\n")
    return 0.5

def reads():
    return float(sys.stdin.read() == "")

def runs():
    return float(subprocess.run(["echo", "5"], capture_output=True, text=True).stdout)

def eats_memory():
    return len(bytearray(1 << 36))

class Odd:
    def __float__(self):
        return 0.25

ACTS = {name: value for name, value in globals().items() if callable(value)} | {
    "exits": lambda: sys.exit(3), "ends": lambda: os._exit(4), "dies": lambda: os.kill(os.getpid(), 9),
    "nan": lambda: float("nan"), "inf": lambda: {"score": float("inf")}, "none": lambda: None, "text": lambda: "1.0",
    "empty": dict, "true": lambda: True, "partial": lambda: {"score": 0.25, "acc": 1}, "odd": Odd,
    "negative": lambda: -1,
}
takes_too_little = lambda solution_str: 1.0
not_a_function = 5
"""
FAULTS = {
    "raises": "ValueError: no such thing",
    "exits": "SystemExit: 3",
    "ends": "the grading process ended with exit status 4",
    "dies": "the grading process was ended by SIGKILL",
    "spins": "over 0.2 s of CPU time",
    "sleeps": "over the wall-clock ceiling of 2 s",
    "leaves": "left a process behind",
    "leaves_detached": "left a process behind",
    "forks": "left a process behind",
    "eats_memory": "MemoryError: ",
    "nan": "returned nan, not a number",
    "inf": "returned inf, not a number",
    "none": "returned NoneType, not a number",
    "text": "returned str, not a number",
    "empty": "returned a dict without a score",
}
VALUES = {
    "true": 1,
    "partial": 0.25,
    "odd": 0.25,
    "negative": -1,
    "floods": 0.5,
    "reads": 1,
    "runs": 5,
    "right": 1,
    "wrong": 0,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own_reward.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def own(file: Path) -> Iterator[RewardFunction]:
    with build_reward(Reward(function=f"{file}:compute", cpu_seconds=0.2)) as function:
        yield function


def family(function: RewardFunction) -> list[psutil.Process]:
    """Return all processes below this function's workers."""
    worker_pool = [psutil.Process(worker.process.pid) for worker in function._pool._workers]
    return [process for worker in worker_pool for process in worker.children(recursive=True)]


# --- users' functions


def test_whatever_a_function_does_costs_its_deadline_and_names_the_reason(own, caplog):
    acts = [*FAULTS, *VALUES]
    prompts = [Prompt(f"prompt-{act}", "right", ()) for act in acts]
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "megatron_dypo.reward"):
        scores = dict(zip(acts, own(prompts, acts), strict=True))
    assert {act: score.value for act, score in scores.items() if score.fault is None} == VALUES
    assert {act: score.fault for act, score in scores.items() if score.fault is not None} == FAULTS
    assert not any(score.value for score in scores.values() if score.fault)
    assert time.monotonic() - start < 25  # one sleeps for its two seconds
    logged = [record.getMessage() for record in caplog.records]
    for act, fault in FAULTS.items():
        (line,) = [line for line in logged if f" score 0: {fault}; " in line]
        assert f"prompt-{act}" in line
    assert len(family(own)) <= 1
    assert not [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "1001"]]


@pytest.mark.parametrize("act", ["leaves", "leaves_detached", "forks", "sleeps"])
def test_nothing_is_left_of_what_a_function_started(own, act):
    assert own([Prompt("a", "right", ())], [act]) == [Score(0.0, FAULTS[act])]
    assert family(own) == []
    assert own([Prompt("a", "right", ())], ["right"]) == [Score(1.0)]


def test_a_grading_process_ends_with_its_killed_worker(own):
    assert own([Prompt("a", "right", ())], ["right"]) == [Score(1.0)]
    children = family(own)
    (worker,) = [worker.process.pid for worker in own._pool._workers]
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    assert own([Prompt("a", "right", ())], ["sleeps"]) == [Score(0.0, "worker ended, -9")]
    assert len(children) == 1
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_a_function_gets_what_verl_gives_it(file):
    with build_reward(Reward(function=f"{file}:lookup")) as function:
        prompts = [Prompt("a", "x", (), source, extra=json.dumps({"weight": 0.5})) for source in ("here", "there")]
        assert function(prompts, ["", ""]) == [Score(0.5), Score(0.0)]
        assert function([Prompt("b", "x", (), "here")], [""]) == [Score(0.0, "KeyError: 'weight'")]


def test_long_responses_reach_a_function_whole(own):
    text = 'ab\n"\\é\u2028' * 100_000
    assert own([Prompt("a", text, ())], [text]) == [Score(1.0)]


def test_a_function_is_found_as_a_module_of_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    with build_reward(Reward(function="own_reward:compute")) as function:
        assert function([Prompt("a", "right", ())], ["right"]) == [Score(1.0)]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no_such_module:compute", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nowhere.py:compute", "FileNotFoundError: no such file"),
        ("FILE:no_such", "AttributeError: FILE has no no_such"),
        ("FILE:not_a_function", "TypeError: 5 is not a callable object"),
        ("FILE:takes_too_little", "TypeError: got an unexpected keyword argument 'data_source'"),
        ("BROKEN:compute", "SyntaxError: "),
        ("EXITS:compute", "SystemExit: 0"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_line(file, tmp_path, function, reason):
    paths = {"FILE": file, "BROKEN": tmp_path / "broken.py", "EXITS": tmp_path / "exits.py"}
    paths["BROKEN"].write_text("def compute(:\n")
    paths["EXITS"].write_text("raise SystemExit(0)\n")
    for name, path in paths.items():
        function, reason = function.replace(name, str(path)), reason.replace(name, str(path))
    before = psutil.Process().children()
    with pytest.raises(UserError) as caught:
        build_reward(Reward(function=function))
    assert str(caught.value).startswith(f"reward.function: {function}: {reason}")
    assert "\n" not in str(caught.value)
    assert psutil.Process().children() == before


# --- reasoning-gym

LEFT_OUT = {"composite", "knight_swap", "arc_agi"}  # needs other tasks; take seconds to build one item

HASHED = {"isomorphic_strings", "polynomial_multiplication", "ransom_note"}  # items depend on the order of a set


@pytest.fixture(scope="module")
def tasks() -> Iterator[RewardFunction]:
    with build_reward(Reward(function="reasoning_gym", extract="marked")) as function:
        yield function


@pytest.mark.slow
def test_items_of_every_task_are_rebuilt_in_the_worker_from_what_the_prompt_holds(tasks):
    names = sorted(reasoning_gym.factory.DATASETS.keys() - LEFT_OUT - HASHED)
    prompts, texts, expected = [], [], []
    for name in names:
        first, second = generate(f"reasoning_gym:{name}?size=2&seed=11")
        task = dataset(f"{name}?size=2&seed=11")
        assert task[1]["question"] == second.text, name
        for answer in (second.ground_truth, first.ground_truth):
            prompts.append(second)
            texts.append(f"so it is\n#### {answer}")
            expected.append(Score(float(task.score_answer(final_answer(texts[-1], "marked"), entry=task[1]))))
    assert len(names) == 100
    scores = tasks(prompts, texts)
    assert [(p.id, score) for p, score in zip(prompts, scores, strict=True)] == [
        (p.id, score) for p, score in zip(prompts, expected, strict=True)
    ]
    assert sum(score.value == 1 for score in scores[::2]) > 80  # an item's answer is an example only, in a few tasks


def test_an_answer_that_a_task_cannot_read_is_wrong_and_no_fault(tasks):
    (prompt,) = generate("reasoning_gym:prime_factorization?size=1&seed=1")
    assert tasks([prompt], ["#### nonsense"]) == [Score(0.0)]


def test_an_answer_is_never_run_as_a_program(tmp_path, monkeypatch):
    """Tasks that evaluate answers get only mathematics, and no answer changes how later ones score."""
    monkeypatch.chdir(tmp_path)  # before the worker starts, which works in its starting folder
    (prompt,) = generate("reasoning_gym:countdown?size=1&seed=3")
    patch = "import reasoning_gym.games.countdown as c; c.CountdownDataset.score_answer = lambda *a, **k: 1.0"
    attacks = [
        "__import__('os').system('touch ran')",
        f'exec("{patch}")',
        "eval(chr(49))",
        "open('ran', 'w')",
        "().__class__",
        "1 .real",
        "S('open')('ran','w')",
        "getattr(1, 'real')",
    ]
    with build_reward(Reward(function="reasoning_gym", extract="marked")) as tasks:
        assert tasks([prompt] * len(attacks), [f"#### {attack}" for attack in attacks]) == [Score(0.0)] * len(attacks)
        assert list(tmp_path.iterdir()) == []
        right = dataset("countdown?size=1&seed=3")[0]["metadata"]["expression"]
        scores = tasks([prompt] * 2, [f"#### {right}", "#### 1 + 1"])
    assert scores[0] == Score(1.0) and scores[1].value < 1


def test_a_worker_of_our_own_graders_sees_no_secret_and_a_user_s_does(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "x")
    assert "SOME_API_KEY" not in worker_pool._environment("reasoning_gym")
    assert "PATH" in worker_pool._environment("math") and "SOME_API_KEY" in worker_pool._environment("judge.py:score")


def test_an_item_that_comes_out_otherwise_is_a_fault(tasks):
    (prompt,) = generate("reasoning_gym:chain_sum?size=1&seed=3")
    others = [replace(prompt, text="What is 1 + 1?"), replace(prompt, text="", ground_truth="0")]
    fault = "the task builds another item in each process: set PYTHONHASHSEED for the whole run"
    assert tasks(others, ["#### 0"] * 2) == [Score(0.0, fault)] * 2
    assert tasks([replace(prompt, text="")], [f"#### {prompt.ground_truth}"]) == [Score(1.0)]


def test_an_item_that_cannot_be_built_is_a_fault(tasks):
    prompt = Prompt("a", "5", (), extra=json.dumps({"dataset": "no_such_task?size=1", "index": 0}))
    (score,) = tasks([prompt], ["#### 5"])
    assert score == Score(0.0, "ValueError: Dataset 'no_such_task' not registered")


def test_partial_credit_and_answers_of_several_lines(tasks):
    (prompt,) = generate("reasoning_gym:chain_sum?size=1&seed=3")
    right = prompt.ground_truth
    assert tasks([prompt] * 3, [f"\\boxed{{{right}}}", f"\\boxed{{it is {right}}}", right]) == [
        Score(1.0),
        Score(pytest.approx(len(right) / len(f"it is {right}"))),
        Score(0.0),  # marked, but unmarked
    ]
    (grid,) = generate("reasoning_gym:mini_sudoku?size=1&seed=3")
    assert "\n" in grid.ground_truth
    assert tasks([grid], [f"\\boxed{{{grid.ground_truth}}}"]) == [Score(1.0)]


def test_a_task_without_a_seed_is_the_same_everywhere():
    texts = [[p.text for p in generate(f"reasoning_gym:leg_counting?size=3{seed}")] for seed in ("", "", "&seed=0")]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("function", "prompt", "reason"),
    [
        ("reasoning_gym", Prompt("a", "5", ()), "extra_info holds no reasoning-gym dataset and index"),
        ("choice", Prompt("a", "Paris", ()), "ground truth 'Paris' names no option (one letter or digit)"),
    ],
)
def test_prompts_that_a_function_could_never_score_are_named_at_the_start(function, prompt, reason):
    with build_reward(Reward(function=function)) as reward, pytest.raises(UserError) as caught:
        reward.check([prompt])
    assert str(caught.value) == f"reward.function: {function}: prompt a: {reason}"


@pytest.mark.parametrize("function", ["math", "choice", "own"])
def test_other_prompts_pass(function, file):
    function = f"{file}:compute" if function == "own" else function
    with build_reward(Reward(function=function)) as reward:
        reward.check([Prompt("a", "C", ())])


# --- penalties


@pytest.mark.parametrize(
    ("text", "box", "think"),
    [
        (r"<think>1+1</think> \boxed{2}", True, True),
        ("\n<think>\\boxed{3}</think>\n\\boxed{2}", True, True),
        (r"<think>1+1 \boxed{2}</think>", True, False),
        (r"<think>1+1 \boxed{2}", True, False),
        (r"well, <think>1+1</think> \boxed{2}", True, False),
        (r"<think>1</think><think>2</think> \boxed{2}", True, False),
        (r"</think><think> \boxed{2}", True, False),
        (r"\boxed{2}", True, False),
        (r"<think>1+1</think> \boxed{2", False, False),
        (r"<think>1+1</think> 2", False, False),
        ("", False, False),
    ],
)
def test_the_form_of_a_response(text, box, think):
    assert [has_form(form, text) for form in ("none", "boxed", "think")] == [True, box, think]


@pytest.mark.parametrize("text", ["<think>" * 200_000, "<think>" + "</think" * 200_000, "<think>" + "{" * 1_000_000])
def test_time_to_check_the_form_is_linear(text):
    start = time.process_time()
    has_form("think", text + r"</think>\boxed{5}")
    assert time.process_time() - start < 3.0


def test_overlong_responses_cost_as_dapo_says():
    settings = Reward(overlong_tokens=40, overlong_penalty=0.8)
    costs = {tokens: penalty(settings, "", tokens, 100) for tokens in (1, 60, 61, 80, 99, 100)}
    assert costs == pytest.approx({1: 0, 60: 0, 61: 0.02, 80: 0.4, 99: 0.78, 100: 0.8})


@given(st.integers(1, 100), st.integers(0, 100), st.sampled_from(["none", "boxed", "think"]), st.booleans())
def test_a_penalty_is_at_most_both_and_grows_with_length(tokens, overlong, form, box):
    settings = Reward(overlong_tokens=overlong, overlong_penalty=0.5, format=form, format_penalty=0.25)
    cost, more = (penalty(settings, r"\boxed{5}" * box, length, 100) for length in (tokens, min(100, tokens + 1)))
    assert 0 <= cost <= more <= 0.75
    assert penalty(Reward(), "", tokens, 100) == 0


class Letters:
    """Decodes ids as characters."""

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


def test_training_takes_penalties_off_and_evaluation_does_not():
    texts = [r"\boxed{5}", "5", "\\boxed{4}" + " " * 91]
    config = Config.model_validate(
        {
            "model": {"preset": "tiny"},
            "data": {"train": "rows.jsonl"},
            "trainer": {"steps": 1, "run_dir": "runs/x"},
            "rollout": {"max_response_tokens": 100},
            "reward": {"format": "boxed", "format_penalty": 0.25, "overlong_tokens": 50, "overlong_penalty": 0.5},
        }
    )
    ids = [np.array([*map(ord, text)]) for text in texts]
    groups = [Group(Prompt("a", "5", ()), ids[0], [Response(each, np.zeros(len(each)), "stop") for each in ids])]
    with build_reward(config.reward) as reward:
        score(groups, Letters(), reward)
        assert [response.reward for response in groups[0].responses] == [1, 0, 0]
        score(groups, Letters(), reward, config)
        assert [response.reward for response in groups[0].responses] == [1, -0.25, -0.5]


@pytest.mark.parametrize("value", [None, 0.0, -0.5])
def test_an_unfinished_response_has_the_reward_that_is_given_whatever_its_text_and_is_not_graded(value):
    """A function that would fail on it is not called, and no penalty is subtracted."""
    texts = {"right": "stop", "cut right": "length", "cut": "abort", "wrong" + " " * 91: "stop"}
    config = Config.model_validate(
        {
            "model": {"preset": "tiny"},
            "data": {"train": "rows.jsonl"},
            "trainer": {"steps": 1, "run_dir": "runs/x"},
            "rollout": {"max_response_tokens": 100, "reward_unfinished": value},
            "reward": {"format": "boxed", "format_penalty": 0.25, "overlong_tokens": 50, "overlong_penalty": 0.5},
        }
    )
    responses = [Response(np.array([*map(ord, text)]), np.zeros(len(text)), end) for text, end in texts.items()]
    seen = []

    def reward(prompts: list[Prompt], answers: list[str]) -> list[Score]:
        seen.extend(answers)
        return [Score(float("right" in text), "broken" if text == "cut" else None) for text in answers]

    score([Group(Prompt("a", "5", ()), responses[0].ids, responses)], Letters(), reward, config)
    cut = [0.75, -0.25] if value is None else [value, value]
    assert [response.reward for response in responses] == [0.75, *cut, -0.25 - 0.5 * 46 / 50]
    assert seen == ([*texts] if value is None else [text for text, end in texts.items() if end == "stop"])
    assert [response.fault for response in responses] == [None, None, "broken" if value is None else None, None]


def test_failed_responses_are_counted_in_the_metrics(own):
    ids = [np.array([*map(ord, text)]) for text in ("right", "raises", "none", "wrong")]
    group = Group(Prompt("a", "right", ()), ids[0], [Response(each, np.zeros(len(each)), "stop") for each in ids])
    score([group], Letters(), own)
    assert [response.fault for response in group.responses] == [None, FAULTS["raises"], FAULTS["none"], None]
    metrics = batch_metrics([group], [], Objective())
    assert (metrics["reward/failed"], metrics["reward/mean"]) == (2, 0.25)


# --- rules


def configured(tmp_path: Path, **reward) -> Config:
    path = tmp_path / "config.yaml"
    required = {"model": {"preset": "tiny"}, "data": {"train": "rows.jsonl"}, "trainer": {"steps": 1, "run_dir": "x"}}
    path.write_text(json.dumps(required | {"reward": reward}))
    return load_config(str(path), [])


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        ({"function": "maths"}, "reward.function: 'maths' is not one of math, choice, reasoning_gym"),
        ({"function": "reward.py"}, "reward.function: 'reward.py' is not one of"),
        ({"function": "a b:c"}, "reward.function: 'a b:c' is not one of"),
        ({"function": "a:"}, "reward.function: 'a:' is not one of"),
        ({"format": "boxed"}, "reward.format: boxed is not read with reward.format_penalty: 0.0"),
        ({"format_penalty": 0.1}, "reward.format_penalty: 0.1 is not read with reward.format: none"),
        ({"overlong_penalty": 0.5}, "reward.overlong_penalty: 0.5 is not read with reward.overlong_tokens: 0"),
        ({"overlong_tokens": 5, "overlong_penalty": 0}, "reward.overlong_tokens: 5 is not read with reward.overlong_"),
        ({"overlong_tokens": 9000}, "reward.overlong_tokens: 9000 exceeds rollout.max_response_tokens: 8192"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, reward, named):
    with pytest.raises(UserError) as caught:
        configured(tmp_path, **reward)
    assert named in str(caught.value)


@pytest.mark.parametrize("function", ["math", "pkg.rewards:compute", "own/reward.py:f", "/abs/r-1.py:f", "../a b.py:f"])
def test_settings_that_work_are_accepted_without_a_warning(tmp_path, function):
    config = configured(tmp_path, function=function, format="think", format_penalty=0.5)
    assert not [line for line in warnings(config) if "reward." in line]


def test_a_reward_of_unfinished_responses_that_makes_them_right_is_told():
    told = {value: warnings(load_keys([f"rollout.reward_unfinished={value}"], "x")) for value in ("0", "0.5", "null")}
    assert told["0"] == told["null"] == []
    assert told["0.5"][0].startswith("rollout.reward_unfinished: 0.5 is at least objective.reward_threshold: 0.5")


@pytest.mark.parametrize(
    "reward",
    [{"overlong_tokens": 5}, {"format": "boxed", "format_penalty": 0.3, "overlong_tokens": 5, "overlong_penalty": 0.3}],
)
def test_penalties_that_can_make_a_right_response_wrong_are_told(tmp_path, reward):
    (told,) = [line for line in warnings(configured(tmp_path, **reward)) if "reward." in line]
    assert "reward.overlong_penalty" in told
    assert "below objective.reward_threshold: 0.5" in told


# --- before a run


def test_a_run_whose_reward_cannot_work_is_refused_before_it_starts(tmp_path):
    rows = [{"prompt": f"{i}+1=", "ground_truth": str(i + 10), "teachers": []} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tree = {
        "model": {"preset": "tiny"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "prompts_per_step": 2, "max_prompt_tokens": 8},
        "rollout": {"engine": "transformers", "max_response_tokens": 8},
        "trainer": {"steps": 1, "run_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "config.yaml"
    told = {}
    for function in ("no_such_module:compute", "choice"):
        path.write_text(json.dumps(tree | {"reward": {"function": function}}))
        with pytest.raises(UserError) as caught:
            check_inputs(load_config(str(path), []), str(path))
        told[function] = str(caught.value)
    assert told["no_such_module:compute"].startswith("reward.function: no_such_module:compute: ModuleNotFoundError")
    assert (
        told["choice"]
        == "reward.function: choice: prompt row-1: ground truth '10' names no option (one letter or digit)"
    )
