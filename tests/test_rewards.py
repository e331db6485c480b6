"""Reward functions: what the classifier reads, that batching changes nothing, and what `checked` lets through."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GenerationConfig,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from conftest import SENTENCES
from rewards import ensemble, length_penalty, preference, reference_sampler, rouge1, word_count
from trl_ppo import PPOConfig, RewardModel
from trl_ppo.critic import ValueModel
from trl_ppo.inputs import ScoreError, reward_failures
from trl_ppo.reward_model import encode, with_finite_scores

PROMPTS = ["the movie", "", "a great", "i watched it twice because the story was so"]
COMPLETIONS = [" was good and i loved it", "a terrible film", " film", " dull that i left early"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}|{% endfor %}"


def save_classifier(source: str, folder: Path, num_labels=1, template=None, pad_is_eos=False) -> str:
    """The trunk at `source` under a new head, dropout left on in its config, saved with its tokenizer."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=num_labels, ignore_mismatched_sizes=True
    )
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)  # scores far enough apart that a mistake shows
    if pad_is_eos:  # as GPT-2 comes
        kept = {"tokenizer_object": tokenizer.backend_tokenizer, "eos_token": tokenizer.eos_token}
        tokenizer = PreTrainedTokenizerFast(**kept)
        model.config.pad_token_id = None
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2_reward(gpt2_path, tmp_path_factory):
    return save_classifier(gpt2_path, tmp_path_factory.mktemp("gpt2_reward"), pad_is_eos=True)


@pytest.fixture(scope="module")
def llama_reward(llama_path, tmp_path_factory):
    return save_classifier(llama_path, tmp_path_factory.mktemp("llama_reward"))


@pytest.fixture(scope="module")
def bert_reward(bert_path, tmp_path_factory):
    return save_classifier(bert_path, tmp_path_factory.mktemp("bert_reward"))


@pytest.fixture(scope="module")
def two_labels(bert_path, tmp_path_factory):
    return save_classifier(bert_path, tmp_path_factory.mktemp("two_labels"), num_labels=2)


@pytest.fixture(params=["gpt2", "llama", "bert"])
def reward_path(request):
    return request.getfixturevalue(f"{request.param}_reward")


def chat(prompt: str, completion: str) -> tuple[list, list]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]


# --- Classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 64])
def test_scores_in_a_batch_are_those_one_by_one_in_the_given_order(reward_path, batch_size):
    reward = RewardModel(reward_path, device="cpu", batch_size=batch_size)
    together = reward(PROMPTS, COMPLETIONS)
    alone = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 2) for score in together}) == len(PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_is_read_at_the_last_token_before_the_padding(family, request):
    path = request.getfixturevalue(f"{family}_reward")
    reward = RewardModel(path, device="cpu", add_eos=False)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([reward.tokenizer(prompt + completion)["input_ids"]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state
            expected.append(model.score(hidden)[0, -1, 0].item())
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_tokens_are_those_that_trls_reward_trainer_trains_on(family, request, tmp_path):
    from datasets import Dataset

    path = request.getfixturevalue(f"{family}_reward")
    reward = RewardModel(path, device="cpu", max_length=64)
    text = PROMPTS[0] + COMPLETIONS[0]
    if family == "bert":  # has no end token, and RewardTrainer cannot do without
        tokenizer = AutoTokenizer.from_pretrained(path)
        words = tokenizer.convert_ids_to_tokens(reward.token_ids([text])[0])
        assert words == ["[CLS]", *text.split(), "[SEP]"]
        return
    pair = {"prompt": [PROMPTS[0]], "chosen": [COMPLETIONS[0]], "rejected": [" was bad"]}
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = RewardTrainer(model=path, args=args, train_dataset=Dataset.from_dict(pair))
    assert reward.token_ids([text])[0] == trainer.train_dataset[0]["chosen_ids"]
    assert reward.token_ids([text])[0][-1] == reward.tokenizer.eos_token_id


def test_text_that_ends_in_the_end_token_gets_no_second_one(llama_reward):
    reward = RewardModel(llama_reward, device="cpu")
    assert reward.token_ids(["a film" + reward.tokenizer.eos_token]) == reward.token_ids(["a film"])


def test_add_eos_false_leaves_the_end_token_out(llama_reward):
    (with_eos,) = RewardModel(llama_reward, device="cpu").token_ids(["a film"])
    (without,) = RewardModel(llama_reward, device="cpu", add_eos=False).token_ids(["a film"])
    assert with_eos == [*without, with_eos[-1]]


@pytest.mark.parametrize(("family", "special_at"), [("llama", {-1}), ("bert", {0, -1})])
def test_a_long_text_keeps_its_end_and_its_special_tokens(family, special_at, request):
    path = request.getfixturevalue(f"{family}_reward")
    text = " ".join(SENTENCES)
    whole = RewardModel(path, device="cpu", max_length=64).tokenizer(text)["input_ids"]
    reward = RewardModel(path, device="cpu", max_length=12)
    ids = reward.token_ids([text])[0]
    special = set(reward.tokenizer.all_special_ids)
    content = [token for token in ids if token not in special]
    assert len(ids) == 12
    assert {i for i in (0, -1) if ids[i] in special} == special_at
    assert content == [token for token in whole if token not in special][-len(content) :]


def test_texts_beyond_the_models_positions_are_cut_not_a_crash(reward_path):
    reward = RewardModel(reward_path, device="cpu", max_length=512)  # the models have 64 positions
    assert math.isfinite(reward([" ".join(SENTENCES * 4)], [" good"])[0])


def test_the_named_label_is_the_score_by_name_or_index(two_labels):
    positive, negative = (RewardModel(two_labels, label=name, device="cpu") for name in ("POSITIVE", "NEGATIVE"))
    by_index = RewardModel(two_labels, label=1, device="cpu")
    with torch.no_grad():
        inputs = positive.tokenizer("the movie was good", return_tensors="pt")
        logits = BertForSequenceClassification.from_pretrained(two_labels).eval()(**inputs).logits[0]
    for reward, logit in ((negative, logits[0]), (positive, logits[1]), (by_index, logits[1])):
        assert reward(["the movie"], [" was good"]) == pytest.approx([logit.item()], abs=1e-5)
    assert logits[0].item() != pytest.approx(logits[1].item(), abs=1e-3)


@pytest.mark.parametrize("label", [None, "HAPPY", 2, True])
def test_a_missing_or_unknown_label_is_an_error_that_lists_those_there_are(bert_path, label):
    with pytest.raises(ValueError, match="0: NEGATIVE, 1: POSITIVE"):
        RewardModel(bert_path, label=label, device="cpu")


def test_a_local_path_that_does_not_exist_is_named_in_one_line(tmp_path):
    for path in ("runs/no_such_model", "./nothing", str(tmp_path / "gone"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist: train it first or give a Hub id") as error:
            RewardModel(path)
        assert repr(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_language_model_without_a_trained_head_is_refused(gpt2_path):
    with pytest.raises(ValueError, match=r"not a trained classifier: it has no score\.weight"):
        RewardModel(gpt2_path, device="cpu")


def test_a_heads_bias_is_kept_for_scores_and_for_a_critic_though_transformers_has_none(tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = RewardModel(tmp_path).score(SENTENCES)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.bias": torch.tensor([2.5])}, tmp_path / "model.safetensors", {"format": "pt"})
    assert RewardModel(tmp_path).score(SENTENCES) == pytest.approx([score + 2.5 for score in before], abs=1e-5)
    assert ValueModel(tmp_path, len(tokenizer)).head.bias.item() == 2.5


def test_scoring_uses_no_dropout_and_changes_no_weight(gpt2_reward):
    reward = RewardModel(gpt2_reward, device="cpu")
    assert reward.model.config.resid_pdrop > 0
    before = {name: weight.clone() for name, weight in reward.model.state_dict().items()}
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)
    assert all(torch.equal(before[name], weight) for name, weight in reward.model.state_dict().items())
    assert not any(weight.requires_grad for weight in reward.model.parameters())


def test_no_completions_give_no_scores(llama_reward):
    reward = RewardModel(llama_reward, device="cpu")
    assert reward([], []) == []
    assert len(reward([""], [""])) == 1  # and an empty text has a score


def test_columns_of_the_dataset_are_accepted_and_change_nothing(llama_reward):
    reward = RewardModel(llama_reward, device="cpu")
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, topic=[1, 2, 3, 4]) == reward(PROMPTS, COMPLETIONS)


def test_trl_logs_it_by_folder_and_label(bert_path, llama_reward):
    assert get_callable_name(RewardModel(llama_reward, device="cpu")) == Path(llama_reward).name
    assert get_callable_name(RewardModel(bert_path, label=1, device="cpu")) == f"{Path(bert_path).name}_POSITIVE"


def test_messages_are_rendered_with_the_reward_models_own_chat_template(llama_path, tmp_path):
    reward = RewardModel(save_classifier(llama_path, tmp_path, template=TEMPLATE), device="cpu")
    prompt, completion = chat("the movie", "good")
    rendered = "user: the movie|assistant: good|"
    assert (
        reward.tokenizer.decode(reward.token_ids([prompt + completion])[0]) == rendered
    )  # no end token: as TRL trains
    plain = RewardModel(str(tmp_path), device="cpu", add_eos=False)
    assert reward([prompt], [completion]) == pytest.approx(plain.score([rendered]), abs=1e-5)


def test_messages_without_a_template_are_joined_by_newlines(llama_reward):
    reward = RewardModel(llama_reward, device="cpu")
    prompt, completion = chat("the movie", "good")
    assert reward([prompt], [completion]) == pytest.approx(reward.score(["the movie\ngood"]), abs=1e-5)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_scores_as_the_model_it_was_saved_from(llama_path, tmp_path, with_tokenizer):
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(llama_path)
    base = AutoModelForSequenceClassification.from_pretrained(llama_path, num_labels=1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path)
    if with_tokenizer:
        tokenizer.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), device="cpu")
    ids = torch.tensor([[*tokenizer("a good film")["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 0].item()
    assert reward.score(["a good film"]) == pytest.approx([expected], abs=1e-5)


def test_an_adapter_without_a_head_on_a_language_model_is_refused(llama_path, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_path)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a trained classifier"):
        RewardModel(str(tmp_path), device="cpu")


def test_an_encoder_that_has_an_end_token_and_closes_its_texts_itself_gets_none(bert_reward):
    plain = AutoTokenizer.from_pretrained(bert_reward)
    with_eos = AutoTokenizer.from_pretrained(bert_reward, eos_token="[UNK]")
    assert encode(with_eos, ["a film"]) == encode(plain, ["a film"])


def test_a_chat_template_that_writes_special_tokens_gets_no_others(bert_reward):
    tokenizer = AutoTokenizer.from_pretrained(bert_reward)
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"
    prompt, completion = chat("the movie", "good")
    (ids,) = encode(tokenizer, [prompt + completion])
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "movie", "[SEP]", "good", "[SEP]"]


def test_training_data_encoded_in_advance_is_what_the_reward_model_reads(reward_path):
    texts = [*SENTENCES, " ".join(SENTENCES), ""]
    reward = RewardModel(reward_path, device="cpu", max_length=20)
    tokenizer = AutoTokenizer.from_pretrained(reward_path)
    side = tokenizer.truncation_side
    in_advance = encode(tokenizer, texts, max_length=20)
    assert in_advance == reward.token_ids(texts)
    assert tokenizer.truncation_side == side


# --- Plain functions ----------------------------------------------------------------------------------------------


def test_words_are_counted_in_strings_and_in_messages():
    completions = ["", " one  two\nthree ", [{"role": "assistant", "content": "two words"}]]
    assert word_count(completions=completions, prompts=None) == [0.0, 3.0, 2.0]
    assert length_penalty(completions=completions) == [0.0, -3.0, -2.0]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "one two"}]}]
    assert word_count([parts]) == [2.0]


# --- checked ------------------------------------------------------------------------------------------------------


def returning(values):
    def my_reward(prompts, completions, **columns):
        return values

    return my_reward


@pytest.mark.parametrize(
    "values", [[1, None], torch.tensor([1.0, 2.0]), np.array([1.0, 2.0], dtype=np.float32), (True, np.float64(2))]
)
def test_good_values_pass_as_python_floats_and_none_as_none(values):
    checked_values = with_finite_scores(returning(values))(["p", "q"], ["x", "y"])
    assert checked_values[0] == 1.0
    assert all(value is None or type(value) is float for value in checked_values)
    assert (checked_values[1] is None) == (values[1] is None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan")), "high"])
def test_a_value_that_is_no_finite_number_names_function_sample_value_and_text(bad):
    with pytest.raises(ValueError, match=r"'my_reward'.*sample 1: prompt 'second', completion 'two'") as error:
        with_finite_scores(returning([0.0, bad]))(["first", "second"], ["one", "two"])
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], []])
def test_a_wrong_number_of_values_names_the_function_and_both_counts(values):
    with pytest.raises(ValueError, match=rf"'my_reward' returned {len(values)} values for 2 completions"):
        with_finite_scores(returning(values))(["p", "q"], ["x", "y"])


@pytest.mark.parametrize("value", [1.0, None])
def test_something_that_is_no_list_is_an_error(value):
    with pytest.raises(ValueError, match=rf"'my_reward' returned {type(value).__name__}, not a list of 2"):
        with_finite_scores(returning(value))(["p", "q"], ["x", "y"])


def test_columns_reach_the_function():
    def by_column(prompts, completions, bonus, **_):
        return bonus

    assert with_finite_scores(by_column)(prompts=["p"], completions=["x"], bonus=[4]) == [4.0]


async def slow_reward(prompts, completions, **columns):
    await asyncio.sleep(0)
    return columns["values"]


class SlowReward:
    async def __call__(self, prompts, completions, **columns):
        return columns["values"]


@pytest.mark.parametrize("function", [slow_reward, SlowReward()])
def test_an_async_function_stays_async_and_is_with_finite_scores(function):
    wrapper = with_finite_scores(function)
    assert is_async_callable(wrapper)
    assert get_callable_name(wrapper) == get_callable_name(function)
    assert asyncio.run(wrapper(["p"], ["x"], values=[torch.tensor(2)])) == [2.0]
    with pytest.raises(ValueError, match=get_callable_name(function)):
        asyncio.run(wrapper(["p"], ["x"], values=[float("nan")]))


def test_the_name_that_trl_logs_is_kept_and_a_plain_function_stays_plain(llama_reward):
    from functools import partial

    for function in (word_count, partial(word_count, scale=1), RewardModel(llama_reward, device="cpu")):
        assert get_callable_name(with_finite_scores(function)) == get_callable_name(function)
        assert not is_async_callable(with_finite_scores(function))


# --- Ensembles, and preference as reward ----------------------------------------------------------------------------

MEMBERS = [lambda prompts, completions: [1.0, 3.0, 0.0], lambda prompts, completions: [2.0, 1.0, 0.0]]
LETTERS = {"prompts": ["a", "b", "c"], "completions": ["x", "y", "z"]}
for number, member in enumerate(MEMBERS):
    member.__name__ = f"member{number}"


@pytest.mark.parametrize(("variance_coef", "scores"), [(None, [1, 1, 0]), (0.0, [1.5, 2, 0]), (2.0, [1, 0, 0])])
@pytest.mark.parametrize("members", [MEMBERS, MEMBERS[::-1]])
def test_an_ensemble_scores_the_minimum_or_the_mean_less_the_variance_in_any_order(members, variance_coef, scores):
    assert ensemble(members, variance_coef)(**LETTERS) == pytest.approx(scores)


@pytest.mark.parametrize("variance_coef", [None, 0.0, 5.0])
def test_an_ensemble_of_a_model_with_itself_is_the_model(bert_reward, variance_coef):
    reward = RewardModel(bert_reward, device="cpu")
    assert ensemble([reward, reward], variance_coef)(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("variance_coef", [None, 1.0])
@pytest.mark.parametrize("place", [0, 1])
def test_a_score_of_one_member_that_is_no_number_is_refused(variance_coef, place):
    members = MEMBERS[:1]
    members.insert(place, lambda prompts, completions: [0.0, math.nan, 0.0])
    checked = with_finite_scores(ensemble(members, variance_coef))
    with pytest.raises(ValueError, match=r"'reward_ensemble' returned nan for sample 1: prompt 'b', completion 'y'"):
        checked(**LETTERS)


def test_what_is_combined_is_logged_by_itself():
    logged = {}
    both = ensemble(MEMBERS)
    preference(both, lambda prompts: prompts)(**LETTERS, log_metric=logged.__setitem__)
    means = {"1_member0": 4 / 3, "2_member1": 1.0}
    assert logged == {"rewards/reward_ensemble": pytest.approx(2 / 3)} | {
        f"rewards/reward_ensemble/{name}": pytest.approx(mean) for name, mean in means.items()
    }


def test_preference_as_reward_is_the_sigmoid_of_the_difference_of_two_scores(gpt2_reward, bert_reward):
    first, second = RewardModel(gpt2_reward, device="cpu"), RewardModel(bert_reward, device="cpu")
    references = [" was bad", "a great cast", " plot", ""]
    for reward in (first, ensemble([first, second], 0.5)):
        chances = preference(reward, lambda prompts: references)(PROMPTS, COMPLETIONS)
        own, theirs = reward(PROMPTS, COMPLETIONS), reward(PROMPTS, references)
        assert chances == pytest.approx([1 / (1 + math.exp(b - a)) for a, b in zip(own, theirs, strict=True)])
        reversed_chances = preference(reward, lambda prompts: COMPLETIONS)(PROMPTS, references)
        assert np.add(chances, reversed_chances) == pytest.approx(1)
        assert preference(reward, lambda prompts: COMPLETIONS)(PROMPTS, COMPLETIONS) == pytest.approx([0.5] * 4)


def test_preference_as_reward_stays_in_bounds_however_far_the_scores_are_apart():
    def size(prompts, completions, **_):
        return [float(completion) for completion in completions]

    chances = preference(size, lambda prompts: ["0"] * 3)(["a"] * 3, ["-1e5", "1e5", "1"])
    assert chances == pytest.approx([0, 1, 1 / (1 + math.exp(-1))])


def sampler(path, tmp_path, **set):
    settings = {"max_completion_length": 6, "use_cpu": True, "bf16": False, "report_to": "none"} | set
    return reference_sampler(path, PPOConfig(str(tmp_path), **settings))


def test_what_the_reference_says_depends_on_seed_and_prompts_alone(gpt2_path, tmp_path):
    sample = sampler(gpt2_path, tmp_path)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    first = sample(PROMPTS[2:])
    assert torch.equal(torch.get_rng_state(), state)  # training's own random numbers go on as without it
    torch.manual_seed(3)
    assert sampler(gpt2_path, tmp_path)(PROMPTS[2:]) == first
    assert sampler(gpt2_path, tmp_path, seed=1)(PROMPTS[2:]) != first


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("chats", [False, True])
def test_the_reference_continues_each_prompt_as_if_it_stood_alone_up_to_its_end(family, chats, tmp_path, request):
    path = request.getfixturevalue(f"{family}_path")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer("the movie")["input_ids"]
    end = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    model.generation_config = GenerationConfig(eos_token_id=end, suppress_tokens=[end])  # of which only the end counts
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ends = end, tokenizer.eos_token_id
    prompts, expected = ["the movie", "i watched it twice because the story", "a"], []
    for number, prompt in enumerate(prompts):
        prompts[number] = chat(prompt, "")[0] if chats else prompt
        ids = tokenizer(f"user: {prompt}|" if chats else prompt)["input_ids"]
        given = len(ids)
        while len(ids) < given + 6 and (len(ids) == given or ids[-1] not in ends):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[given:], skip_special_tokens=True))
    assert sampler(str(tmp_path / "model"), tmp_path, temperature=1e-6)(prompts) == expected


def test_rouge1_is_the_f1_of_the_words_shared_with_the_reference():
    found = rouge1(["The cat", "dogs ran", ""], reference=["the cat sat", "a dog", "x"])
    assert found == pytest.approx([0.8, 0.5, 0.0])  # 2·(1·⅔)/(1 + ⅔); stems count: dogs, dog


def test_a_reward_that_needs_a_column_which_is_not_there_is_told_so_and_one_that_fails_itself_is_not():
    def needs(prompts, completions, stars):
        return [stars + 1]

    with (
        pytest.raises(
            ScoreError, match=r"'needs' failed: .*'stars'; .* what it needs besides must be a column of the dataset"
        ),
        reward_failures("needs"),
    ):
        needs(["a"], ["b"])
    with pytest.raises(ScoreError, match=r"TypeError: .* \(test_rewards.py, line \d+\)$"), reward_failures("needs"):
        needs(["a"], ["b"], stars="one")
