"""config.json: published ones are read, both spellings mean the same, and what we do not honour is refused."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from families import FAMILIES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.fields import HARMLESS, RoPE
from litfreeze.json_file import read_json
from litfreeze.model import meta_parameters
from litfreeze.presets import PRESETS

any_family = st.sampled_from(list(FAMILIES.values())).flatmap(lambda fields: fields)

# --- published models: config.json as it stands on the hub, and the number of parameters they are known to have -------

GPT2 = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
  "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
  "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
PYTHIA_70M = """{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
  "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
  "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
  "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "torch_dtype": "float16",
  "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true, "vocab_size": 50304}"""
LLAMA_2_7B = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
  "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""
LLAMA_32_1B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
  "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
  "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}"""
TINYLLAMA = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
  "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
  "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true,
  "vocab_size": 32000}"""
SMOLLM2_135M = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
  "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
QWEN25_05B = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
  "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
  "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
  "vocab_size": 151936}"""
QWEN3_06B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
  "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
  "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 151936}"""

PUBLISHED = [
    (GPT2, 124_439_808),
    (PYTHIA_70M, 70_426_624),
    (LLAMA_2_7B, 6_738_415_616),
    (LLAMA_32_1B, 1_235_814_400),
    (TINYLLAMA, 1_100_048_384),
    (SMOLLM2_135M, 134_515_008),
    (MISTRAL_7B, 7_241_732_096),
    (QWEN25_05B, 494_032_768),
    (QWEN3_06B, 596_049_920),
]


@pytest.mark.parametrize(("text", "parameters"), PUBLISHED)
def test_published_configs_are_read_and_have_the_published_size(text, parameters):
    config = Config.from_hf(json.loads(text))
    assert sum(p.numel() for p in meta_parameters(config).values()) == parameters


@pytest.mark.parametrize(("preset", "text"), [("smollm2-135m", SMOLLM2_135M), ("llama-3.2-1b", LLAMA_32_1B)])
def test_presets_have_the_shape_they_are_named_after(preset, text):
    assert replace(Config.from_hf(json.loads(text)), initializer_range=0.02) == Config.from_hf(PRESETS[preset])


def test_every_preset_is_a_config():
    for fields in PRESETS.values():
        assert Config.from_hf(fields).rope is not None


# --- fields ----------------------------------------------------------------------------------------------------------


def as_transformers_writes(fields):
    model_type = fields["model_type"]
    fields = deepcopy({key: value for key, value in fields.items() if key != "model_type"})
    config = AutoConfig.for_model(model_type, **fields)
    return json.loads(config.to_json_string(use_diff=False))


@settings(max_examples=300)
@given(fields=any_family, data=st.data())
def test_a_config_means_what_transformers_takes_it_for_defaults_included(fields, data):
    """What is left out of config.json has transformers' default or is refused; never another default."""
    # A left-out number of key/value heads is a fixed number in some families: the tensors' shapes tell it
    optional = [key for key in fields if key not in ("model_type", "num_key_value_heads")]
    for key in data.draw(st.sets(st.sampled_from(optional), max_size=3)):
        del fields[key]
    try:
        config = Config.from_hf(fields)
    except UsageError as error:
        # or transformers' default does not go with what is left
        assert any(told in str(error) for told in ("is missing", "of 2 experts", "of 5 experts", "short_factor must"))
    else:
        assert config == Config.from_hf(as_transformers_writes(fields))


def test_a_window_that_is_switched_on_without_a_size_has_transformers_size():
    fields = {**json.loads(QWEN25_05B), "use_sliding_window": True, "max_window_layers": 20}
    del fields["sliding_window"]
    assert Config.from_hf(fields).windows == (None,) * 20 + (4096,) * 4


LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@given(
    fields=any_family,
    name=st.text(min_size=1, max_size=12),
    value=st.sampled_from([True, 1, -0.5, "on", [0], {"a": 0}]),
)
def test_an_unknown_field_that_is_switched_on_is_refused_and_named(fields, name, value):
    assume(name not in HARMLESS and name not in fields)
    with pytest.raises(UsageError) as refusal:
        Config.from_hf({**fields, name: value}, "some/config.json")
    assert f"some/config.json: litfreeze does not honour {name}=" in str(refusal.value)


@given(
    fields=any_family, name=st.text(min_size=1, max_size=12), value=st.sampled_from([None, False, 0, 0.0, "", [], {}])
)
def test_an_unknown_field_that_is_switched_off_is_nothing(fields, name, value):
    assume(name not in fields)
    unknown = f"unknown_{name}"
    assert Config.from_hf({**fields, unknown: value}) == Config.from_hf(fields)


def test_what_does_not_change_the_mathematics_is_passed_over():
    for name in HARMLESS:
        assert Config.from_hf({**LLAMA, name: "anything"}) == Config.from_hf(LLAMA)


YARN = {"rope_type": "yarn", "factor": 4.0}

REFUSED = [
    ({"model_type": None}, "model_type None is not supported"),
    ({"model_type": "lama"}, "Did you mean 'llama'?"),
    (
        {"model_type": "mamba"},
        "Supported: gemma2, gemma3, gemma3_text, gpt2, gpt_neox, llama, mistral, mixtral, olmo2, phi3, qwen2,",
    ),
    ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is neither a causal"),
    ({"hidden_act": "gelu_10"}, "hidden_act 'gelu_10' is not supported. Supported: silu,"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a positive whole number"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": "96"}, "vocab_size is '96'"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
    ({"num_key_value_heads": 3}, "4 attention heads cannot be shared by 3"),
    ({"head_dim": 5}, "an even number of dimensions, not 5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported in a llama model"),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported. Supported: default,",
    ),
    ({"rope_scaling": {"type": "linear"}}, "factor is 0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "does not honour: beta_fast"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "does not honour: full_attention"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": "8"}}, "original_max_position_embeddings is '8'"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "does not honour quantization_config="),
    ({"sliding_window": 16}, "does not honour sliding_window=16"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive whole number or null"),
    ({"model_type": "mistral", "attention_bias": True}, "does not honour attention_bias=true"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "for each of 2 layers; it has 1"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked"]}, "layer_types must name sliding_attention"),
]
REFUSED_GPT2 = [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported, only False"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
    ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
    ({"n_head": 7}, "a width of 768 is not a multiple of 7 heads"),
]


@pytest.mark.parametrize(
    ("fields", "told"),
    [({**LLAMA, **change}, told) for change, told in REFUSED]
    + [({**json.loads(GPT2), **change}, told) for change, told in REFUSED_GPT2]
    + [({**json.loads(PYTHIA_70M), "num_attention_heads": 7}, "a width of 512 is not a multiple of 7 heads")],
)
def test_what_we_do_not_honour_is_refused_in_one_line(fields, told):
    with pytest.raises(UsageError) as refusal:
        Config.from_hf(fields, "some/config.json")
    message = str(refusal.value)
    assert message.startswith("some/config.json: ")
    assert told in message
    assert "\n" not in message


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5000) | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "mscale"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(fields=any_family, key=st.integers(0, 30), within=st.booleans(), value=JUNK)
def test_whatever_a_field_holds_the_config_is_read_or_refused(fields, key, within, value):
    keys = [*fields, "architectures", "rope_scaling", "layer_types", "max_window_layers", "scale_attn_weights"]
    name = keys[key % len(keys)]
    if within and isinstance(fields.get(name), dict):
        inner = list(fields[name])[key % len(fields[name])]
        fields[name][inner] = value
    else:
        fields[name] = value
    try:
        Config.from_hf(fields)
    except UsageError as error:
        assert "\n" not in str(error)


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn"},
    }
    assert Config.from_hf({**LLAMA, **both}).rope == RoPE(8, 10000.0, "linear", 2.0)
    assert Config.from_hf({**LLAMA, **both}) == Config.from_hf(as_transformers_writes({**LLAMA, **both}))


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        (b"", "cannot be read as JSON"),
        (b'{"model_type": "llama"', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "must hold a JSON object, not a list"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, told):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_json(path)
    assert str(path) in str(refusal.value)
    assert told in str(refusal.value)
