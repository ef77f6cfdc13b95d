"""Requests in OpenAI's form: every one is read to the last word, or refused in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.serve.completions import LABELS, READ, REFUSED, Asked, Refused, read_request

ASKED = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*READ, *REFUSED, *LABELS, "else"])
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "type", "text"]), JSON), max_size=2)


@given(JSON | st.dictionaries(NAMES, JSON | MESSAGES, max_size=4), st.booleans())
def test_any_body_is_read_or_refused(body, completed):
    if completed and isinstance(body, dict):
        body = {**ASKED, **body}
    try:
        asked = read_request(body, ["base", "lora"])
    except Refused as error:
        told = error.body["error"]
        assert error.status in (400, 404) and told["message"] and told["type"] == "invalid_request_error"
        assert told["param"] is None or told["param"].partition("[")[0] in {*body, "model", "messages"}
        return
    assert isinstance(asked, Asked) and asked.model in ("base", "lora")
    assert 0 <= asked.temperature <= 2 and 0 < asked.top_p <= 1
    assert asked.messages and all(message["role"] in ("system", "user", "assistant") for message in asked.messages)
    assert all(isinstance(message["content"], str) for message in asked.messages)


@given(st.sampled_from(sorted(REFUSED)), JSON)
def test_what_is_not_done_is_refused_unless_it_asks_for_nothing(name, value):
    nothing = value is None or any(value == one and type(value) is type(one) for one in REFUSED[name])
    if nothing:
        assert read_request({**ASKED, name: value}, ["base"]) == read_request(ASKED, ["base"])
    else:
        with pytest.raises(Refused, match=f"^{name}: "):
            read_request({**ASKED, name: value}, ["base"])


def test_what_is_left_out_is_as_openai_has_it():
    messages = [{"role": "user", "content": "Hi"}]
    assert read_request(ASKED, ["base"]) == Asked("base", messages, 1.0, 1.0, None, None, [], None, False, False)
    everything = {
        **ASKED, "temperature": 0, "top_p": 0.5, "top_k": 3, "max_tokens": 7, "max_completion_tokens": 7,
        "stop": "\n", "seed": -1, "stream": True, "stream_options": {"include_usage": True}, "user": "me",
    }  # fmt: skip
    assert read_request(everything, ["base"]) == Asked("base", messages, 0, 0.5, 3, 7, ["\n"], -1, True, True)


def test_half_a_character_is_told():
    with pytest.raises(Refused, match=r"messages\[0\].* half a character"):
        read_request({"model": "base", "messages": [{"role": "user", "content": "hi \ud800"}]}, ["base"])
