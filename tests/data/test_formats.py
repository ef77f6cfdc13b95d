"""Records to messages: what is recognised, and what is told about the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.data.formats import to_conversation
from litfreeze.errors import UsageError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        ("completion", {"prompt": "p", "completion": "c", "slots": []}, [user("p"), assistant("c")]),
        ("completion", {"prompt": "p", "response": "c", "system": "s"}, [system("s"), user("p"), assistant("c")]),
        ("completion", {"question": "p", "answer": "c"}, [user("p"), assistant("c")]),
        ("alpaca", {"instruction": "i", "output": "o"}, [user("i"), assistant("o")]),
        ("alpaca", {"instruction": "i", "input": None, "output": "o"}, [user("i"), assistant("o")]),
        (
            "alpaca",
            {"instruction": "i", "input": "n", "output": "o", "history": [["a", "b"]], "system": "s"},
            [
                system("s"),
                user("a"),
                assistant("b"),
                {**user("i\n\nn"), "instruction": "i", "input": "n"},
                assistant("o"),
            ],
        ),
        ("chat", {"messages": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        ("chat", {"conversations": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        (
            "chat",
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [system("s"), user("a"), assistant("b")],
        ),
        (
            "chat",
            {"messages": [user("a"), {**assistant("b"), "reasoning_content": "r"}]},
            [user("a"), {**assistant("b"), "reasoning_content": "r"}],
        ),
        ("text", {"text": "t", "category": "c"}, "t"),
    ],
)
def test_formats(format, fields, expected):
    assert to_conversation(fields) == expected
    assert to_conversation(fields, format) == expected


def test_the_format_named_wins():
    fields = {"prompt": "p", "completion": "c", "text": "t"}
    assert to_conversation(fields) == [user("p"), assistant("c")]
    assert to_conversation(fields, "text") == "t"


@pytest.mark.parametrize(
    ("format", "fields", "told"),
    [
        ("auto", {"prompt": "p", "label": "c"}, "'prompt', 'label'.*instruction and output"),
        ("auto", {}, "none"),
        ("alpaca", {"prompt": "p", "completion": "c"}, "instruction and output"),
        ("auto", {"prompt": "p", "completion": None}, "'completion' should be text, not null"),
        ("auto", {"prompt": ["p"], "completion": "c"}, "'prompt' should be text, not list"),
        ("auto", {"text": 3}, "not int"),
        ("auto", {"text": "\ud83d"}, "surrogate"),
        ("auto", {"instruction": "i", "output": "o", "history": "x"}, "history"),
        ("auto", {"instruction": "i", "output": "o", "history": [["a"]]}, "history"),
        ("auto", {"instruction": "i", "output": "o", "system": 4}, "'system'"),
        ("auto", {"messages": "hi"}, "list of messages"),
        ("auto", {"messages": []}, "list of messages"),
        ("auto", {"messages": [user("a")]}, "no assistant message"),
        ("auto", {"messages": [user("a"), "b"]}, "message 2 .* should be an object"),
        ("auto", {"messages": [{"role": "usr", "content": "a"}]}, "message 1 .*unknown role 'usr'.*user"),
        ("auto", {"messages": [{"content": "a"}]}, "message 1 .*'role' is missing"),
        ("auto", {"conversations": [{"from": "human"}]}, "message 1 .*'value' is missing"),
        ("auto", {"messages": [{"role": ["user"], "content": "a"}]}, "'role' should be text"),
    ],
)
def test_what_cannot_be_read_is_told(format, fields, told):
    with pytest.raises(UsageError, match=told) as error:
        to_conversation(fields, format)
    assert "\n" not in str(error.value)


KEYS = ["messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "question", "answer", "text"]), JSON), st.sampled_from(["auto", "chat"]))
def test_any_record_is_read_or_told(fields, format):
    try:
        conversation = to_conversation(fields, format)
    except UsageError:
        return
    if isinstance(conversation, str):
        assert conversation == fields["text"]
        return
    assert any(message["role"] == "assistant" for message in conversation)
    for message in conversation:
        assert message["role"] in {"system", "user", "assistant", "tool"}
        message["content"].encode("utf-8")
