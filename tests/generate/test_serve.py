"""`litfreeze serve`: the real server, asked by OpenAI's own client."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from families import write_json

from litfreeze.__main__ import main
from litfreeze.demo import MODEL_DIR
from litfreeze.generate.answer import open_answerers
from litfreeze.generate.base import setup as generate
from litfreeze.serve.completions import Refused

pytest.importorskip("litserve", reason="pip install 'litfreeze[serve]'")
openai = pytest.importorskip("openai")

KEY = "s3cret-of-this-test"
JAZZ, TABLE = "Play some jazz", "Book a table for six in a bar"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Running:
    """A server in a process group of its own, as a terminal's, and in an empty folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.port = folder, free_port()
        self.log = folder.with_suffix(".log").open("w+b")
        command = [sys.executable, "-m", "litfreeze", "serve", "--port", str(self.port), *words]
        environment = {**os.environ, "LITFREEZE_API_KEY": KEY}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, stdout=self.log, stderr=self.log
        )
        end = time.monotonic() + 120
        while "Ctrl-C ends it." not in self.said:
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return Path(self.log.name).read_text("utf-8")

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def processes(self) -> list[int]:
        """What is alive of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                words = stat.read_text().rpartition(")")[2].split()
                if int(words[3]) == self.process.pid and words[0] != "Z":
                    found.append(int(stat.parent.name))
        return found


@pytest.fixture(scope="module")
def endless(tmp_path_factory, adapter) -> Path:
    """The adapter with another end token, so that it writes on and on."""
    path = shutil.copytree(adapter, tmp_path_factory.mktemp("endless") / "final")
    for name, key, value in (("config", "eos_token_id", 1), ("tokenizer_config", "eos_token", "<|system|>")):
        file = path / f"{name}.json"
        write_json(file, json.loads(file.read_text("utf-8")) | {key: value})
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, adapter, delta, endless) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    words = f"--adapters lora={adapter},delta={delta},endless={endless} --max_new_tokens 24"
    running = Running(folder, *words.split())
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def expected(adapter, delta):
    """What `litfreeze generate` says."""
    places = {"base": MODEL_DIR, "lora": adapter, "delta": delta}
    said = {(m, q): generate(q, p, max_new_tokens=24) for m, p in places.items() for q in (JAZZ, TABLE)}
    assert len(set(said.values())) == len(said)
    return said


def ask(client, model: str = "base", content="Play some jazz", **words):
    words = {"temperature": 0, **words}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **words)


def test_it_says_where_it_is_and_what_it_has(server, client):
    first, second, *_ = server.said.splitlines()
    assert first == f"Serves    http://127.0.0.1:{server.port}/v1; models: base, lora, delta, endless"
    assert [model.id for model in client.models.list()] == ["base", "lora", "delta", "endless"]
    assert client.models.retrieve("lora").owned_by == "litfreeze"
    # The example works as it stands
    command = second.removeprefix("Try       ")
    ran = subprocess.run(
        command, shell=True, env={**os.environ, "LITFREEZE_API_KEY": KEY}, capture_output=True, check=True
    )
    assert json.loads(ran.stdout)["choices"][0]["message"]["content"]


def test_an_answer_is_that_of_generate(client, expected):
    tokenizer = open_answerers(MODEL_DIR)["base"]
    for (model, question), text in expected.items():
        answer = ask(client, model, question)
        assert answer.choices[0].message.content == text and answer.model == model
        assert answer.choices[0].finish_reason in ("stop", "length")
        asked = len(tokenizer.tokens([{"role": "user", "content": question}]))
        used = answer.usage
        assert used.prompt_tokens == asked and used.total_tokens == asked + used.completion_tokens
        assert (used.completion_tokens == 24) == (answer.choices[0].finish_reason == "length")


def test_a_stream_is_the_same_in_pieces(client, expected):
    longest = 0
    for (model, question), text in expected.items():
        *pieces, last, used = ask(client, model, question, stream=True, stream_options={"include_usage": True})
        assert pieces[0].choices[0].delta.role == "assistant"
        longest = max(longest, len(pieces))
        assert "".join(piece.choices[0].delta.content for piece in pieces) == text
        assert {piece.choices[0].finish_reason for piece in pieces} == {None}
        assert len({piece.id for piece in (*pieces, last, used)}) == 1
        whole = ask(client, model, question)
        assert last.choices[0].finish_reason == whole.choices[0].finish_reason
        assert used.choices == [] and used.usage == whole.usage
    assert longest > 5
    assert all(piece.usage is None for piece in ask(client, stream=True))


def test_models_do_not_mix_under_concurrent_requests(client, expected):
    def one(i: int) -> tuple[str, str]:
        model, question = list(expected)[i % len(expected)]
        if i % 2:
            pieces = [piece.choices[0].delta.content or "" for piece in ask(client, model, question, stream=True)]
            return "".join(pieces), expected[model, question]
        return ask(client, model, question).choices[0].message.content, expected[model, question]

    with ThreadPoolExecutor(9) as pool:
        for said, text in pool.map(one, range(27)):
            assert said == text


def test_sampling_is_honoured(client, expected):
    text = expected["base", TABLE]
    assert len({ask(client, content=TABLE, temperature=1.5, seed=7).choices[0].message.content for _ in range(3)}) == 1
    free = {ask(client, content=TABLE, temperature=1.5).choices[0].message.content for _ in range(5)}
    assert len(free) > 1  # each draws its own seed
    tiny = ask(client, content=TABLE, temperature=2, top_p=1e-9)
    assert tiny.choices[0].message.content == text  # only the likeliest token is left
    likeliest = ask(client, content=TABLE, temperature=2, extra_body={"top_k": 1})
    assert likeliest.choices[0].message.content == text
    cut = ask(client, content=TABLE, max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    assert text.startswith(cut.choices[0].message.content)
    assert ask(client, content=TABLE, max_completion_tokens=3).choices == cut.choices
    stop = text[5:8]
    stopped = ask(client, content=TABLE, stop=["\0", stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)] and stopped.finish_reason == "stop"
    parts = [{"type": "text", "text": TABLE[:7]}, {"type": "text", "text": TABLE[7:]}]
    assert ask(client, content=parts).choices[0].message.content == text
    # A conversation, and what asks for nothing that is not done
    messages = [{"role": r, "content": c} for r, c in (("developer", "Be brief"), ("user", JAZZ), ("assistant", "Yes"))]
    words = {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    assert (
        client.chat.completions.create(model="lora", messages=messages, **words).choices[0].message.role == "assistant"
    )


@pytest.mark.parametrize(
    ("words", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "messages[0]"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused(client, words, param, stream):
    if stream and param == "stream_options":
        words = {"stream_options": {"else": True}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, stream=stream, **words)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_other_errors_have_their_form_too(server, client, stream):
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'sql'\. Served here: base, lora, delta, endless"
    ) as refused:
        ask(client, "sql", stream=stream)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"context is 512 tokens; the messages are 6[0-9][0-9]") as refused:
        ask(client, content="word " * 600, stream=stream)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"context is 512 .* are 8, and 505 are asked for"):
        ask(client, max_tokens=505, stream=stream)
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        ask(server.client("another"), stream=stream)
    for path, key in (("/v1/models", "Bearer naïve"), ("/health", KEY[:-1]), ("/info", ""), ("/", "Basic x")):
        with pytest.raises(HTTPError, match="401"):
            urlopen(Request(f"http://127.0.0.1:{server.port}{path}", headers={"Authorization": key}))
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="base", prompt="Hi")
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(openai.BadRequestError):
            client.post("/chat/completions", cast_to=object, content=body)


def test_who_leaves_is_not_answered_on(server, client):
    words = {"model": "endless", "max_tokens": 480}
    began = time.monotonic()
    assert ask(client, **words).usage.completion_tokens == 480
    one = time.monotonic() - began
    began = time.monotonic()
    for _ in range(6):
        with ask(client, stream=True, **words) as stream:
            next(iter(stream))
    ask(client, max_tokens=1)
    assert time.monotonic() - began < 3 * one
    body = json.dumps({**words, "messages": [{"role": "user", "content": JAZZ}]})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    )
    began = time.monotonic()
    for _ in range(6):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            time.sleep(0.1)
    ask(client, max_tokens=1)
    assert time.monotonic() - began < 3 * one


def test_ctrl_c_ends_it_and_nothing_is_left(server, client):
    """The last test of this server: with one answer under way, and one connection idle."""
    assert len(server.processes()) >= 4
    stream = ask(client, "endless", stream=True, max_tokens=480)
    next(iter(stream))
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(30) == 130
    for _ in range(50):  # Python's own helper, for what processes share, ends by itself
        time.sleep(0.1 if server.processes() else 0)
    assert server.processes() == []
    assert list(server.folder.iterdir()) == []
    said = server.said
    assert said.splitlines()[3:] == ["stopped by SIGINT"]
    assert KEY not in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--host 0.0.0.0", "lets other machines in: set an --api_key, or LITFREEZE_API_KEY"),
        ("--host ::", "lets other machines in"),
        ("--host 8.8.8.8", "one of 127.0.0.1, 0.0.0.0, ::"),
        ("--port 80", "must be from 1024 to 65535"),
        ("--port {taken}", "cannot be used: Address already in use"),
        ("--api_key=", "must be printable ASCII"),
        ("--checkpoint_dir nowhere", "nowhere is no directory"),
        ("--adapters a=nowhere", "--adapters a: nowhere is no directory"),
        ("--max_new_tokens 0", "must be at least 1"),
        ("--prompt_style alpca", "Unknown prompt style"),
        ("--accelerator tpu", "cannot be used here"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(words, told, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = words.format(taken=taken.getsockname()[1]).split(" ")
        assert main(["serve", "--port", str(free_port()), *words] if "--port" not in words else ["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert told in err and out == "" and err.count("\n") <= 2


def test_without_litserve_it_is_told_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "litserve", None)
    monkeypatch.delitem(sys.modules, "litfreeze.serve.worker", raising=False)
    assert main(["serve"]) == 2
    assert "pip install 'litfreeze[serve]'" in capsys.readouterr().err


def test_an_empty_prompt_is_refused_before_anything_is_said():
    from litfreeze.serve.completions import read_request
    from litfreeze.serve.worker import Answers, Served

    answers = Answers(Served(MODEL_DIR, None, None, "plain", 8, "cpu", None), ["base"], None)
    answers.answerers = open_answerers(MODEL_DIR, prompt_style="plain")
    for content in ("", []):
        messages = [{"role": "user", "content": content}]
        asked = read_request({"model": "base", "messages": messages, "stream": True}, ["base"])
        told = list(answers.predict((0, asked)))
        assert told == [{"refused": {"message": "The prompt is empty.", "param": "messages"}}]


@pytest.mark.parametrize(
    ("headers", "key", "passes"),
    [
        ({"host": "127.0.0.1:8000"}, None, True),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, None, True),  # a page of this machine's
        ({"host": "[::1]:8000"}, None, True),
        ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, None, False),
        ({"host": "127.0.0.1:8000", "origin": "null"}, None, False),
        ({"host": "evil.example:8000"}, None, False),  # a name that leads here
        ({"host": "[x"}, None, False),
        ({}, None, False),
        ({"host": "gpu.example", "authorization": f"Bearer {KEY}"}, KEY, True),
        ({"host": "127.0.0.1:8000"}, KEY, False),
    ],
)
def test_other_sites_are_refused(headers, key, passes):
    from starlette.requests import Request

    from litfreeze.serve.worker import Answers

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asked = Answers(None, ["base"], key).authorize(Request({"type": "http", "headers": raw}))
    if passes:
        asyncio.run(asked)
    else:
        with pytest.raises(Refused):
            asyncio.run(asked)
