"""``show`` prints exactly what training encodes, and points out what people should notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.data.dataset import load_prompts
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.models.shape import model_shape
from tests.test_ids import CHATML, THINKS, folder_of


def config_of(folder: Path, rows: list[dict], template: str | None = CHATML, **sections: dict) -> Path:
    folder_of(folder / "tokenizer", "<|im_end|>", template)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"preset": "tiny", "shape": {"vocab_size": 320}, "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "rows.jsonl"), "prompts_per_step": 1},
        "trainer": {"steps": 1, "run_dir": str(folder / "run")},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def shown(path: Path, capsys, *options: str) -> list[dict]:
    capsys.readouterr()
    assert main(["show", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def chat(text: str, *traces: str, **fields) -> dict:
    teachers = [{"name": f"t{i}", "trace": trace} for i, trace in enumerate(traces)]
    return {"prompt": [{"role": "user", "content": text}], "ground_truth": "2", "teachers": teachers} | fields


def test_what_is_shown_is_what_training_encodes(tmp_path, capsys):
    path = config_of(tmp_path, [chat("1+1?", "2", "<think>a</think>2<|im_end|>", id="a"), chat("b"), chat("c")])
    first, second = shown(path, capsys, "--prompts", "2")
    config = load_config(path)
    tokenizer = load_tokenizer(config, model_shape(config.model))
    prompt = load_prompts(config.data.train, False)[0]
    assert first["id"] == "a" and first["prompt_ids"] == tokenizer.encode_prompt(prompt).tolist()
    assert first["prompt"] == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert [trace["ids"] for trace in first["traces"]] == [
        tokenizer.encode_trace(teacher.trace, prompt).tolist() for teacher in prompt.teachers
    ]
    assert [trace["text"] for trace in first["traces"]] == ["2<|im_end|>", "<think>a</think>2<|im_end|>"]
    assert first["traces"][0].keys() == {"name", "ids", "text"} and first["warnings"] == []
    assert second["traces"] == []


CASES = [
    # row, template, other settings, expected output
    (chat("a"), None, {}, "the tokenizer has no chat template: training refuses it"),
    (chat("a"), None, {"data": {"plain_chat": True}}, "no chat template: joined with newlines"),
    (chat("a"), "{{ strftime_now('%d') }}" + CHATML, {}, "the chat template contains a date: 20"),
    (chat("a\x08b"), CHATML, {}, "prompt: holds control characters: U+0008"),
    (chat("\frac12"), CHATML, {}, r"prompt: holds a control character where '\\frac12' was meant"),
    (chat("a", "2\x07"), CHATML, {}, "trace of t0: holds control characters: U+0007"),
    (chat("a", "<think>b</think>2"), THINKS, {}, "begins with <think>, which already ends the prompt"),
    (chat("a", "2"), THINKS, {}, "does not end the thought that the prompt begins"),
    (chat("a", "<think>b</think><think>b</think>2"), CHATML, {}, "has its thought twice"),
    (chat("a", "<think>b</think>"), CHATML, {}, "has no answer after its thought"),
    (
        chat("a", "<think>b</think>2"),
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
        {},
        "begins a thought after the one that the prompt ends",
    ),
    (
        chat("Think within <think> </think> tags.", "<think>b</think>2"),
        CHATML,
        {},
        "spells special tokens: <think>, </think>",
    ),
    (chat("a", "2<|im_end|>3"), CHATML, {}, "holds the end token <|im_end|> before its end"),
    (chat("a <|im_end|>?"), CHATML, {}, "text spells special tokens: <|im_end|>"),
    (
        chat("a"),
        CHATML.replace("<|im_end|>", "<|eot_id|>"),
        {},
        "holds none of the model's end tokens: traces end with <|im_end|>",
    ),
    (chat("a"), CHATML.replace("{% if", "{% if false and"), {}, None),
    (
        chat("a"),
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        {},
        "the prompt ends with an end token",
    ),
    (chat("a", "2" * 99), CHATML, {"data": {"max_teacher_tokens": 9}}, "has 100 tokens, more than 9"),
    (chat("a" * 99), CHATML, {"data": {"max_prompt_tokens": 9}}, "data.max_prompt_tokens is 9: training refuses it"),
]


@pytest.mark.parametrize("row, template, settings, said", CASES)
def test_what_people_should_notice_is_said(tmp_path, capsys, row, template, settings, said):
    path = config_of(tmp_path, [row], template, **settings)
    (entry,) = shown(path, capsys)
    assert [said in warning for warning in entry["warnings"]].count(True) == (said is not None), entry["warnings"]
    assert main(["show", str(path)]) == 0
    printed = capsys.readouterr().out
    assert entry["id"] in printed and all(warning in printed for warning in entry["warnings"]) and "\x08" not in printed


def test_a_suites_first_problem_is_shown_with_its_options(tmp_path, capsys):
    (tmp_path / "evals").mkdir()
    row = {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "evals/arc_c.jsonl").write_text(json.dumps(row))
    evaluation = {"suites": ["arc_c"], "data": str(tmp_path / "evals"), "shuffle_options": False}
    _, suite = shown(config_of(tmp_path, [chat("a")], evaluation=evaluation), capsys)
    assert suite["id"] == "arc_c-0" and "Sky?\n\nA) red\nB) blue\n\n" in suite["prompt"]


def test_a_number_of_prompts_below_one_is_refused(tmp_path, capsys):
    assert main(["show", str(config_of(tmp_path, [chat("a")])), "--prompts", "0"]) == 2
