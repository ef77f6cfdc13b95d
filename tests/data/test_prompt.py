"""Messages to text, and which parts of it are learned."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import STYLES, Prompt
from litfreeze.data.samples import load_samples
from litfreeze.errors import UsageError
from litfreeze.tokenizer import Tokenizer

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}\
{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}\
{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}\
{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# The last answer gets a thinking block, which earlier ones lose.
QWEN3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}\
{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ answer }}\
{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHAT = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]

WORDS = st.lists(st.sampled_from(["the", "quick", "fox", "a1", "q2", "café", "你"]), min_size=1, max_size=5).map(
    " ".join
)


@st.composite
def conversations(draw):
    turns = [m for _ in range(draw(st.integers(1, 3))) for m in (user(draw(WORDS)), assistant(draw(WORDS)))]
    return ([{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []) + turns


def learned(prompt, messages):
    return [text for text, learned in prompt.segments(messages) if learned]


def text(prompt, messages):
    return "".join(text for text, _ in prompt.segments(messages))


# The checkpoint's own template


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")], ids=["chatml", "llama3"]
)
def test_learned_tokens_are_those_transformers_marks(make_tokenizer, template, end):
    """transformers finds the assistant's tokens by the template's `generation` tags; here they are not looked at."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(template, eos=end)
    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    prompt = Prompt.choose(None, None, tokenizer)

    @settings(deadline=None, max_examples=40)
    @given(conversations())
    def check(messages):
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, mask = [], []
        for segment, is_learned in prompt.segments(messages):
            ids = tokenizer.encode(segment, continues=bool(tokens))
            tokens += ids
            mask += [int(is_learned)] * len(ids)
        # Theirs goes on with the white space after the last end token, which teaches nothing.
        assert tokens == expected["input_ids"][: len(tokens)]
        assert mask == expected["assistant_masks"][: len(tokens)]
        assert tokenizer.decode(expected["input_ids"][len(tokens) :], skip_special_tokens=False).strip() == ""

    check()


def test_a_single_turn_is_the_generation_prompt_and_the_completion(make_tokenizer):
    prompt = Prompt.choose(None, None, make_tokenizer(CHATML, eos="<|im_end|>"))
    given_text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.segments([user("q"), assistant(" a\n")]) == [(given_text, False), (" a\n<|im_end|>", True)]
    assert prompt.for_generation([user("q")]) == given_text


def test_turns_that_are_rewritten_later(make_tokenizer):
    prompt = Prompt.choose(None, None, make_tokenizer(QWEN3, eos="<|im_end|>"))
    chat = [user("q1"), assistant("<think>why</think>\n\na1"), user("a1?"), assistant("a2")]
    assert prompt.segments(chat) == [
        ("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n", False),
        ("a1<|im_end|>", True),
        ("\n<|im_start|>user\na1?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\na2<|im_end|>", True),
    ]


def test_template_arguments_are_used_and_saved(make_tokenizer):
    tokenizer = make_tokenizer(QWEN3, eos="<|im_end|>")
    prompt = Prompt.choose(None, None, tokenizer, {"enable_thinking": False})
    assert learned(prompt, CHAT) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert prompt.for_generation([user("q")]).endswith("assistant\n<think>\n\n</think>\n\n")
    again = Prompt.choose(None, prompt.to_dict(), tokenizer)
    assert again == prompt
    assert Prompt.choose(None, prompt.to_dict(), tokenizer, {"enable_thinking": True}).arguments["enable_thinking"]


@settings(deadline=None, max_examples=40)
@given(messages=conversations())
def test_every_answer_is_learned_under_every_template(make_tokenizer, messages):
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (QWEN3, "<|im_end|>")):
        tokenizer = make_tokenizer(template, end)
        prompt = Prompt.choose(None, None, tokenizer)
        assert text(prompt, messages) == tokenizer.render_chat(messages).rstrip()
        answers = [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert [part.removeprefix("<think>\n\n</think>\n\n") for part in learned(prompt, messages)] == answers
        assert prompt.segments([*messages, user("and?")]) == prompt.segments(messages)


def test_a_template_that_closes_with_nothing_gets_the_end_token(make_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    prompt = Prompt.choose(None, None, make_tokenizer(template))
    assert learned(prompt, CHAT) == ["a1", "a2</s>"]


def test_an_end_token_in_the_record_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    for style in STYLES:
        parts = learned(Prompt(style, tokenizer), [user("q"), assistant("a<|im_end|>")])
        assert "".join(parts).count("<|im_end|>") == 1


def test_a_template_that_hides_the_answer_is_told(make_tokenizer):
    prompt = Prompt.choose(None, None, make_tokenizer("{{ messages | length }}"))
    with pytest.raises(UsageError, match=r"message 2 .*--data\.prompt_style"):
        prompt.segments([user("q"), assistant("a")])
    prompt = Prompt.choose(None, None, make_tokenizer("{{ messages[-1].content }}"))
    with pytest.raises(UsageError, match=r"--data\.prompt_style"):
        prompt.segments(CHAT)


# Styles without a template


def test_styles(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)  # which is no part of the text
    chat = [{"role": "system", "content": "s"}, *CHAT]
    expected = {
        "alpaca": [
            ("s\n\n### Instruction:\nq1\n\n### Response:\n", False),
            ("a1</s>", True),
            ("\n\n### Instruction:\nq2\n\n### Response:\n", False),
            ("a2</s>", True),
        ],
        "chatml": [
            ("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n", False),
            ("a1<|im_end|></s>", True),
            ("\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n", False),
            ("a2<|im_end|></s>", True),
        ],
        "llama3": [
            (
                "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>"
                "\n\nq1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ("a1<|eot_id|></s>", True),
            (
                "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ("a2<|eot_id|></s>", True),
        ],
        "plain": [("s\nq1", False), ("a1</s>", True), ("q2", False), ("a2</s>", True)],
    }
    for style, segments in expected.items():
        prompt = Prompt.choose(style, None, tokenizer)
        assert prompt.segments(chat) == segments
        assert prompt.for_generation(chat[:-1]) == "".join(text for text, _ in segments[:-1])


@pytest.mark.parametrize(("style", "eos"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_a_closing_text_that_ends_a_generation_needs_no_end_token(make_tokenizer, style, eos):
    assert learned(Prompt(style, make_tokenizer(eos=eos)), CHAT) == [f"a1{eos}", f"a2{eos}"]


def test_alpaca_with_and_without_input(make_tokenizer):
    prompt = Prompt("alpaca", make_tokenizer())
    with_input = {**user("i\n\nn"), "instruction": "i", "input": "n"}
    assert prompt.for_generation([with_input]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n"
    )
    assert prompt.for_generation([user("i")]) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\ni\n\n### Response:\n"
    )


@settings(deadline=None, max_examples=30)
@given(messages=conversations(), style=st.sampled_from(STYLES[1:]))
def test_what_is_generated_from_is_what_was_trained_on(make_tokenizer, messages, style):
    prompt = Prompt(style, make_tokenizer())
    assert prompt.for_generation(messages[:-1]) == "".join(text for text, _ in prompt.segments(messages)[:-1])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    for part, answer in zip(learned(prompt, messages), answers, strict=True):
        assert part.startswith(answer) and part.endswith("</s>")


@pytest.mark.parametrize("kind", ["first", "always", "never", "tokenizer.model"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_style_is_read_as_transformers_reads_its_text(tmp_path, kind, bos):
    """Tokenizers of SentencePiece's kind, which differ in where they put a space before a word."""
    from transformers import AutoTokenizer

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": bos}
    if kind == "tokenizer.model":
        names |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        write_sentencepiece_model(tmp_path)
    else:
        write_metaspace(tmp_path, kind, bos)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "the fox", "completion": "a1"}', encoding="utf-8")
    for style in STYLES[1:]:
        prompt = Prompt(style, tokenizer)
        text = prompt.for_generation([user("the fox")])
        expected = theirs(text)["input_ids"]
        assert expected[:1] == [1] or not bos
        assert prompt.encode([text]) == [expected]
        (sample,) = load_samples(DataArgs(tmp_path / "a.jsonl", val_split_fraction=0.0), tokenizer, prompt, 512).train
        assert sample.prompt_tokens.tolist() == expected


def write_metaspace(path, scheme, bos):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"the", "▁t", "▁th", "▁the", "th"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("t", "h")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path / "tokenizer.json"))


def write_sentencepiece_model(path):
    corpus = path / "corpus"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 4, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


# The choice


def test_the_order_of_the_choice(make_tokenizer):
    bare, chatty = make_tokenizer(), make_tokenizer(CHATML)
    saved = {"style": "plain", "arguments": {}}
    assert Prompt.choose("llama3", saved, chatty).style == "llama3"
    assert Prompt.choose(None, saved, chatty).style == "plain"
    assert Prompt.choose(None, None, chatty).style == "chat_template"
    assert Prompt.choose(None, None, bare).style == "alpaca"


def test_saved_arguments_belong_to_the_saved_style(make_tokenizer):
    saved = {"style": "chat_template", "arguments": {"enable_thinking": False}}
    assert Prompt.choose("plain", saved, make_tokenizer(CHATML)).arguments == {}


@pytest.mark.parametrize(
    ("style", "arguments", "told"),
    [
        ("alpacca", {}, "alpacca.*chatml.*Did you mean 'alpaca'"),
        ("chat_template", {}, "no chat template.*alpaca"),
        ("plain", {"enable_thinking": False}, "plain takes no arguments.*enable_thinking"),
    ],
)
def test_a_choice_that_cannot_be_is_told(make_tokenizer, style, arguments, told):
    with pytest.raises(UsageError, match=told):
        Prompt.choose(style, None, make_tokenizer(), arguments)


def test_arguments_cannot_stand_in_for_the_messages(make_tokenizer):
    with pytest.raises(UsageError, match="messages"):
        Prompt.choose(None, None, make_tokenizer(CHATML), {"messages": []})


def test_nothing_to_learn_and_unknown_roles_are_told(make_tokenizer):
    prompt = Prompt("plain", make_tokenizer())
    with pytest.raises(UsageError, match="no assistant"):
        prompt.segments([user("q")])
    with pytest.raises(UsageError, match="tool"):
        prompt.segments([{"role": "tool", "content": "3"}, assistant("a")])
