"""eval/predict: prompts from every source, text as it is made, and bad input refused in one line."""

import io
import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, TextStreamer

from eval import loading, predict, streaming

PROMPTS = ["the movie was", "a great film with", "i left early"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def run(gpt2_path):
    """Continues prompts with the random GPT-2 in this process; returns the completions by model."""
    return lambda *options: predict.main(["--model", gpt2_path, "--max_new_tokens", "8", *options])


@pytest.fixture(scope="module")
def other_path(gpt2_path, tmp_path_factory) -> str:
    """The random GPT-2 with noise on its weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(gpt2_path, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(gpt2_path)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chat_path(gpt2_path, tokenizer, tmp_path) -> str:
    shutil.copytree(gpt2_path, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "chat")


def written(folder, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- Text -------------------------------------------------------------------------------------------------------


def test_at_temperature_zero_the_text_is_the_models_own_greedy_continuation(run, gpt2_path, capsys):
    texts = run("--prompt", PROMPTS[0], "--temperature", "0")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_path), loading.load_tokenizer(gpt2_path)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[len(tokenizer(PROMPTS[0])["input_ids"]) :], skip_special_tokens=True)
    assert texts == [{"model": expected}]
    assert capsys.readouterr().out == streaming.printable(expected) + "\n"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run):
    first, again, other = (run("--prompt", PROMPTS[0], "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again != other


def test_a_tiny_top_p_leaves_only_the_likeliest_token(run):
    greedy = run("--prompt", PROMPTS[0], "--temperature", "0")
    assert run("--prompt", PROMPTS[0], "--top_p", "1e-9", "--seed", "5") == greedy


def test_text_reaches_the_terminal_in_pieces_as_it_is_made(gpt2_path):
    args = predict.make_parser().parse_args(["--model", gpt2_path, "--max_new_tokens", "24"])
    [predictor] = predict.load_predictors(args)
    made_when_shown = []
    generated = []
    put = TextStreamer.put

    def counting_put(self, value):
        generated.append(value.numel())
        put(self, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStreamer, "put", counting_put)
        ids = streaming.encode_prompt(predictor, "the", args)
        streaming.predict(predictor, ids, args, 0, lambda piece: made_when_shown.append((piece, len(generated))))
    shown_at = [count for piece, count in made_when_shown if piece]
    assert shown_at[0] < len(generated)  # before the last token


def test_characters_that_a_terminal_obeys_are_replaced(tokenizer):
    shown = []
    streamer = streaming.Pieces(tokenizer, shown.append)
    streamer.put(torch.tensor([[5]]))  # the prompt
    for token in tokenizer("\x1b[2Jred \u202e\rx\ty\n")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(shown) == "\ufffd[2Jred \ufffd\ufffdx\ty\n"


# --- Prompts ----------------------------------------------------------------------------------------------------


def test_a_post_takes_the_form_of_the_tldr_dataset():
    assert predict.format_post("AskReddit", "T", "P") == "SUBREDDIT: r/AskReddit\n\nTITLE: T\n\nPOST: P\n\nTL;DR:"
    assert predict.format_post(None, "T", "P") == "TITLE: T\n\nPOST: P\n\nTL;DR:"


def test_a_post_is_continued_as_its_prompt_would_be(run):
    short = ["--max_new_tokens", "4", "--temperature", "0"]
    prompt = predict.format_post("x", "so", "it was bad")
    from_post = run("--title", "so", "--post", "it was bad", "--subreddit", "x", *short)
    assert from_post == run("--prompt", prompt, *short)


def test_a_text_file_and_a_jsonl_column_and_piped_lines_give_the_same(run, tmp_path, monkeypatch, capsys):
    text = written(tmp_path, "prompts.txt", "\n\n".join(PROMPTS) + "\n")
    rows = "".join(json.dumps({"prompt": p, "text": p}) + "\n" for p in PROMPTS)
    jsonl = written(tmp_path, "prompts.jsonl", rows)
    from_text = run("--file", text)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
    assert len(from_text) == 3
    assert from_text == run("--file", jsonl) == run("--file", jsonl, "--prompt_column", "text") == run()
    out = capsys.readouterr().out
    assert all(out.count(prompt) == 4 for prompt in PROMPTS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_prompt_on_a_terminal_it_asks_until_the_end_of_file(run, monkeypatch, capsys):
    lines = iter([PROMPTS[0], "", "the movie " * 60, PROMPTS[1]])

    def ask(_):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    texts = run()
    assert len(texts) == 2  # the blank line is no prompt, and one that is too long is passed over
    assert "64 positions" in capsys.readouterr().err


# --- Models -----------------------------------------------------------------------------------------------------


def test_compare_shows_the_base_before_the_tuned_model_each_as_alone(run, gpt2_path, other_path, capsys):
    alone = run("--prompt", PROMPTS[0])[0]["model"]
    capsys.readouterr()
    both = predict.main(
        ["--model", other_path, "--compare", gpt2_path, "--prompt", PROMPTS[0], "--max_new_tokens", "8"]
    )
    out = capsys.readouterr().out
    assert both[0]["base"] == alone != both[0]["tuned"]
    assert out.index("[base]") < out.index("[tuned]")


def test_on_a_terminal_both_texts_stand_in_one_table(gpt2_path, other_path):
    options = ["--model", other_path, "--compare", gpt2_path, "--temperature", "0", "--max_new_tokens", "8"]
    args = predict.make_parser().parse_args(options)
    predictors = predict.load_predictors(args)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    encoded = [streaming.encode_prompt(predictor, PROMPTS[0], args) for predictor in predictors]
    texts = streaming.show_beside(predictors, encoded, args, 0, console)
    last = screen.getvalue()
    assert "base" in last
    assert "tuned" in last
    assert texts == streaming.show_plainly(predictors, encoded, args, 0)


def test_an_adapter_predicts_as_its_base_with_the_adapter_on_top(gpt2_path, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_path),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True),
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    shutil.copytree(gpt2_path, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    options = ["--prompt", PROMPTS[0], "--temperature", "0", "--max_new_tokens", "12"]
    by_adapter = predict.main(["--model", str(tmp_path / "adapter"), *options])
    assert by_adapter == predict.main(["--model", str(tmp_path / "merged"), *options])
    assert by_adapter != predict.main(["--model", gpt2_path, *options])


def test_the_conversation_template_is_applied_only_when_asked(chat_path, tmp_path):
    options = ["--model", chat_path, "--max_new_tokens", "8", "--temperature", "0"]
    wrapped = predict.main([*options, "--prompt", "<user>good<a>"])
    assert predict.main([*options, "--chat", "--prompt", "good"]) == wrapped
    assert predict.main([*options, "--prompt", "good"]) != wrapped
    turns = [{"role": "user", "content": "good"}]
    file = written(tmp_path, "chat.jsonl", json.dumps({"prompt": turns}) + "\n")
    assert predict.main([*options, "--chat", "--file", file]) == wrapped


# --- Bad input --------------------------------------------------------------------------------------------------

BEFORE_MODELS = {
    "a title without a post": (["--title", "x"], ["--title", "--post"]),
    "a subreddit without a post": (["--subreddit", "x"], ["--subreddit x", "--post"]),
    "two sources of prompts": (["--prompt", "x", "--file", "y"], ["--prompt and --file"]),
    "an empty prompt": (["--prompt", " "], ["--prompt", "empty"]),
    "a missing file": (["--file", "{tmp}/nowhere.txt"], ["nowhere.txt"]),
    "an empty file": (["--file", "{tmp}/empty.txt"], ["empty.txt", "no prompt"]),
    "a file that is not text": (["--file", "{tmp}/bytes.txt"], ["bytes.txt", "cannot be read"]),
    "a missing column": (["--file", "{tmp}/rows.jsonl"], ["rows.jsonl", "line 1", "'prompt'"]),
    "a broken row": (["--file", "{tmp}/broken.jsonl"], ["broken.jsonl", "line 2", "JSON"]),
    "an empty row": (["--file", "{tmp}/blank.jsonl"], ["blank.jsonl", "line 1", "'prompt'"]),
    "a conversation without --chat": (["--file", "{tmp}/chat.jsonl"], ["chat.jsonl", "--chat"]),
    "a missing model": (["--prompt", "x", "--model", "{tmp}/gone"], ["--model", "gone"]),
    "a missing base model": (["--prompt", "x", "--compare", "{tmp}/gone"], ["--compare", "gone"]),
    "an adapter without its base": (["--prompt", "x", "--model", "{tmp}/orphan"], ["--model", "nowhere"]),
    "no template": (["--prompt", "x", "--chat"], ["--chat", "template"]),
    "a negative temperature": (["--temperature", "-1"], ["--temperature", "0 or above"]),
    "a top_p above one": (["--top_p", "1.5"], ["--top_p", "at most 1"]),
    "an unknown option": (["--temprature", "1"], ["--temprature"]),
}
AFTER_MODELS = {
    "a prompt that is too long": (["--prompt", "the movie " * 60], ["64 positions"]),
    "a long prompt in a file": (["--file", "{tmp}/long.txt"], ["prompt 1", "64 positions"]),
    "nothing piped in": ([], ["--prompt"]),
}


@pytest.fixture
def scene(tmp_path):
    """Fills the places in the options above, with bad files to point at."""
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for name, text in {
        "empty.txt": "\n",
        "rows.jsonl": '{"text": "a"}\n',
        "broken.jsonl": '{"prompt": "a"}\n{"prompt"\n',
        "blank.jsonl": '{"prompt": ""}\n',
        "chat.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}\n',
        "long.txt": "short\n" + "the movie " * 60,
    }.items():
        written(tmp_path, name, text)
    (tmp_path / "orphan").mkdir()
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "nowhere")}
    written(tmp_path / "orphan", "adapter_config.json", json.dumps(adapter))
    return {"tmp": tmp_path}


def assert_one_line(run, scene, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        run(*(option.format(**scene) for option in options))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert len([line for line in printed.err.splitlines() if line.startswith("eval.predict: error: ")]) == 1
    for word in words:
        assert word in printed.err.splitlines()[-1]


@pytest.mark.parametrize("case", BEFORE_MODELS)
def test_bad_input_ends_in_one_line_before_a_model_loads(case, run, scene, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load_model", lambda path: pytest.fail("a model was loaded"))
    assert_one_line(run, scene, capsys, *BEFORE_MODELS[case])


@pytest.mark.parametrize("case", AFTER_MODELS)
def test_prompts_that_the_model_cannot_take_end_in_one_line(case, run, scene, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_one_line(run, scene, capsys, *AFTER_MODELS[case])


def test_a_generation_that_fails_ends_in_one_line(gpt2_path, tmp_path, capsys):
    shutil.copytree(gpt2_path, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(gpt2_path)
    for weight in model.parameters():
        weight.data *= 1e30  # what they give is beyond float32
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--model", str(tmp_path / "broken"), "--prompt", "the", "--max_new_tokens", "4"])
    assert stopped.value.code == 2
    assert "cannot generate" in capsys.readouterr().err.splitlines()[-1]


def test_several_prompts_are_all_continued(run):
    completions = run("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--temperature", "0")
    alone = [run("--prompt", prompt, "--temperature", "0")[0] for prompt in PROMPTS[:2]]
    assert completions == alone


def test_without_a_number_of_tokens_as_many_are_written_as_the_model_has_positions_for(gpt2_path):
    prompt = "a great film " * 3  # of a model with 64 positions
    (completion,) = predict.main(["--model", gpt2_path, "--prompt", prompt, "--temperature", "0"])
    assert completion["model"]
