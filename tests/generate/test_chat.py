"""`litfreeze chat`: what was said is remembered and put by the template, adapters change within a conversation, and
Ctrl-C ends an answer, not the program."""

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from litfreeze.__main__ import main
from litfreeze.data.formats import to_conversation
from litfreeze.data.records import read_records
from litfreeze.demo import MODEL_DIR
from litfreeze.generate.answer import Answer, load_models, open_answerers

FIRST, SECOND = "Play some jazz", "Book a table for six in a bar"


@pytest.fixture
def chat(monkeypatch, capsys):
    """Lines in; the exit code, standard output and standard error out."""

    def run(*lines: str, words: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", *words.split(), "--accelerator", "cpu"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def expected(adapter):
    """What each says to a whole conversation, loaded on its own: expected(name, question, answer, question, …)."""
    answerers = open_answerers(MODEL_DIR, adapters=f"lora={adapter}")
    load_models(answerers.values(), "cpu", None)

    def say(name: str, *said: str, system: str | None = None, most: int = 24) -> str:
        roles = ("user", "assistant")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return "".join(Answer(answerers[name], answerers[name].tokens(messages), most))

    return say


def test_what_was_said_is_remembered(chat, expected):
    one = expected("base", FIRST)
    two = expected("base", FIRST, one, SECOND)
    assert two != expected("base", SECOND)  # else nothing is shown
    code, told, asides = chat(FIRST, "", SECOND, words="--max_new_tokens 24")
    assert code == 0 and told == f"{one}\n{two}\n"
    assert f"base ({MODEL_DIR}); prompt style chat_template" in asides


def test_commands(chat, expected, adapter, tmp_path):
    lines = [FIRST, "/adapter lora", SECOND, f"/save {tmp_path / 'said.json'}", "/reset", FIRST, "/system Be brief"]
    lines += [
        SECOND,
        f"/save {tmp_path / 'said.json'}",
        "/adapter",
        "/help",
        "/adapter base",
        "/system",
        "//help",
        "/exit",
    ]
    code, told, asides = chat(*lines, FIRST, words=f"--adapters lora={adapter} --max_new_tokens 24")
    one = expected("base", FIRST)
    two = expected("lora", FIRST, one, SECOND)
    three = expected("lora", FIRST)
    four = expected("lora", FIRST, three, SECOND, system="Be brief")
    five = expected("base", FIRST, three, SECOND, four, "/help")
    assert len({one, two, three, four}) == 4
    assert code == 0 and told == "".join(f"{text}\n" for text in (one, two, three, four, five))
    assert "lora" in asides and "/save FILE" in asides and "2 turns in" in asides
    # What was saved is data for a next run
    (record,) = read_records(tmp_path / "said.json")
    texts = [message["content"] for message in to_conversation(record.fields)]
    assert texts == ["Be brief", FIRST, three, SECOND, four]
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/adaptr lora", r"unknown command /adaptr. Did you mean '/adapter'?"),
        ("/adapter sql", "no adapter sql. Known are base."),
        ("/save", "/save needs the name of a file"),
        ("/save said.txt", "must be a .json"),
        ("/save nowhere/said.json", "in a folder that is there"),
        ("/save taken.json", "there is such a file already"),
        ("word " * 600, "the model sees 512"),
    ],
)
def test_wrong_lines_in_a_pipe_end_it(chat, line, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken.json").write_text("mine", "utf-8")
    code, out, asides = chat(line, FIRST)
    assert code == 2 and out == "" and told in asides and asides.count("\n") == 2
    assert Path("taken.json").read_text("utf-8") == "mine"


def test_the_oldest_turns_are_forgotten_whole(chat, expected):
    long = "Play " + "some more jazz and " * 24
    lines = [f"{long}{i}" for i in range(6)]
    code, told, asides = chat(*lines, words="--max_new_tokens 8")
    told = told.split("\n")[:-1]
    assert code == 0 and len(told) == 6
    forgotten = [line for line in asides.splitlines() if "the model no longer sees the first" in line]
    starts = {
        int(line.split(" of ")[2].split(" ")[0]): int(line.split("first ")[1].split(" ")[0]) for line in forgotten
    }
    assert len(starts) == len(forgotten) > 1
    start = 0
    for i, answer in enumerate(told):
        start = starts.get(i, start)  # each answer comes of exactly the turns that were kept
        assert expected("base", *_turns(lines, told, start, i), most=8) == answer
    # Whoever asks for more room loses more, up to a fourth of the context
    _, _, asides = chat(*lines, words="--max_new_tokens 400")
    assert int(asides.split("the first ")[-1].split(" ")[0]) > start


def _turns(lines: list[str], answers: list[str], start: int, end: int) -> list[str]:
    return [text for i in range(start, end) for text in (lines[i], answers[i])] + [lines[end]]


def test_a_cut_answer_is_told(chat):
    code, _, asides = chat(FIRST, words="--max_new_tokens 2")
    assert code == 0 and "[cut at --max_new_tokens 2]" in asides


def test_a_checkpoint_without_a_template_is_asked_plainly(chat, tmp_path):
    path = shutil.copytree(MODEL_DIR, tmp_path / "plain")
    settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    code, told, asides = chat(FIRST, SECOND, words=f"{path} --max_new_tokens 8")
    assert code == 0 and told.count("\n") >= 2 and "plain (no chat template" in asides


def test_a_pipe_to_the_real_command():
    command = [sys.executable, "-m", "litfreeze", "chat", "--max_new_tokens", "8"]
    said = "café\n".encode() + b"caf\xe9\n"
    ran = subprocess.run(command, input=said, capture_output=True, timeout=60, check=False)
    assert ran.returncode == 2 and ran.stdout.strip()
    assert ran.stderr.endswith(b"error: What is typed or piped in must be UTF-8.\n") and b"Traceback" not in ran.stderr


def at_a_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored in what a script runs in the background


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation():
    ours, theirs = pty.openpty()
    words = ["--temperature", "50", "--max_new_tokens", "450"]  # which does not come to an end by itself
    chat = subprocess.Popen(
        [sys.executable, "-m", "litfreeze", "chat", *words], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=at_a_terminal,
    )  # fmt: skip
    os.close(theirs)
    screen = ""

    def until(text: str) -> None:
        nonlocal screen
        end = time.monotonic() + 60
        while text not in screen:
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, screen
            screen += os.read(ours, 65536).decode(errors="replace")

    try:
        until("> ")
        os.write(ours, b"Play\n")
        before = len(screen)
        while len(screen) < before + 40:  # the echo, and some of the answer
            screen += os.read(ours, 65536).decode(errors="replace")
        os.write(ours, b"\x03")
        until("[stopped]\r\n> ")
        os.write(ours, b"/nothing\n")
        until("is written //.\r\n> ")
        time.sleep(0.5)  # readline does not see one that comes just as it begins to wait
        os.write(ours, b"\x03")
        assert chat.wait(60) == 0
        assert "Traceback" not in screen
    finally:
        chat.kill()
        os.close(ours)
