"""Every recipe YAML, in-process: its models rebuilt small and random in the same architecture, one step or rollout.

Only sizes, paths and the number of steps are changed; LoRA, quantisation, losses and rewards are the YAML's own.
"""

import importlib
import json

import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import fake_vllm
from conftest import SENTENCES
from test_recipes import VARIANTS, YAMLS, name_of, run, script_of

PAIR = ("NEGATIVE", "POSITIVE")
POST = "SUBREDDIT: r/films\n\nTITLE: A film\n\nPOST: {}\n\nTL;DR:"


def tiny_gpt2(tokenizer, cls=GPT2LMHeadModel, layers=2, **more):
    sizes = {"n_positions": 512, "n_embd": 64, "n_layer": layers, "n_head": 2}
    eos = tokenizer.eos_token_id
    return cls(
        GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, **more)
    )


def tiny_qwen2(tokenizer, cls=Qwen2ForCausalLM, **more):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return cls(
        Qwen2Config(vocab_size=len(tokenizer), **sizes, **ends, num_key_value_heads=1, tie_word_embeddings=True, **more)
    )


def tiny_pythia(tokenizer, cls=GPTNeoXForCausalLM, **more):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return cls(GPTNeoXConfig(vocab_size=len(tokenizer), **sizes, **ends, max_position_embeddings=512, **more))


def tiny_encoder(tokenizer, config_class, model_class, labels=PAIR):
    names = labels and {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if config_class is DistilBertConfig:
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    pad = tokenizer.pad_token_id
    return model_class(
        config_class(vocab_size=len(tokenizer), **sizes, max_position_embeddings=520, pad_token_id=pad, **(names or {}))
    )


def tiny_models(gpt2, qwen, bert):
    """The Hub ids and run folders that the YAMLs name, as functions that make the small model, with its tokenizer."""
    lm, preference = (
        (lambda: tiny_gpt2(gpt2), gpt2),
        (lambda: tiny_gpt2(gpt2, GPT2ForSequenceClassification, num_labels=1), gpt2),
    )
    qwen_lm = (lambda: tiny_qwen2(qwen), qwen)
    qwen_reward = (lambda: tiny_qwen2(qwen, Qwen2ForSequenceClassification, num_labels=1), qwen)

    pythia = (lambda: tiny_pythia(qwen), qwen)
    pythia_reward = (lambda: tiny_pythia(qwen, GPTNeoXForSequenceClassification, num_labels=1), qwen)

    def distilbert():
        return tiny_encoder(bert, DistilBertConfig, DistilBertForSequenceClassification)

    def bare(config_class, model_class):  # as pretrained: no head, no labels
        return lambda: tiny_encoder(bert, config_class, model_class, labels=())

    def bert_with(*labels):
        return lambda: tiny_encoder(bert, BertConfig, BertForSequenceClassification, labels)

    return {
        "openai-community/gpt2": lm,
        "openai-community/gpt2-large": lm,
        "lvwerra/gpt2-imdb": lm,
        "distilbert/distilgpt2": (lambda: tiny_gpt2(gpt2, layers=1), gpt2),
        "runs/sentiment_gpt2_sft": lm,
        "runs/sentiment_gpt2_sft_large": lm,
        "runs/tiny/sft": lm,
        "runs/scratch/sft": lm,
        "runs/scratch/length_sft": lm,
        "runs/tiny/reward": preference,
        "runs/scratch/reward": preference,
        "runs/sentiment_gpt2_reward_hh": preference,
        "runs/sentiment_gpt2_reward_negative": preference,
        "distilbert/distilbert-base-cased": (bare(DistilBertConfig, DistilBertModel), bert),
        "lvwerra/distilbert-imdb": (distilbert, bert),
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (distilbert, bert),
        "google-bert/bert-base-uncased": (bare(BertConfig, BertModel), bert),
        "lvwerra/bert-imdb": (bert_with("LABEL_0", "LABEL_1"), bert),
        "siebert/sentiment-roberta-large-english": (
            lambda: tiny_encoder(bert, RobertaConfig, RobertaForSequenceClassification),
            bert,
        ),
        "microsoft/deberta-v3-base": (bare(DebertaV2Config, DebertaV2Model), bert),
        "Qwen/Qwen2.5-0.5B": qwen_lm,
        "Qwen/Qwen2.5-1.5B": qwen_lm,
        "runs/scratch/qwen_pretrain": qwen_lm,
        "runs/scratch/qwen_sft": qwen_lm,
        "runs/qwen_summarize_sft/merged": qwen_lm,
        "runs/qwen_summarize_sft_qlora/merged": qwen_lm,
        "runs/scratch/qwen_reward": qwen_reward,
        "runs/qwen_summarize_reward": qwen_reward,
        "runs/qwen_summarize_reward_qlora": qwen_reward,
        "EleutherAI/pythia-1b-deduped": pythia,
        "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": pythia,
        "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr": pythia_reward,
        "runs/qwen_summarize_sft_pythia": pythia,
        "runs/qwen_summarize_reward_pythia": pythia_reward,
    }


class Models:
    """The folder of the small model that stands for a Hub id or run folder, made when it is first asked for."""

    def __init__(self, tokenizers, new_folder):
        self.makers, self.new_folder, self.made = tiny_models(*tokenizers), new_folder, {}

    def __call__(self, name):
        if name not in self.made:
            torch.manual_seed(0)
            make, tokenizer = self.makers[name]
            self.made[name] = self.new_folder(name.replace("/", "_"))
            make().save_pretrained(self.made[name])
            tokenizer.save_pretrained(self.made[name])
        return str(self.made[name])


@pytest.fixture(scope="module")
def small_models(tokenizer, bert_path, tmp_path_factory):
    return Models((tokenizer, tokenizer, AutoTokenizer.from_pretrained(bert_path)), tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def real_models(small_models, request, tmp_path_factory):
    """With the real tokenizers, where they are."""
    try:
        folder = request.getfixturevalue("shared_data") / "tokenizers"
    except pytest.skip.Exception:
        return small_models
    names = ("gpt2", "qwen2.5", "bert-base-uncased")
    return Models([AutoTokenizer.from_pretrained(folder / name) for name in names], tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small datasets in the schemas that the YAMLs name, as a function from a dataset's name to its folder."""
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(SENTENCES[i % 6] for i in range(n, n + 40)) for n in range(32)]
    rows = {
        "labelled": [{"text": text, "label": i % 2} for i, text in enumerate(texts)],
        "sft": [{"text": text} for text in texts],
        "pairs": [{"chosen": SENTENCES[i % 6], "rejected": SENTENCES[(i + 1) % 6]} for i in range(32)],
        "prompts": [{"prompt": text[:40], "reference": SENTENCES[0]} for text in texts],
        "posts": [
            {"prompt": POST.format(text[:80]), "completion": " " + SENTENCES[i % 6]} for i, text in enumerate(texts)
        ],
    }
    rows["prompted_pairs"] = [
        {"prompt": POST.format("a film")} | {k: " " + v for k, v in r.items()} for r in rows["pairs"]
    ]
    for kind, content in rows.items():
        (folder / kind).mkdir()
        for split in ("train", "test", "validation"):
            (folder / kind / f"{split}.jsonl").write_text("\n".join(map(json.dumps, content)))

    def folder_of(name):
        kinds = {"stanfordnlp/imdb": "labelled", "trl-lib/tldr": "posts", "data/reddit_titles/sft": "posts"}
        kinds["data/reddit_titles/pretrain"] = "sft"
        prompted = {f"data/{source}/pairs" for source in ("hh", "synthetic_instruct", "reddit_titles")}
        prompted.add("data/summarize_from_feedback/pairs")
        kind = "prompted_pairs" if name in prompted else kinds.get(name, name.rpartition("/")[2])
        return str(folder / {"snippets": "pairs"}.get(kind, kind))

    return folder_of


def overrides(values, stage, models, data):
    """The YAML's paths, sizes and number of steps made small."""
    small = {
        "dataset_name": data(values["dataset_name"]),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": min(2, values.get("gradient_accumulation_steps", 1)),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if values["model_name_or_path"]:
        small["model_name_or_path"] = models(values["model_name_or_path"])
    if stage == "ppo":
        if "reward_model" in values["rewards"]:
            small["reward_model"] = models(values["reward_model"])
        if values.get("value_model_path"):
            small["value_model_path"] = models(values["value_model_path"])
        small |= {
            "total_episodes": 4 * small["gradient_accumulation_steps"] * values.get("num_mini_batches", 1),
            "max_completion_length": 6,
            "logging_steps": 1,
        }
        small |= {"test_prompts": 4} if values.get("eval_strategy") else {}
    else:
        small |= {"max_steps": 1, "max_length": min(values["max_length"], 128)}
        small |= {"test_rows": 4} if stage == "sft" else {"test_pairs": 8}
    if values.get("pad_token"):
        small["pad_token"] = "<pad>"  # the test tokenizer's
    if values.get("scratch_layers"):
        small |= {"scratch_layers": 1, "scratch_width": 32, "scratch_heads": 2}
    return small


@pytest.mark.parametrize("config", YAMLS, ids=name_of)
def test_a_step_of_every_yaml(config, real_models, small_models, data, tmp_path, monkeypatch):
    script = script_of(config)
    models = small_models if config in VARIANTS else real_models  # a variant differs in other things
    stage = script.stem.rpartition("_")[2]
    values = yaml.safe_load(config.read_text())
    values |= overrides(values, stage, models, data) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    engines = fake_vllm.install(monkeypatch) if values.get("use_vllm") else []
    trainer = run(script.stem, "--config", str(tmp_path / "small.yaml"))

    steps = values["num_iterations"] * values.get("num_mini_batches", 1) if stage == "ppo" else 1
    assert trainer.state.global_step == steps
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if values.get("use_peft"):
        assert all("lora_" in name or "critic." in name or "score" in name for name in trained)
    if values.get("load_in_4bit"):
        assert "Linear4bit" in {type(module).__name__ for module in trainer.model.modules()}
    if values.get("use_vllm"):
        assert len(engines[0].params) == values["total_episodes"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    weights = "adapter_model.safetensors" if values.get("use_peft") else "model.safetensors"
    report = {"reward_report.json", "reward_report.svg"}
    expected = {"sft": set(), "reward": report, "classifier": report, "ppo": {"critic.safetensors"}}
    assert {weights, "tokenizer_config.json"} | expected[stage] <= written
    if values.get("merge_adapter"):
        assert (tmp_path / "out" / "merged" / "model.safetensors").exists()
    assert importlib.import_module(script.stem).main.__annotations__  # the wiring that `parse` reads
