"""The ids of a prompt, a trace and a response: one end, one opening of a thought, nothing after a prompt."""

from __future__ import annotations

import dataclasses
import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from megatron_dypo.data.dataset import with_usable_traces
from megatron_dypo.data.provenance import check_kept, keep, start_day
from megatron_dypo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import PRESETS
from megatron_dypo.records import Prompt, Teacher
from tests.batches import make_config
from tests.ranks import run_ranks
from tests.test_tokenizers import sentencepiece_file

SHAPE = dataclasses.replace(PRESETS["tiny"], vocab_size=320)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<s>", "</s>")
SPECIAL += ("<end_of_turn>", "<|header|>", "<think>", "</think>", "<|START_THINKING|>", "<|END_THINKING|>", "[THINK]")
ID = {token: 256 + i for i, token in enumerate(SPECIAL)}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (  # TRL's requirements of a template
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML


def folder_of(
    folder: Path,
    eos: str,
    template: str | dict | None = CHATML,
    generation=None,
    config=None,
    appends: str | None = None,
) -> Path:
    """Write a byte-level ``tokenizer.json`` with all of ``SPECIAL``, and the model files that name ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend = PreTrainedTokenizerFast(tokenizer_object=library, eos_token=eos)
    backend.chat_template = template
    backend.save_pretrained(folder)
    for name, ends in (("generation_config.json", generation), ("config.json", config)):
        if ends is not None:
            (folder / name).write_text(json.dumps(ends))
    if appends:
        path = folder / "tokenizer.json"
        tree, token = json.loads(path.read_text()), {"SpecialToken": {"id": appends, "type_id": 0}}
        text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text, token],
            "pair": [text, token, other, token],
            "special_tokens": {name: {"id": name, "ids": [ID[name]], "tokens": [name]} for name in ("<s>", appends)},
        }
        path.write_text(json.dumps(tree))
    return folder


def load(folder: Path, hf: Path | None = None) -> Tokenizer:
    config = make_config(model={"tokenizer": str(folder)})
    config.model.hf = hf and str(hf)
    return load_tokenizer(config, SHAPE)


def text_of(tokenizer: Tokenizer, *ids: np.ndarray) -> str:
    return tokenizer.show(np.concatenate(ids))


def chat(text: str = "1+1?") -> Prompt:
    return Prompt("p", "2", (), messages=({"role": "user", "content": text},))


# --- ends


@pytest.mark.parametrize(
    "eos, template, generation, config, ends, trace_end",
    [
        ("<|end_of_text|>", LLAMA_3, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], None, 3, "<|eot_id|>"),
        ("<|eot_id|>", LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"], None, 2, "<|eot_id|>"),
        ("<|im_end|>", CHATML, ["<|im_end|>", "<|endoftext|>"], "<|im_end|>", 2, "<|im_end|>"),
        ("<|endoftext|>", CHATML, "<|endoftext|>", "<|endoftext|>", 1, "<|endoftext|>"),  # a base model's template
        ("<|endoftext|>", CHATML, None, ["<|im_end|>", "<|endoftext|>"], 2, "<|im_end|>"),
        ("<|endoftext|>", CHATML, {}, "<|im_end|>", 2, "<|im_end|>"),
        ("</s>", MISTRAL, "</s>", None, 1, "</s>"),
        ("</s>", GEMMA, ["</s>", "<end_of_turn>"], None, 2, "<end_of_turn>"),
        ("<|endoftext|>", MARKED, ["<|im_end|>"], None, 2, "<|im_end|>"),
        ("<|endoftext|>", STRICT, ["<|im_end|>"], None, 2, "<|endoftext|>"),
        ("<|im_end|>", None, ["<|endoftext|>"], None, 2, "<|im_end|>"),
        ("<|im_end|>", CHATML, None, None, 1, "<|im_end|>"),
    ],
)
def test_all_ends_of_the_folder_count_and_a_trace_has_the_templates(
    tmp_path, eos, template, generation, config, ends, trace_end
):
    def named(value):
        if value is None or value == {}:
            return value
        return {"eos_token_id": [ID[token] for token in value] if isinstance(value, list) else ID[value]}

    tokenizer = load(folder_of(tmp_path, eos, template, named(generation), named(config)))
    first = generation or config
    expected = {ID[eos], *(ID[token] for token in ([first] if isinstance(first, str) else first or []))}
    assert set(tokenizer.end_ids) == expected and len(expected) == len(tokenizer.end_ids) == ends
    assert tokenizer.encode_trace("7").tolist()[-1] == tokenizer.eos_id == ID[trace_end]


@pytest.mark.parametrize("end, token", [(300, "None"), (2, "'#'")])
def test_an_end_that_is_no_special_token_counts_with_a_warning(tmp_path, caplog, end, token):
    """300 is a row of the model's vocabulary without a token: its text, empty, does not mark an end."""
    generation = {"eos_token_id": [ID["<|im_end|>"], end]}
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", CHATML, generation))
    assert tokenizer.end_ids == (ID["<|im_end|>"], end)
    assert f"its end token {end} ({token}) is not a special token" in caplog.text
    assert text_of(tokenizer, tokenizer.encode_trace("So 7.")) == "So 7.<|im_end|>"
    assert tokenizer.end_inside("So 7.") is None


def test_a_byte_order_mark_in_a_template_is_refused(tmp_path):
    folder = folder_of(tmp_path, "<|im_end|>")
    path = folder / "chat_template.jinja"
    path.write_text("\ufeff" + path.read_text())
    with pytest.raises(UserError, match="chat template holds a byte order mark"):
        load(folder)


def test_the_ends_of_another_folders_model_count_where_the_tokenizer_has_them(tmp_path, caplog):
    """Cover a base model with an instruction-tuned one's tokenizer folder, and a tokenizer with other ids."""
    model, ours = tmp_path / "model", tmp_path / "tokenizer"
    folder_of(model, "<|endoftext|>", None, {"eos_token_id": [ID["<|endoftext|>"], 40, 319, 400]})
    tokenizer = load(folder_of(ours, "<|im_end|>"), model)
    assert tokenizer.end_ids == (ID["<|im_end|>"], ID["<|endoftext|>"])
    said = [record.getMessage() for record in caplog.records]
    assert [f"its end token {end} is" in line for end, line in zip((40, 319, 400), said, strict=True)] == [True] * 3


@pytest.mark.parametrize("ends", [["<|im_end|>"], "258", True, -1, 2.5, {"a": 1}])
def test_an_end_that_is_not_a_token_id_is_refused_by_file_and_key(tmp_path, ends):
    folder = folder_of(tmp_path, "<|im_end|>", generation={"eos_token_id": ends})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: expected a token id"):
        load(folder)


def test_other_ends_are_another_tokenizer_for_servers(tmp_path):
    one = load(folder_of(tmp_path / "a", "<|im_end|>"))
    two = load(folder_of(tmp_path / "b", "<|im_end|>", generation={"eos_token_id": [ID["<|endoftext|>"]]}))
    swapped = load(folder_of(tmp_path / "c", "<|endoftext|>", generation={"eos_token_id": [ID["<|im_end|>"]]}))
    assert one.digest != two.digest == swapped.digest


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|im_end|>\n<|endoftext|> \n", "</s>", ""]
)
def test_a_trace_ends_with_one_end_whatever_its_text_ends_with(tmp_path, end):
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", generation={"eos_token_id": [ID["<|endoftext|>"]]}))
    assert text_of(tokenizer, tokenizer.encode_trace(f"So 2.\n{end}")) == "So 2.\n<|im_end|>"


def test_a_response_is_read_without_its_end(tmp_path):
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", generation={"eos_token_id": [40]}))  # not a special token
    assert tokenizer.decode(np.array([*tokenizer.encode_trace("12")[:-1], 40])) == "12"


def test_a_trace_with_an_end_inside_is_refused_or_left_out_before_training(tmp_path, caplog):
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", generation={"eos_token_id": [ID["<|endoftext|>"]]}))
    traces = ["2<|im_end|>", "2<|im_end|>\n<|im_start|>user\n3?", "a<|endoftext|>b", "<|im_start|>", "</s> and on"]
    prompt = Prompt("odd", "2", tuple(Teacher(f"t{i}", trace) for i, trace in enumerate(traces)))
    with pytest.raises(UserError, match=r"prompt odd: the trace of teacher t1 holds the end token <\|im_end\|> before"):
        with_usable_traces([prompt], tokenizer, skip=False)
    (kept,) = with_usable_traces([prompt], tokenizer, skip=True)
    assert [teacher.name for teacher in kept.teachers] == ["t0", "t3", "t4"] and "2 traces left out" in caplog.text
    for teacher in kept.teachers:
        assert set(tokenizer.encode_trace(teacher.trace, prompt)[:-1].tolist()).isdisjoint(tokenizer.end_ids)
    with pytest.raises(UserError, match="prompt odd: a trace holds an end token"):
        tokenizer.encode_trace(traces[1], prompt)


# --- prompts


@pytest.mark.parametrize("appended", ["<|im_end|>", "</s>"])
def test_nothing_follows_a_prompt_whatever_the_tokenizer_appends(tmp_path, appended):
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", appends=appended))
    for text in ("1+1?", "<s>1+1?"):  # a text's opening token is put before it once
        assert text_of(tokenizer, tokenizer.encode_prompt(Prompt("p", "2", (), text=text))) == "<s>1+1?"
    assert text_of(tokenizer, tokenizer.encode_prompt(chat())).endswith("<|im_start|>assistant\n")
    assert text_of(tokenizer, tokenizer.encode_trace("2")) == "2<|im_end|>"


@pytest.mark.parametrize(
    "settings, begin", [({"add_eos_token": True}, "<s>"), ({"add_eos_token": True, "add_bos_token": False}, "")]
)
def test_nothing_follows_a_prompt_of_a_sentencepiece_tokenizer_that_appends_its_end(tmp_path, settings, begin):
    shutil.copy(sentencepiece_file("v1"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(
        make_config(model={"tokenizer": str(tmp_path)}), dataclasses.replace(SHAPE, vocab_size=32_000)
    )
    assert tokenizer._backend("1+1?")["input_ids"][-1] == tokenizer.eos_id, "the tokenizer itself would"
    ids = tokenizer.encode_prompt(Prompt("p", "2", (), text="1+1?")).tolist()
    assert tokenizer.show(np.array(ids)).replace(" ", "") == f"{begin}1+1?"
    assert tokenizer.encode_trace("2</s>").tolist().count(tokenizer.eos_id) == 1


def test_named_templates_are_read_as_transformers_reads_them(tmp_path):
    tokenizer = load(folder_of(tmp_path / "a", "<|im_end|>", {"default": THINKS, "tool_use": "x"}))
    assert text_of(tokenizer, tokenizer.encode_prompt(chat())).endswith("assistant\n<think>\n")
    other = load(folder_of(tmp_path / "b", "<|im_end|>", {"rag": CHATML, "tool_use": "x"}))
    keep(tmp_path, other)
    with pytest.raises(UserError, match=r"prompt p cannot be tokenized: ValueError: .*multiple chat templates"):
        other.encode_prompt(chat())


def test_a_chat_without_a_template_is_refused_by_name_or_joined(tmp_path):
    folder = folder_of(tmp_path, "<|im_end|>", None)
    prompt = Prompt("q7", "2", (), messages=({"role": "system", "content": "a"}, {"role": "user", "content": "b"}))
    with pytest.raises(UserError, match=r"prompt q7 is a chat, and the tokenizer has no chat template .*plain_chat"):
        load(folder).encode_prompt(prompt)
    config = make_config(model={"tokenizer": str(folder)})
    config.data.plain_chat = True
    tokenizer = load_tokenizer(config, SHAPE)
    assert text_of(tokenizer, tokenizer.encode_prompt(prompt)) == "a\nb"


# --- thoughts

OPENINGS = [
    # the template's end, a trace, what follows the prompt
    ("<think>\n", "<think>\nadd</think>2", "add</think>2"),
    ("<think>\n", "<think>add</think>2", "add</think>2"),
    ("<think>\n", "\n<think>\n\nadd</think>2", "\nadd</think>2"),
    ("<think>\n", "add</think>2", "add</think>2"),
    ("<think>", "<think>\nadd</think>2", "\nadd</think>2"),
    ("<|START_THINKING|>", "<|START_THINKING|>add<|END_THINKING|>2", "add<|END_THINKING|>2"),
    ("[THINK]", "[THINK]add[/THINK]2", "add[/THINK]2"),
    ("<seed:think>\n", "<seed:think>\nadd</seed:think>2", "add</seed:think>2"),
    ("", "<think>\nadd</think>2", "<think>\nadd</think>2"),
    ("", "<|im_start|>assistant\n2", "2"),
    ("<think>\n", "<|im_start|>assistant\n<think>\nadd</think>2", "add</think>2"),
    ("Sure: ", "Sure: 2", "Sure: 2"),
]


@pytest.mark.parametrize("opened, trace, rest", OPENINGS)
def test_what_the_prompt_has_begun_is_not_begun_again(tmp_path, opened, trace, rest):
    template = CHATML.replace("assistant\n{% endif", f"assistant\n{opened}{{% endif")
    tokenizer, prompt = load(folder_of(tmp_path, "<|im_end|>", template)), chat()
    after = f"<|im_start|>assistant\n{opened}{rest}<|im_end|>"
    for given in (prompt, None):
        ids = tokenizer.encode_prompt(prompt), tokenizer.encode_trace(trace, given)
        assert text_of(tokenizer, *ids) == "<|im_start|>user\n1+1?<|im_end|>\n" + after


def test_a_template_that_begins_a_thought_for_some_prompts_alone_is_followed_prompt_by_prompt(tmp_path):
    template = CHATML.replace(
        "assistant\n{% endif", "assistant\n{% if messages[0].content == 'think' %}<think>\n{% endif %}{% endif"
    )
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", template))
    for text, rest in (("think", "add</think>2"), ("1+1?", "<think>\nadd</think>2")):
        assert text_of(tokenizer, tokenizer.encode_trace("<think>\nadd</think>2", chat(text))) == rest + "<|im_end|>"


def test_a_plain_prompt_is_its_own_opening(tmp_path):
    """A template's thought is not in it; one that the prompt itself ends with is."""
    tokenizer = load(folder_of(tmp_path, "<|im_end|>", THINKS))
    for text, rest in (("1+1?", "<think>\nadd</think>2"), ("1+1?\n<think>\n", "add</think>2")):
        prompt = Prompt("p", "2", (), text=text)
        assert text_of(tokenizer, tokenizer.encode_trace("<think>\nadd</think>2", prompt)) == rest + "<|im_end|>"


# --- the clock


@pytest.mark.parametrize("form, shown", [("%d %b %Y", "05 Mar 2026"), ("%Y-%m-%d %H:%M", "2026-03-05 00:00")])
def test_a_template_that_reads_the_clock_reads_the_given_day(tmp_path, form, shown):
    template = f"Today: {{{{ strftime_now('{form}') }}}}\n" + CHATML
    backend = load(folder_of(tmp_path, "<|im_end|>", template))._backend
    tokenizer = Tokenizer(backend, ID["<|im_end|>"], day=date(2026, 3, 5))
    assert tokenizer.template.reads_clock and not load(folder_of(tmp_path / "b", "</s>")).template.reads_clock
    assert text_of(tokenizer, tokenizer.encode_prompt(chat())).startswith(f"Today: {shown}\n<|im_start|>user")
    assert tokenizer.encode_trace("2").tolist()[-1] == ID["<|im_end|>"]


def a_rank_of_another_day(folder: str, run: str) -> tuple[str, list[int], str]:
    """Rank 1's clock is a day ahead."""
    from megatron_dypo.preflight import Inputs, agree_on_day
    from megatron_dypo.records import Group
    from megatron_dypo.runtime import distributed

    layout = distributed.init()
    config = make_config(model={"tokenizer": folder})
    config.trainer.run_dir = run
    tokenizer = load_tokenizer(config, SHAPE, date(2026, 3, 5 + layout.rank))
    held_out = [Group(chat(), tokenizer.encode_prompt(chat()))]
    inputs = Inputs(SHAPE, tokenizer, [], held_out, {}, [], None)
    agree_on_day(config, inputs)
    held_out_ids, asked = inputs.held_out[0].prompt_ids.tolist(), text_of(tokenizer, tokenizer.encode_prompt(chat()))
    return tokenizer.day.isoformat(), held_out_ids, asked


def test_all_ranks_read_the_day_of_the_runs_start_and_a_resume_does_too(tmp_path):
    template = "{{ strftime_now('%d %b') }}\n" + CHATML
    folder, run = folder_of(tmp_path / "tokenizer", "<|im_end|>", template), tmp_path / "run"
    first, second = run_ranks(2, a_rank_of_another_day, str(folder), str(run))
    assert first == second and first[0] == "2026-03-05" and first[2].startswith("05 Mar\n")
    assert start_day(tmp_path / "absent", run) == date(2026, 3, 5) and start_day(tmp_path / "absent") is None


def test_a_resume_with_another_tokenizer_names_what_differs(tmp_path):
    before = load(folder_of(tmp_path / "a", "<|im_end|>"))
    keep(tmp_path / "run", before)
    check_kept(tmp_path / "run", before)
    check_kept(tmp_path / "of a version before", before)
    changed = {
        r"end tokens \(was \[258\], now \[256, 258\]\)$": {"generation": {"eos_token_id": [256]}},
        r"differing: chat template \(was '": {"template": GEMMA},
        r"end of a trace \(was 258, now 256\)": {"eos": "<|endoftext|>"},
    }
    for i, (what, options) in enumerate(changed.items()):
        after = load(folder_of(tmp_path / str(i), **{"eos": "<|im_end|>"} | options))
        with pytest.raises(UserError, match=what):
            check_kept(tmp_path / "run", after)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"day": 3}', '{"day": "2026-13-01"}', "\xff"])
def test_a_damaged_record_of_the_start_is_refused_by_name(tmp_path, text):
    (tmp_path / "text.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"text\.json: not the record of a run"):
        start_day(tmp_path)
