"""The tokenizer of a checkpoint directory: ids, special tokens, streaming and chat templates."""

import json

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from litfreeze.errors import UsageError
from litfreeze.tokenizer import TOKENIZER_FILES, Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there! naïve café 你好 😀"] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>", "__type": "AddedToken"}}


def write_byte_level(path, config=CONFIG, bos=True):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # What a file may have been saved with, and must not do to our texts.
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    return save(path, backend, config)


def write_llama2_like(path, config=CONFIG):
    """A space before the first word, bytes to fall back on: SentencePiece's BPE in a tokenizer.json."""
    letters = sorted({c for text in CORPUS for c in text if c.isascii() and c.isalpha()})
    tokens = [*SPECIAL[:3], *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁t", "▁th", "▁the", "he"]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[:3]])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(path, backend, config)


def write_sentencepiece(path, config=CONFIG):
    corpus = path / "corpus"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 330}), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def save(path, backend, config):
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


WRITERS = {"byte_level": write_byte_level, "llama2_like": write_llama2_like, "sentencepiece": write_sentencepiece}


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.from_dir(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer.from_dir(write_byte_level(tmp_path_factory.mktemp("byte_level")))


def with_template(path, template, **config):
    return Tokenizer.from_dir(write_byte_level(path, {**CONFIG, "chat_template": template, **config}))


# Text and ids

# No U+2581, which is SentencePiece's space and decoded as one, and no special tokens.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=40)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x", text]) == [tokenizer.encode(t) for t in (text, "x", text)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=TEXT, second=TEXT)
def test_a_text_that_continues_gets_no_space_of_its_own(tokenizer, first, second):
    ids = tokenizer.encode(first) + tokenizer.encode(second, continues=True)
    assert tokenizer.decode(ids) == first + second or not first


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer, data, skip):
    """For any ids, even those that are no valid text."""
    bytes_first = st.sampled_from(sorted(tokenizer.byte_ids)) if tokenizer.byte_ids else st.nothing()
    ids = data.draw(
        st.lists(st.one_of(bytes_first, st.integers(0, 4), st.integers(0, tokenizer.vocab_size - 1)), max_size=40)
    )
    stream = tokenizer.stream(skip_special_tokens=skip)
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stream_keeps_the_space_behind_a_skipped_token(tokenizer):
    ids = [*tokenizer.encode("the"), tokenizer.eos_id, *tokenizer.encode(" the", continues=True)]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids) == "the the"


def test_a_stream_gives_no_half_characters_and_does_not_wait_for_the_end(tokenizer):
    ids = tokenizer.encode("hello 你好 there 😀 dog")
    stream = tokenizer.stream()
    pushed = [stream.push(i) for i in ids]
    assert not any("\ufffd" in text for text in pushed)
    assert "".join(pushed).startswith("hello 你好 there 😀")
    assert "".join(pushed[: len(ids) // 2])


def test_special_tokens_are_added_only_on_request_and_known_in_the_text(tokenizer):
    plain = tokenizer.encode("the fox")
    assert tokenizer.adds_bos
    assert tokenizer.encode("the fox", special_tokens=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("the fox</s>") == [*plain, tokenizer.eos_id]
    assert tokenizer.decode([*plain, tokenizer.eos_id]) == "the fox"
    assert tokenizer.decode([*plain, tokenizer.eos_id], skip_special_tokens=False) == "the fox</s>"


def test_added_tokens_of_sentencepiece_models_are_known(tmp_path):
    tokenizer = Tokenizer.from_dir(write_sentencepiece(tmp_path))
    ids = tokenizer.encode("the fox<|im_end|>hello")
    assert 330 in ids
    assert tokenizer.vocab_size == 331
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the fox<|im_end|>hello"


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_that_are_not_special_stay_in_the_text_as_in_transformers(tmp_path, where):
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    config = {**CONFIG, "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "legacy": False}
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<think>": 330, "<|end|>": 331}
    special = {"<unk>", "<s>", "</s>"} | ({"<|end|>"} if where == "tokenizer_config.json" else set())
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    if where == "tokenizer_config.json":
        config["added_tokens_decoder"] = {
            str(i): {"content": text, "special": text in special, **plain} for text, i in added.items()
        }
    write_sentencepiece(tmp_path, config)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": 330, "<|end|>": 331}), encoding="utf-8")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    for text in ("hello <think> the fox", "<s><think>the<|end|> dog</s>", "the<think><think>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        stream = ours.stream()
        said = "".join(map(stream.push, ids)) + stream.finish()
        assert said == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) and "<think>" in said
    assert ours.vocab_size == 332


def test_saved_truncation_and_padding_do_not_act(byte_level):
    assert len(byte_level.encode("fox " * 50)) > 50
    assert len(byte_level.encode("f")) == 1


@pytest.mark.parametrize("bos", [True, False])
def test_equal_to_transformers(tmp_path, bos):
    from transformers import AutoTokenizer

    for writer in (lambda path: write_byte_level(path, bos=bos), write_llama2_like):
        path = writer(tmp_path)
        theirs, ours = AutoTokenizer.from_pretrained(path), Tokenizer.from_dir(path)
        theirs.backend_tokenizer.no_truncation()
        theirs.backend_tokenizer.no_padding()
        for text in ["", "the fox", "  two  spaces\n\n", "<s>hello</s> there", "café 😀", "\n"]:
            for special in (True, False):
                assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


# The files


def test_end_ids_come_from_every_file_in_order(tmp_path):
    write_byte_level(tmp_path, {**CONFIG, "eos_token": "<|im_end|>"})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.eos_ids == (2, 3, 4)
    assert (tokenizer.eos_id, tokenizer.eos_token) == (4, "<|im_end|>")


def test_special_tokens_that_only_the_model_config_names(tmp_path):
    write_byte_level(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", (2,))


def test_special_tokens_map_is_read(tmp_path):
    write_byte_level(tmp_path, {})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


def test_a_tokenizer_without_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_dir(write_byte_level(tmp_path, {}, bos=False))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (None, None, (), False)


def test_no_tokenizer_names_the_folder_and_the_files(tmp_path):
    with pytest.raises(UsageError, match=rf"{tmp_path}.*tokenizer\.json.*tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_an_unreadable_file_is_named(tmp_path, name):
    if name == "tokenizer_config.json":
        write_byte_level(tmp_path)
    (tmp_path / name).write_bytes(b"{nonsense")
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        Tokenizer.from_dir(tmp_path)


def test_an_end_token_that_does_not_exist_is_told(tmp_path):
    write_byte_level(tmp_path, {**CONFIG, "eos_token": "<gone>"})
    with pytest.raises(UsageError, match="<gone>"):
        Tokenizer.from_dir(tmp_path)


def test_the_converter_copies_what_is_read_here():
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"} <= {*TOKENIZER_FILES}


# Chat templates

USER = [{"role": "user", "content": "a < b & 'c' 你"}]


def test_the_template_is_found_in_every_place(tmp_path):
    assert with_template(tmp_path, "one").render_chat(USER) == "one"
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert with_template(tmp_path, listed).render_chat(USER) == "two"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).render_chat(USER) == "three"
    (tmp_path / "chat_template.jinja").write_text("four", encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).render_chat(USER) == "four"


TEMPLATES = {
    "whitespace and special tokens": """
{{ bos_token }}
{%- for m in messages %}
    {% if m.role == 'user' %}
[{{ m['content'] }}]{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}>>{% endif %}""",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}",
    "no tools": "{% if tools is not none %}tools{% endif %}{{ messages[0].content.upper() }}",
    "argument": "{% if thinking is defined and thinking %}<think>{% endif %}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    ours = with_template(tmp_path, TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        for arguments in ({}, {"thinking": True}):
            expected = theirs.apply_chat_template(USER, tokenize=False, add_generation_prompt=prompt, **arguments)
            assert ours.render_chat(USER, add_generation_prompt=prompt, **arguments) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[0].nothing.at_all }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ nothing() }}",
    ],
)
def test_a_template_that_misbehaves_is_one_line_of_usage_error(tmp_path, template):
    with pytest.raises(UsageError, match="chat template failed") as error:
        with_template(tmp_path, template).render_chat(USER)
    assert "\n" not in str(error.value)


def test_a_template_cannot_touch_the_files(tmp_path):
    target = tmp_path / "touched"
    template = (
        "{% set g = cycler.__init__.__globals__ %}"
        f"{{{{ g.os.popen('touch {target}').read() }}}}{{{{ lipsum.__globals__['os'].system('touch {target}') }}}}"
    )
    with pytest.raises(UsageError):
        with_template(tmp_path, template).render_chat(USER)
    assert not target.exists()


def test_the_reason_a_template_gives_is_told(tmp_path):
    tokenizer = with_template(tmp_path, "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(UsageError, match="Roles must alternate"):
        tokenizer.render_chat(USER)


def test_no_template(byte_level):
    with pytest.raises(UsageError, match="no chat template"):
        byte_level.render_chat(USER)
