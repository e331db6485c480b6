"""The models that the recipes' YAMLs name, with random weights of the real sizes, and data; without the Hub."""

import json
import random
import string

from throughput_jobs import JOBS, QWEN25_05B, QWEN25_15B

PAIR = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
DEBERTA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
DEBERTA |= {"relative_attention": True, "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
QWEN2 = {"tie_word_embeddings": True, "max_position_embeddings": 32768}
QWEN05, QWEN15, REWARD = QWEN25_05B | QWEN2, QWEN25_15B | QWEN2, {"num_labels": 1}
QWEN7 = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN7 |= {"num_key_value_heads": 4, "tie_word_embeddings": False, "max_position_embeddings": 32768}
LM, CLASSIFIER, TRUNK = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"
# The models that the YAMLs name: type of configuration, sizes, vocabulary, class. BERT's defaults are the real sizes.
MODELS = {
    "openai-community/gpt2": ("gpt2", JOBS["gpt2"].size, 50257, LM),
    "lvwerra/gpt2-imdb": ("gpt2", JOBS["gpt2"].size, 50257, LM),
    "openai-community/gpt2-large": ("gpt2", JOBS["gpt2_large_lora"].size, 50257, LM),
    "lvwerra/distilbert-imdb": ("distilbert", PAIR, 28996, CLASSIFIER),
    "distilbert/distilbert-base-cased": ("distilbert", {}, 28996, TRUNK),
    "google-bert/bert-base-uncased": ("bert", {}, 30522, TRUNK),
    "microsoft/deberta-v3-base": ("deberta-v2", DEBERTA, 128100, TRUNK),
    "Qwen/Qwen2.5-0.5B": ("qwen2", QWEN05, 151936, LM),
    "Qwen/Qwen2.5-1.5B": ("qwen2", QWEN15, 151936, LM),
    "Qwen/Qwen2.5-7B": ("qwen2", QWEN7, 152064, LM),
    "runs/qwen_summarize_sft/merged": ("qwen2", QWEN05, 151936, LM),
    "runs/qwen_summarize_sft_qlora/merged": ("qwen2", QWEN15, 151936, LM),
    "runs/qwen_summarize_reward": ("qwen2", QWEN05 | REWARD, 151936, CLASSIFIER),
    "runs/qwen_summarize_reward_qlora": ("qwen2", QWEN15 | REWARD, 151936, CLASSIFIER),
}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"intermediate_size": 64, "vocab_size": 6000}


def configuration(name, **sizes):
    """The configuration of a model of `MODELS`, with other sizes if given, and the name of its class."""
    from transformers import AutoConfig  # here and below: seconds long, and what starts processes has to stay small

    kind, own, vocab_size, model_class = MODELS[name]
    tokens = {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return AutoConfig.for_model(kind, **own | tokens | sizes), model_class


def build(name, folder, smoke):
    """The folder of a model of `MODELS` with random weights, made if it is not there."""
    import torch
    import transformers

    path = folder / "models" / name.replace("/", "_")
    if not (path / "tokenizer.json").exists():
        config, model_class = configuration(name, **(TINY if smoke else {}))
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = getattr(transformers, model_class).from_config(config)
        model.to(torch.bfloat16 if config.model_type == "qwen2" else torch.float32).save_pretrained(path)
        byte_level_tokenizer(config.vocab_size).save_pretrained(path)  # last: says that the rest is there
    return str(path)


def byte_level_tokenizer(size):
    """A byte-level BPE of `size` tokens, most of two or three letters: what a random model says reads back as text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [(a, b) for a in letters for b in letters]
    merges = (merges + [(a + b, c) for a, b in merges for c in letters])[: size - len(words)]
    words += [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def write_data(folder, stem, tokens):
    """The folder of random texts in the columns that a recipe reads, the longest of 0.6 to 0.95 × `tokens` tokens."""
    rng = random.Random(0)

    def text(share):  # two letters make about a token
        return "".join(rng.choices(string.ascii_letters, k=int(2 * share * tokens * rng.uniform(0.6, 0.95))))

    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 1024), ("test", 64), ("validation", 64)):
        if stem.startswith("sentiment"):
            rows = [{"text": text(1).ljust(200), "label": i % 2} for i in range(count)]
        elif stem.endswith("_reward"):
            rows = [{"prompt": text(0.8), "chosen": text(0.2), "rejected": text(0.2)} for _ in range(count)]
        else:
            rows = [{"prompt": text(1), "completion": text(0.05)} for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)
