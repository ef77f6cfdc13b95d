"""What a person writes, broken: settings, layers, data and chat templates."""

import json
from pathlib import Path

import pytest
import yaml
from attempts import attempt, draw, linked
from damage import break_bytes, break_value

from litfreeze.__main__ import main

CHUNK = 20
# CI has time for every eighth one
CASES = [pytest.param(i, marks=pytest.mark.matrix if i % (8 * CHUNK) else ()) for i in range(0, 300, CHUNK)]

ALWAYS = {
    "precision": "32-true",
    "devices": 1,
    "seed": 3,
    "cache_limit": "1GB",
    "train": {"lr": 1e-4, "max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "max_norm": None},
    "eval": {"interval": 1, "max_samples": 4},
    "data": {"prompt_style": "alpaca", "max_seq_length": 64, "mask_prompt": True},
}
SETTINGS = [
    ("full", {"trainable_layers": "5,11", "trainable_extra": ["final_norm"], "layer_lr": "5:1e-4, final_norm:1e-5"}),
    ("full", {"unfreeze": "0:11; 1:10", "save": "delta", "lr_decay_by_depth": 0.5}),
    ("lora", {"trainable_layers": [0, "1-9"], "full_layers": "10,11", "lora_r": 4, "lora_targets": "q_proj,v_proj"}),
]


def config(path: Path, content: bytes, method: str, tmp_path: Path) -> list[str]:
    path.write_bytes(content)
    return ["finetune", method, "--config", str(path), "--data", str(tmp_path / "no.jsonl"), "--out_dir", "out"]


@pytest.mark.parametrize("first", CASES)
def test_settings(first, cwd, tmp_path):
    """A file for --config. What is fine in it ends at data that is not there."""
    for number in range(first, first + CHUNK):
        rng = draw("settings", number)
        method, own = SETTINGS[number % 3]
        settings = json.loads(json.dumps({**own, **ALWAYS}))
        if rng.random() < 0.6:
            for _ in range(rng.choice((1, 1, 2))):
                settings = break_value(settings, rng)
            text = rng.choice((json.dumps, yaml.safe_dump))(settings)
            data = text.encode("utf-8", "surrogatepass")
        else:
            data = break_bytes(yaml.safe_dump(settings).encode(), rng)
        argv = config(tmp_path / "settings.yaml", data, method, tmp_path)
        assert attempt(argv, f"settings {number}: {data[:500]!r}") == 2


# What layers, rates, times and adapters are. Each of them is fine by itself
LAYERS = ["5", "-1", "0-3", "-4,-2", "-2:", "last:8", "first:2", "every:4", "20%-80%", "0,1,11", "8-9,-1"]
OPTIONS = {
    "--trainable_layers": [*LAYERS, "all", "rank:random:4", "rank:spectrum:2,11"],
    "--freeze_trainable_layers_ids": ["1,2,10", "11"],
    "--layer_lr": [
        "11:1e-4",
        "0-3:1e-5, -2::1e-3",
        "embed:1e-5",
        "20%-80%:3e-4",
        "0-7:1e-6, 8-11:1e-5, final_norm:5e-5",
    ],
    "--unfreeze": ["gradual:4", "0:11;2:9,10", "0:0;50%:all", "0:11;3:freeze 11", "0:11;1e:0-3", "0:14%-80%;10:last:4"],
    "--lora_targets": ["q_proj,v_proj", "up_proj", "attn", "head", "*_proj", "re:.*mlp.*"],
    "--full_layers": LAYERS,
    "--lora_r": ["8", "1"],
    "--lora_alpha": ["16", "0.5"],
}
PIECES = [
    *",;:-=%.+ ",
    "--",
    "::",
    "e",
    "9" * 30,
    "1e999",
    "nan",
    "-0",
    "\uff10",
    "²",
    "\u00a0",
    "\n",
    "all",
    "x",
    "null",
    "{}",
    "[",
    "*",
]


def break_word(text: str, rng) -> str:
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    other = rng.choice([word for words in OPTIONS.values() for word in words])
    return rng.choice((
        text[:i] + text[j:], text[:i] + rng.choice(PIECES) + text[i:], text[:i] + rng.choice(PIECES) + text[j:],
        text + text, f"{text},{other}", f"{text};{other}", other, text[::-1], text[:i] + other + text[i:], text * 500,
    ))  # fmt: skip


def choice(words: list[str], tmp_path: Path) -> list[str]:
    method = "lora" if any(word.startswith(("--lora", "--full_layers")) for word in words) else "full"
    return ["finetune", method, *words, "--data", str(tmp_path / "no.jsonl"), "--out_dir", "out"]


@pytest.mark.parametrize("first", CASES)
def test_layers(first, cwd, tmp_path):
    """Words of the command line. What is fine ends at data that is not there."""
    for number in range(first, first + CHUNK):
        rng = draw("layers", number)
        option = rng.choice(list(OPTIONS))
        words = [f"{option}={break_word(rng.choice(OPTIONS[option]), rng)}"]
        if rng.random() < 0.3:
            beside = rng.choice(list(OPTIONS))
            words.append(f"{beside}={rng.choice(OPTIONS[beside])}")
        assert attempt(choice(words, tmp_path), f"layers {number}") == 2


def test_what_is_whole_comes_through(cwd, tmp_path, capsys):
    """Else the broken ones would be refused for another reason than what broke."""
    lines = [choice([f"{option}={word}"], tmp_path) for option, words in OPTIONS.items() for word in words]
    for i, (method, own) in enumerate(SETTINGS):
        content = yaml.safe_dump({**own, **ALWAYS}).encode()
        lines.append(config(tmp_path / f"{i}.yaml", content, method, tmp_path))
    for argv in lines:
        assert main(argv) == 2
        assert "There is no data" in (told := capsys.readouterr().err), f"{argv}: {told}"


RECORDS = [
    {"instruction": "Add one.", "input": "3", "output": "4"},
    {"prompt": "What is 2 + 2?", "completion": "4"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello."}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"text": "A day in May."},
    {"text": "play a song", "label": "music"},
]  # fmt: skip
CSV = 'text,label\nplay a song,music\n"is it raining, or\nnot",weather\n'


@pytest.mark.parametrize("first", CASES)
def test_data(first, cwd, tmp_path):
    """Records. What is fine in them ends at more warmup than there are steps."""
    for number in range(first, first + CHUNK):
        rng = draw("data", number)
        record = rng.choice(RECORDS)
        task = ["--task", "classification"] if "label" in record and number % 2 else []
        records = [json.loads(json.dumps(record)) for _ in range(4)]
        suffix = rng.choice((".json", ".jsonl", ".csv", ".txt"))
        if suffix == ".csv":
            data = break_bytes((CSV * 3).encode(), rng)
        elif rng.random() < 0.3:
            data = break_bytes("\n".join(map(json.dumps, records)).encode(), rng)
        else:
            for _ in range(rng.choice((1, 2))):
                records = break_value(records, rng)
            lines = [json.dumps(one, ensure_ascii=number % 3 > 0) for one in records]
            text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
            data = text.encode("utf-8", "surrogatepass")
        file = tmp_path / f"data{suffix}"
        file.write_bytes(data)
        steps = ["--train.max_steps", "1", "--train.lr_warmup_steps", "9"]
        argv = ["finetune", "full", "--data", str(file), *task, *steps, "--out_dir", "out"]
        assert attempt(argv, f"data {number}: {data[:300]!r}") == 2


TEMPLATES = [
    """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    """{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}
{%- set ns.system = m.content | trim %}{% endfor %}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- macro turn(one) %}[{{ one.role | upper }}] {{ one['content'] | replace('a', 'b') }}{% endmacro %}
{{- turn(m) }}{{ [m] | map(attribute='role') | join(', ') }}{{ m | tojson(indent=2) }}{% endfor %}""",
    """{% set text = messages[-1]['content'].split('</think>')[-1].lstrip() %}{% for i in range(3) %}{{ text * 2 }}
{{- '%s: %d' % (messages[0].role, i) }}{{ '{:>5}'.format(i) }}{% if i > 1 %}{% break %}{% endif %}{% endfor %}""",
]
PARTS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 9**9 }}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "{{ 2 ** 2 ** 60 }}",
    "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{% block a %}{% endblock %}",
    "{{ lipsum(n=99999) }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as p %}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ namespace.__dict__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ joiner.__call__.__func__.__globals__ }}",
    "{{ dict(x=1) | attr('__class__') }}",
    "{{ (messages * 9999) * 9999 }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'abc'.translate({97: 'x' * 10**7}) }}",
    "{{ strftime_now('%Y' * 10**6) }}",
    "{{ range(99999) | sort | list | batch(2) | list | length }}",
    "{{ [[]] * 10**7 }}",
]


@pytest.mark.parametrize("first", CASES)
def test_chat_templates(first, cwd, seed, tmp_path):
    for number in range(first, first + CHUNK):
        rng = draw("template", number)
        template = rng.choice(TEMPLATES)
        i = rng.choice([i for i in range(len(template) + 1) if template[i : i + 1] == "{" or i == len(template)])
        if number % 3 == 0:
            template = template[:i] + PARTS[number // 3 % len(PARTS)] + template[i:]
        elif number % 3 == 1:
            template = break_bytes(template.encode(), rng).decode("utf-8", "replace")
        else:
            other = rng.choice(TEMPLATES)
            template = template[: rng.randrange(len(template))] + other[rng.randrange(len(other)) :]
        place = linked(seed("demo"), tmp_path / str(number))
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
        argv = ["generate", "--checkpoint_dir", str(place), "--prompt_style", "chat_template", "--prompt", "Hi"]
        attempt([*argv, "--max_new_tokens", "1"], f"template {number}: {template}")
        assert not any(cwd.iterdir())
