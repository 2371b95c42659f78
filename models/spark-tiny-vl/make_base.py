"""Makes all of bf16/ but the weights: the configuration, and a tokenizer trained on the suite's own text.

python models/spark-tiny-vl/make_base.py --generator target/release/examples/training_data
"""
import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
BASE = HERE / "bf16"
VOCABULARY = 2048
SAMPLES = 60_000
# A merge must be this frequent: rare words stay in pieces, which lets the model read and spell words it was never taught.
MIN_FREQUENCY = 150
# As in Qwen: a digit is always a token of its own.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
PLAIN = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>""".split()


def write(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def byte_level(vocab=None, merges=()):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)) if vocab else models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_folder(folder, tokenizer):
    """Tokenizer, template and processor settings; returns the id of each added token."""
    tokenizer.add_tokens([AddedToken(t, special=t in SPECIAL, normalized=False) for t in SPECIAL + PLAIN])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL + PLAIN}
    write(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 4096,
        "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False,
        "additional_special_tokens": SPECIAL[1:],
        "added_tokens_decoder": {
            str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": t in SPECIAL} for t, i in ids.items()},
    })
    shutil.copy(HERE / "chat_template.jinja", folder / "chat_template.jinja")
    processor = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": 128 * 128, "longest_edge": 512 * 512},
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
    }
    write(folder / "preprocessor_config.json", processor)
    write(folder / "video_preprocessor_config.json", processor | {"video_processor_type": "Qwen3VLVideoProcessor"})
    return ids


def config(ids, vocab_size):
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "dtype": "bfloat16",
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16", "hidden_size": 128, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512,
            "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True,
            "decoder_sparse_step": 3, "mlp_only_layers": [], "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096, "use_cache": True,
            "rope_theta": 10000.0, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]},
            "vocab_size": vocab_size, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "initializer_range": 0.02,
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe", "depth": 7, "hidden_size": 128, "num_heads": 4, "intermediate_size": 512,
            "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "out_hidden_size": 128, "num_position_embeddings": 576,
            "deepstack_visual_indexes": [2, 4], "initializer_range": 0.02,
        },
    }


def corpus(generator, folder):
    command = [generator, "--model", str(folder), "--text", str(SAMPLES)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    return [json.loads(line) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", required=True, help="the built example training_data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Bytes and added tokens alone, so that the template can be rendered.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        write_folder(Path(folder), byte_level({c: i for i, c in enumerate(alphabet)}))
        texts = corpus(args.generator, folder)
    for token in SPECIAL + PLAIN:
        texts = [piece for text in texts for piece in text.split(token)]
    tokenizer = byte_level()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL + PLAIN), min_frequency=MIN_FREQUENCY, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ids = write_folder(BASE, tokenizer)
    used = tokenizer.get_vocab_size()
    # A multiple of 64 divides over four ranks and fills the kernels' tiles; the rows above are never used.
    vocab_size = -(-used // 64) * 64
    write(BASE / "config.json", config(ids, vocab_size))
    write(BASE / "generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"], "do_sample": False})
    print(f"{len(texts)} texts, {used} tokens, vocabulary {vocab_size}")


if __name__ == "__main__":
    main()
