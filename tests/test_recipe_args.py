"""YAML and command line: what wins over what, and that every mistake is one line that names it."""

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from safetensors import SafetensorError
from trl import GRPOConfig, ModelConfig, RewardConfig, ScriptArguments

import command_line
from command_line import one_line_errors, parse
from models_and_data import check_model, check_path, load_split
from recipe_args import PPOArguments
from trl_ppo import PPOConfig
from trl_ppo.inputs import UserError

ROOT = Path(__file__).resolve().parent.parent
REAL = (ScriptArguments, RewardConfig, ModelConfig)
BASE = "output_dir: runs/x\nuse_cpu: true\nbf16: false\nreport_to: none\n"


@dataclass
class Small:
    """Types that TRL's dataclasses use, without their checks."""

    REFUSED: ClassVar[dict[str, str]] = {"refused": "use number"}

    number: float = 1.0
    count: int = 3
    name: str = "a"
    flag: bool = False
    method: Literal["exact", "fast"] = "exact"
    levels: list[float] | None = None
    options: dict | str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    never_typed: int = None
    refused: int = 8
    kind: str = field(default="a", metadata={"choices": ["a", "b"], "help": "a or b."})

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative\nand this second line is not shown")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """recipes/x.py in an empty directory, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return tmp_path / "recipes" / "x.py"


def write(script: Path, text: str, name="x.yaml") -> None:
    (script.parent / name).parent.mkdir(parents=True, exist_ok=True)
    (script.parent / name).write_text(text)


@pytest.fixture
def mistake(capsys):
    """Runs `parse`, which must fail, and returns the line it printed."""

    def run(script, *types, args=()) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(str(script), *types, args=list(args))
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err.rstrip("\n")

    return run


# --- What wins ----------------------------------------------------------------------------------------------------


def test_the_yaml_beside_the_script_is_the_default_and_the_command_line_wins(script):
    write(script, BASE + "learning_rate: 2.0e-5\nmax_length: 99\ndataset_name: data/toy\n")
    script_args, training_args, _ = parse(str(script), *REAL, args=["--max_length", "7"])
    assert (script_args.dataset_name, training_args.learning_rate) == ("data/toy", 2e-5)
    assert training_args.max_length == 7


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("given", ["tiny", "recipes/variants/x/tiny.yaml"])
def test_config_replaces_the_default_yaml_by_a_variants_name_or_a_path(script, form, given):
    write(script, "count: 5\nname: default\n")
    write(script, "number: 2.5\n", "variants/x/tiny.yaml")
    (small,) = parse(str(script), Small, args=[*form.format(given).split(), "--flag", "true"])
    assert (small.number, small.count, small.name, small.flag) == (2.5, 3, "a", True)


def test_a_file_of_only_comments_leaves_the_dataclass_defaults(script):
    write(script, "# nothing yet\n")
    assert parse(str(script), Small, args=[]) == (Small(),)


def test_numbers_that_yaml_1_1_reads_as_strings_are_numbers(script):
    write(script, "number: 1e-5\ncount: 1e3\nlevels: [1e-1, 2]\nname: '1e3'\n")
    (small,) = parse(str(script), Small, args=[])
    assert (small.number, small.count, small.levels, small.name) == (1e-5, 1000, [0.1, 2], "1e3")
    assert type(small.count) is int


def test_a_mapping_is_given_in_yaml_and_on_the_command_line(script):
    write(script, "weights: {a: 1, my_rewards.py:no_shouting: -0.5, org/name#LABEL: 1e-1}\n")
    (small,) = parse(str(script), Small, args=[])
    assert small.weights == {"a": 1.0, "my_rewards.py:no_shouting": -0.5, "org/name#LABEL": 0.1}
    (small,) = parse(str(script), Small, args=["--weights", "{b: 2}"])
    assert small.weights == {"b": 2.0}


def test_values_of_every_type_arrive_unchanged(script):
    write(script, "options: {a: [1]}\nlevels: [1, 2.5]\nflag: true\nmethod: fast\nname: '7'\nnever_typed: null\n")
    (small,) = parse(str(script), Small, args=[])
    assert (small.options, small.levels, small.flag, small.method) == ({"a": [1]}, [1, 2.5], True, "fast")
    assert (small.name, small.never_typed) == ("7", None)


def test_every_default_of_the_real_dataclasses_fits_its_own_type(script):
    import dataclasses

    import yaml

    values = {
        f.name: f.default
        for cls in (ScriptArguments, GRPOConfig, ModelConfig)
        for f in dataclasses.fields(cls)
        if f.init and type(f.default) in (str, int, float, bool, type(None))
    }
    del values["debug"]  # "", which transformers' own parser refuses
    assert len(values) > 100
    write(script, yaml.safe_dump(values | {"output_dir": "runs/x", "use_cpu": True, "bf16": False}))
    _, config, _ = parse(str(script), ScriptArguments, GRPOConfig, ModelConfig, args=[])
    assert config.learning_rate == values["learning_rate"]


# --- --help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--help", "-h", "--help-all"])
def test_help_lists_every_key_with_the_yamls_default_but_the_refused_ones(script, capsys, form):
    write(script, "number: 0.125\nkind: b\n")
    with pytest.raises(SystemExit) as stop:
        parse(str(script), Small, args=[form])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in ("number", "count", "name", "flag", "method", "levels", "options", "weights", "kind"):
        assert f"--{key} " in text
    assert "(default: 0.125)" in text
    assert "a or b. (default: b)" in text
    assert "recipes/x.yaml" in text
    assert "refused" not in text


# --- Mistakes -----------------------------------------------------------------------------------------------------


def test_a_missing_config_is_named_with_those_there_are(script, mistake):
    line = mistake(script, Small)
    assert "x.yaml does not exist" in line
    write(script, "count: 5\n", "variants/x/tiny.yaml")
    line = mistake(script, Small, args=["--config", "tinny"])
    assert line == "--config: tinny does not exist; variants of x.py: tiny"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "not a mapping of keys to values but a list"),
        ("just words\n", "not a mapping"),
        ("count: 3\nlevels: [1, 2\nname: a\n", "line 3"),
        ("count: 3\nname: 'open\n", "line 3"),
        ("count: 3\nname: a\ncount: 4\n", "line 3: 'count' is given twice"),
    ],
)
def test_a_file_that_is_no_mapping_or_no_yaml_says_where(script, mistake, text, expected):
    write(script, text)
    line = mistake(script, Small)
    assert line.startswith("recipes/x.yaml: ")
    assert expected in line


def test_an_unknown_key_is_named_with_its_file_and_the_closest_known_one(script, mistake):
    write(script, BASE + "learning_rat: 1.0e-5\n")
    expected = "recipes/x.yaml: unknown key learning_rat; did you mean learning_rate?"
    assert mistake(script, *REAL) == expected
    write(script, "zzz: 1\n")
    assert mistake(script, *REAL) == "recipes/x.yaml: unknown key zzz; --help-all lists those there are"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--learning_rat", "1"], "unknown option --learning_rat; did you mean --learning_rate?"),
        (["--learning_rat=1"], "unknown option --learning_rat; did you mean --learning_rate?"),
        (["--learning", "1"], "unknown option --learning;"),  # no abbreviations: a typo could be one
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--learning_rate"], "--learning_rate: expected one argument"),
        (["--eval_strategy", "never"], "--eval_strategy: invalid choice: 'never'"),
        (["stray"], "unknown option stray"),
        (["--config", "x.yaml", "--config=y.yaml"], "--config: give one file"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(script, mistake, args, expected):
    write(script, BASE)
    assert mistake(script, *REAL, args=args).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: fast", "learning_rate: 'fast' should be a valid number"),
        ("learning_rate: '1e-5'", "learning_rate: '1e-5' should be a valid number"),
        ("learning_rate: [1]", "learning_rate: [1] should be a valid number"),
        ("learning_rate: {a: 1}", "learning_rate: {'a': 1} should be a valid number"),
        ("learning_rate: true", "learning_rate: True should be a valid number"),
        ("learning_rate:", "learning_rate: None should be a valid number"),
        ("max_steps: 2.5", "max_steps: 2.5 should be a valid integer"),
        ("use_cpu: 'yes'", "use_cpu: 'yes' should be a valid boolean"),
        ("use_cpu: [true]", "use_cpu: [True] should be a valid boolean"),
        ("dataset_name: [a, b]", "dataset_name: ['a', 'b'] should be a valid string"),
        ("dataset_name: 2024", 'dataset_name: 2024 should be a valid string: quote it, as in "2024"'),
        ("dataset_train_split: off", 'dataset_train_split: False should be a valid string: quote it, as in "no"'),
        ("lora_target_modules: q_proj", "lora_target_modules: 'q_proj' should be a valid array"),
        ("lora_target_modules: [q, 1]", "lora_target_modules: ['q', 1] should be a valid string"),
        ("model_init_kwargs: [1]", "model_init_kwargs: [1] should be an object"),
        ("eval_strategy: no", "eval_strategy: False should be 'no', 'steps' or 'epoch': quote it, as in \"no\""),
        ("eval_strategy: never", "eval_strategy: 'never' is not one of no, steps, epoch"),
        ("dtype: float64", "dtype: 'float64' is not one of auto, bfloat16, float16, float32"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_with_key_and_type(script, mistake, text, expected):
    write(script, f"output_dir: runs/x\n{text}\n")
    assert mistake(script, *REAL) == f"recipes/x.yaml: {expected}"


def test_a_literal_outside_its_choices_is_named_with_them(script, mistake):
    write(script, "method: slow\n")
    assert mistake(script, Small) == "recipes/x.yaml: method: 'slow' should be 'exact' or 'fast'"


def test_what_a_dataclass_refuses_is_its_first_line(script, mistake):
    write(script, "count: -1\n")
    assert mistake(script, Small) == "recipes/x.yaml: count must not be negative"
    line = mistake(script, Small, args=["--count", "-2"])
    assert line == "recipes/x.yaml and the command line: count must not be negative"


def test_bf16_on_a_machine_without_it_is_one_line(script, mistake, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    write(script, "output_dir: runs/x\nbf16: true\n")
    assert "bf16" in mistake(script, *REAL)


def test_only_the_first_rank_prints(script, monkeypatch, capsys):
    write(script, "zzz: 1\n")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse(str(script), Small, args=[])
    assert (stop.value.code, capsys.readouterr().err) == (2, "")


def test_a_reward_that_fails_on_another_rank_is_not_silent(monkeypatch, capsys):
    from trl_ppo.reward_model import with_finite_scores

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_line_errors():
        with_finite_scores(lambda **_: [float("nan")])(["p"], ["x"])
    assert "returned nan for sample 0" in capsys.readouterr().err


# --- one_line_errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UserError("one\ntwo"), FileNotFoundError("one"), FloatingPointError("one")])
def test_a_users_mistake_ends_main_with_its_first_line(error, capsys):
    @one_line_errors()
    def main():
        raise error

    for _ in range(2):  # a decorator that works once would not do
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err == "one\n"


def test_a_model_that_is_out_of_reach_is_named(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        check_model("model_name_or_path", "some-org/some-model")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("model_name_or_path: 'some-org/some-model': no model can be loaded from there: ")


def test_errors_that_may_be_bugs_keep_their_traceback():
    for error in (ValueError("from elsewhere"), RuntimeError("shapes"), KeyError("name")):
        with pytest.raises(type(error)), one_line_errors():
            raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (SafetensorError("I/O error: No space left on device"), "I/O error: No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576"), "is the disk full? [enforce"),
        (
            RuntimeError("[gloo/pair.cc:534] Connection closed by peer"),
            "another rank ended, or cannot be reached: [gloo",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_one_line_on_every_rank(error, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(("checkpoints", "words"), [([], "nothing was saved"), (["checkpoint-2"], "goes on from")])
def test_ctrl_c_in_a_recipe_says_what_there_is_to_go_on_from(script, capsys, monkeypatch, tmp_path, checkpoints, words):
    def main(script_args: ScriptArguments, training_args: RewardConfig, model_args: ModelConfig):
        for name in checkpoints:
            (Path(training_args.output_dir) / name).mkdir(parents=True)
        raise KeyboardInterrupt

    script.with_suffix(".yaml").write_text(BASE + "dataset_name: x\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main, str(script))
    assert stopped.value.code == 130
    assert words in capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_reward_model_that_cannot_be_used_is_one_line(bert_path, capsys):
    from trl_ppo import RewardModel

    with pytest.raises(SystemExit), one_line_errors():
        RewardModel(bert_path, label="HAPPY", device="cpu")
    assert "it has 0: NEGATIVE, 1: POSITIVE\n" in capsys.readouterr().err


def test_a_script_run_for_real_fails_in_one_line_with_status_2(script):
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "from dataclasses import dataclass\nfrom command_line import one_line_errors, parse\n"
        "@dataclass\nclass Args:\n    model: str = 'gpt2'\n"
        "@one_line_errors()\ndef main(args):\n    print('loading', args.model)\n    open(args.model)\n"
        "if __name__ == '__main__':\n    main(*parse(__file__, Args))\n"
    )
    write(script, "model: runs/nothing\n")
    for args, loads, expected in (
        ([], True, "[Errno 2] No such file or directory: 'runs/nothing'"),
        (["--modle", "x"], False, "unknown option --modle; did you mean --model?"),
    ):
        command = [sys.executable, "recipes/x.py", *args]
        run = subprocess.run(command, capture_output=True, text=True, cwd=script.parent.parent)
        assert run.returncode == 2
        assert ("loading runs/nothing" in run.stdout) == loads
        assert run.stderr == expected + "\n"
    # Without --quiet it adds a traceback.
    launch = ["accelerate.commands.accelerate_cli", "launch", "--quiet", "--config_file"]
    command = [sys.executable, "-m", *launch, str(ROOT / "accelerate_configs" / "cpu.yaml"), "recipes/x.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=script.parent.parent)
    assert run.returncode == 1  # accelerate's own
    assert run.stderr == "[Errno 2] No such file or directory: 'runs/nothing'\n"


# --- Paths and data -----------------------------------------------------------------------------------------------


def test_a_path_that_can_only_be_local_must_exist(tmp_path):
    for value in ("runs/none", "./none", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(UserError, match=r"ref_model: .* does not exist: make it first, or give a Hub id") as error:
            check_path("ref_model", value)
        assert repr(value) in str(error.value)
    for value in (str(tmp_path), "gpt2", "org/name", "distilbert-base-cased"):
        check_path("ref_model", value)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with two rows of train (plain JSONL) and one of test (gzip), and a cache of its own for datasets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"prompt": f"p{i}", "label": i}) + "\n" for i in range(3)]
    (folder / "train.jsonl").write_text(rows[0] + rows[1])
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.write(rows[2])
    return folder


def test_a_split_of_a_local_folder_is_loaded_whole(data):
    rows = list(load_split(str(data), "train", columns=["prompt"]))
    assert rows == [{"prompt": "p0", "label": 0}, {"prompt": "p1", "label": 1}]
    assert [row["label"] for row in load_split(str(data), "test")] == [2]
    assert list(load_split(str(data / "train.jsonl"), "train")) == rows


def test_a_missing_split_or_column_is_named_with_those_there_are(data):
    with pytest.raises(UserError, match=r"(?s)valid.*train.*test"):
        load_split(str(data), "valid")
    with pytest.raises(UserError, match="'train' has no column chosen, rejected; it has prompt, label"):
        load_split(str(data), "train", ["chosen", "prompt", "rejected"])


def test_a_split_without_rows_is_an_error(data):
    (data / "test.jsonl.gz").unlink()
    (data / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="split 'train' has no rows"):
        load_split(str(data), "train")


def test_broken_json_and_an_empty_folder_are_one_line(data, tmp_path):
    (data / "train.jsonl").write_text('{"prompt": 1}\n{"prompt"\n')
    (tmp_path / "empty").mkdir()
    for folder, expected in ((data, "JSON parse error"), (tmp_path / "empty", "any data files")):
        with pytest.raises(UserError, match=expected) as error:
            load_split(str(folder), "train")
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["toy_reviews", "imdb", "hh", "summarize_from_feedback", "synthetic_instruct"])
def test_data_that_was_not_made_yet_names_the_command_that_makes_it(script, name):
    command = f"python data_prep/{name}.py"
    for path in (f"data/{name}", f"./data/{name}", f"data/{name}/sft"):
        with pytest.raises(UserError, match=f"make it with: {command}$"):
            load_split(path, "train")
    assert (ROOT / command.split()[1]).is_file()


@pytest.mark.parametrize("ending", [".txt", ".csv", ".csv.gz", ".jsonl"])
def test_a_single_file_is_read_by_its_ending(tmp_path, ending):
    texts = ["one film, two reviews", "the end"]
    rows = {
        ".txt": "\n".join(texts),
        ".csv": "prompt\n" + "\n".join(f'"{text}"' for text in texts),
        ".jsonl": "\n".join(json.dumps({"prompt": text}) for text in texts),
    }
    path = tmp_path / f"prompts{ending}"
    opener = gzip.open if ending.endswith(".gz") else open
    with opener(path, "wt") as stream:
        stream.write(rows[ending.removesuffix(".gz")])
    assert list(load_split(str(path), "test", ["prompt"])["prompt"]) == texts


def test_an_unreachable_hub_is_one_line_with_the_mend():
    with pytest.raises(UserError, match=r"'no-org/no-data'.*on the Hub.*give the path of a local folder") as error:
        load_split("no-org/no-data", "train")
    assert "\n" not in str(error.value)


def test_the_module_imports_without_torch():
    code = "import sys, command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(command_line.__file__).parent).returncode == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{reward_model: high}", "high"),
        ("{reward_model: 1.0, reward_model: 2.0}", "twice"),
        ("reward_model", "reward_model"),
        ("{reward_model: [}", "reward_model"),
    ],
)
def test_a_mapping_on_the_command_line_is_read_as_in_a_yaml_and_its_faults_are_named(given, said, capsys):
    script = str(ROOT / "recipes/sentiment_gpt2_ppo.py")
    types = (PPOArguments, PPOConfig, ModelConfig)
    assert parse(script, *types, args=["--rewards", "{reward_model: 1e-2}"])[0].rewards == {"reward_model": 0.01}
    with pytest.raises(SystemExit):
        parse(script, *types, args=["--rewards", given])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--rewards: ")
    assert said in line
    assert "write it as '{name: value}'" in line


@pytest.mark.parametrize(
    ("given", "models"),
    [("runs/a", ["runs/a"]), ("org/model", ["org/model"]), ("[runs/a, runs/b]", ["runs/a", "runs/b"])],
)
def test_one_or_several_reward_models_may_be_given_on_the_command_line(given, models, capsys):
    script = str(ROOT / "recipes/sentiment_gpt2_ppo.py")
    types = (PPOArguments, PPOConfig, ModelConfig)
    assert parse(script, *types, args=["--reward_model", given])[0].reward_models == models
    with pytest.raises(SystemExit):
        parse(script, *types, args=["--reward_model", "[runs/a"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--reward_model: ")
    assert line.endswith("write it as '[one, another]'")


@pytest.mark.parametrize("name", ["save", "eval"])
def test_who_asks_for_steps_gets_them_whatever_the_yaml_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = str(ROOT / "recipes" / "sentiment_gpt2_ppo.py")
    types = PPOArguments, PPOConfig, ModelConfig

    def strategy_of(*words):
        _, config, _ = parse(script, *types, args=["--config", "tiny", *words])
        return getattr(config, f"{name}_strategy"), getattr(config, f"{name}_steps")

    assert strategy_of()[0] == "no"
    assert strategy_of(f"--{name}_steps", "8") == ("steps", 8)
    assert strategy_of(f"--{name}_steps=8") == ("steps", 8)
    assert strategy_of(f"--{name}_steps", "8", f"--{name}_strategy", "no")[0] == "no"
