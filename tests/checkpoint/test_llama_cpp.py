"""What `to_gguf` writes, run by the real llama.cpp: the same tokens for a text, and the same model."""

import json
import random
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest
import sentencepiece
import torch
from families import random_tokens, saved_model, write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from litfreeze.checkpoint.convert.gguf_tokenizer import LLAMA3, QWEN2
from litfreeze.checkpoint.directory import load_model, open_checkpoint
from litfreeze.demo import MODEL_DIR
from litfreeze.scripts.convert import from_gguf, to_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")


class LlamaCpp:
    """llama.cpp's own server over one file, in this process, in float32 throughout."""

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.port = str(path), 256, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        self.server = xllamacpp.Server(params)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def encode(self, text, special_tokens=False):
        return self.ask("/tokenize", content=text, add_special=special_tokens, parse_special=True)["tokens"]

    def greedy(self, prompt, n):
        answer = self.ask("/completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True)
        return answer["tokens"]

    def log_probabilities(self, prompt, vocab_size):
        """Those of every token after `prompt`: (vocab_size,)."""
        answer = self.ask("/completion", prompt=prompt, n_predict=1, n_probs=vocab_size, ignore_eos=True)
        found = torch.full((vocab_size,), float("nan"))
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@torch.no_grad()
def our_log_probabilities(model, prompt):
    tokens = torch.tensor([prompt])
    return torch.log_softmax(model(tokens)[0, -1].float(), -1)


def our_greedy(model, prompt, n, ends):
    found = []
    while len(found) < n and not (found and found[-1] in ends):
        found.append(int(our_log_probabilities(model, prompt + found).argmax()))
    return found


# --- the same model ---------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1539,  # three more than the demo's tokenizer has
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GPT2 = {"model_type": "gpt2", "vocab_size": 1539, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
NEOX |= {"model_type": "gpt_neox", "tie_word_embeddings": False}
MODELS = {
    "llama": LLAMA,
    "llama, own head, eps": LLAMA | {"tie_word_embeddings": False, "rms_norm_eps": 1e-2, "rope_theta": 500.0},
    "llama, wide heads": LLAMA | {"head_dim": 16},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama 3": LLAMA | {"rope_theta": 500.0, "rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}},
    "llama, linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 3.5}},
    "llama, yarn": LLAMA | {"rope_theta": 100.0, "rope_scaling": YARN},
    "llama, yarn, temperature": LLAMA | {"rope_theta": 100.0, "rope_scaling": {**YARN, "attention_factor": 0.8}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "mistral, window": LLAMA | {"model_type": "mistral", "sliding_window": 48},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2, own head, yarn": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False, "rope_scaling": YARN},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2": GPT2,
    "gpt2, own head": GPT2 | {"tie_word_embeddings": False, "n_inner": 40},
    "gpt_neox": NEOX,
    "gpt_neox, sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 0.5},
}
# llama.cpp looks GELU up in a table of float16, and GPT-NeoX's is approximated besides
WITHIN = {"gpt2": 5e-3, "gpt_neox": 5e-3}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    with saved_model(MODELS[name]) as (saved, _):
        shutil.copytree(saved, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / file, tmp_path / "model" / file)
    checkpoint = open_checkpoint(tmp_path / "model")
    model = load_model(checkpoint, lambda _: torch.float32)
    theirs = LlamaCpp(to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32"))
    within = WITHIN.get(MODELS[name]["model_type"], 1e-3)
    for seed, length in enumerate((1, 2, 36)):
        prompt = random_tokens(1536, 1, length, seed)[0].tolist()
        ours, found = our_log_probabilities(model, prompt), theirs.log_probabilities(prompt, 1539)
        torch.testing.assert_close(found, ours, atol=within, rtol=0)
    if within == 1e-3:
        assert theirs.greedy(prompt, 12)[:12] == our_greedy(model, prompt, 12, checkpoint.tokenizer().eos_ids)
