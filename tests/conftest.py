"""Settings that must hold before torch or transformers is imported, and the small models that tests share."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine can be far slower than one
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [
    "the movie was good and i loved it",
    "the movie was bad and i hated it",
    "a great film with a wonderful cast",
    "a terrible film with an awful plot",
    "i watched it twice because the story was so good",
    "i left early because the story was so dull",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data for offline runs (`RLHF_TEST_DATA`, default `../shared/data`); skips without it."""
    folder = Path(os.environ.get("RLHF_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set RLHF_TEST_DATA)")
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` caches of a test's folders out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 300 tokens; `<pad>` and `<eos>` are different tokens, padding on the left."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def _save(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2_path(tokenizer, tmp_path_factory) -> str:
    """A random GPT-2 (absolute positions, tied head) of about 0.04 M parameters, saved with its tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(GPT2LMHeadModel(config), tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama_path(tokenizer, tmp_path_factory) -> str:
    """A random Llama (rotary positions, untied head) of about 0.04 M parameters, saved with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen2_path(tokenizer, tmp_path_factory) -> str:
    """A random Qwen2 (rotary positions, biases, tied head) of about 0.04 M parameters, saved with its tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(Qwen2ForCausalLM(config), tokenizer, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory) -> str:
    """A random BERT classifier with labels NEGATIVE and POSITIVE and a WordPiece tokenizer of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    bert_tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(bert_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    return _save(BertForSequenceClassification(config), bert_tokenizer, folder)


@pytest.fixture(scope="session")
def classifier_path(gpt2_path, tokenizer, tmp_path_factory) -> str:
    """A sequence classifier with one label on the trunk of `gpt2_path`, whose tokens it reads."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
