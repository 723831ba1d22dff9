"""Files, overrides and what is refused, each with one line that names key and value."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nha_jax.models import PRESETS
from train import pretrain
from train.command_line import config_from_dict, load_config, parse_command_line
from train.schema import ConfigError

FILE = """\
name: small
steps: 300
batch_size: 16
context: 256
model: {preset: nano, num_slots: 32}
data: {directory: data/small}
schedule: {learning_rate: 1e-3, warmup_steps: 20}
validation: {every_steps: 100}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(FILE)
    return str(path)


def test_file_over_preset_over_defaults(file: str) -> None:
    config = parse_command_line(["--config", file])
    assert config.model == dataclasses.replace(PRESETS["nano"], num_slots=32)
    assert config.schedule.learning_rate == 1e-3
    assert config.optimizer.b1 == 0.9
    assert config.resume == "auto"


@pytest.mark.parametrize("config_first", [True, False])
def test_command_line_wins_over_file_in_either_order(file: str, config_first: bool) -> None:
    overrides = ["--model.windows", "[16, full]", "--steps=7", "--schedule.learning_rate", "2e-4"]
    overrides += ["--schedule.warmup_steps", "2"]
    option = ["--config", file]
    config = parse_command_line(option + overrides if config_first else overrides + option)
    assert config.model.windows == (16, "full")
    assert config.model.num_slots == 32
    assert (config.steps, config.schedule.learning_rate) == (7, 2e-4)


def test_preset_on_the_command_line_replaces_the_model_of_the_file(file: str) -> None:
    arguments = ["--model.windows", "[8]", "--config", file, "--model.preset", "nha_340m"]
    config = parse_command_line(arguments)
    assert config.model == dataclasses.replace(PRESETS["nha_340m"], windows=(8,))


def test_resolved_config_states_everything_and_is_a_config(file: str, tmp_path: Path) -> None:
    config = parse_command_line(["--config", file, "--optimizer.clip_norm", "null"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(resolved) == config
    assert config_from_dict(config.to_dict()) == config

    def keys(values: dict, prefix: str = "") -> set[str]:
        return {f"{prefix}{key}" for key in values}.union(
            *(keys(v, f"{prefix}{k}.") for k, v in values.items() if isinstance(v, dict))
        )

    written = keys(yaml.safe_load(resolved.read_text()))
    assert {f"model.{field.name}" for field in dataclasses.fields(config.model)} <= written
    assert {field.name for field in dataclasses.fields(config)} <= written
    assert "model.preset" not in written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.window", "[8]"], "unknown key 'model.window'.*did you mean model.windows"),
        (["--colour", "red"], "unknown key 'colour'"),
        (["--model.width.x", "8"], "unknown key 'model.width.x'"),
        (["--steps", "8", "--steps", "9"], "--steps: given twice, with '8' and '9'"),
        (["--steps", "8", "--steps=8"], "--steps: given twice"),
        (["--config", "other.yaml"], "--config: given twice"),
        (["--steps", "null"], "steps=null: expected an integer"),
        (["--model.width", "null"], "model.width=null: expected an integer"),
        (["--steps", "1.5"], "steps=1.5: expected an integer"),
        (["--steps", "010"], "steps=010: expected an integer"),
        (["--steps", "many"], "steps=many: expected an integer"),
        (["--steps", "-3"], "steps=-3"),
        (["--steps"], "--steps: a value is missing"),
        (["steps"], "'steps' on the command line"),
        (["--model", "{num_slots: 3}"], "--model: a section"),
        (["--model.windows", "[a]"], r"model.windows=\[a\]: expected a list"),
        (["--model.layer_kinds", "[rnn]"], r"model.layer_kinds=\[rnn\]: expected .*nha"),
        (["--model.preset", "huge"], "model.preset='huge': expected one of nano"),
        (["--resume", "yes"], "resume=yes: expected auto or never or must"),
        (["--log.tensorboard", "maybe"], "log.tensorboard=maybe: expected true or false"),
        (["--schedule.learning_rate", "fast"], "schedule.learning_rate=fast: expected a number"),
        (["--schedule.learning_rate", ".nan"], "schedule.learning_rate=nan"),
        (["--schedule.warmup_steps", "301"], "schedule.warmup_steps=301.*steps=300"),
        (["--profile.steps", "15:10"], "profile.steps='15:10'"),
        (["--name", "../up"], "name='../up'"),
        (["--model.num_heads", "5"], "model.num_.*heads="),
        (["--mesh.data", "3"], "batch_size=16 .*grad_accumulation=1.*mesh.data=3"),
        (["--mesh.data", "8", "--grad_accumulation", "4"], "batch_size=16 .*grad_accumulation=4"),
        (["--mesh.fsdp", "32"], "batch_size=16 .*mesh.fsdp=32"),
        (["--mesh.data", "0"], "mesh.data=0"),
        (["--mesh.tensor", "8"], "model.num_.*heads=. .*mesh.tensor=8"),
        (["--mesh.tensor", "4"], "model.num_kv_heads=2 is not divisible by mesh.tensor=4"),
        (["--model.mlp_width", "383", "--mesh.tensor", "2"], "model.mlp_width=383 .*mesh.tensor=2"),
        (["--model.width", "24", "--mesh.fsdp", "16"], "model.width=24 .*mesh.fsdp=16"),
        (["--checkpoint.keep_last", "0"], "checkpoint.keep_last=0"),
        (["--name", "null"], "name=null: expected text"),
        (["--data.directory", "null"], "data.directory=null: expected text"),
        (["--model.windows", "null"], "model.windows=null: expected a list"),
        (["--model.windows", "[null]"], r"model.windows=\[null\]: expected a list"),
        (["--mesh.data", "null"], "mesh.data=null: expected an integer or auto"),
        (["--model.param_dtype", "bfloat16"], "model.param_dtype='bfloat16': expected float32 for"),
        (["--model.slot_lag", "-1"], "model.slot_lag=-1"),
        (
            ["--model.rope_scaling.factor", "abc"],
            "model.rope_scaling.factor=abc: expected a number",
        ),
        (
            ["--model.rope_scaling.factor", "0"],
            "model.rope_scaling.factor=0.0: expected at least 1",
        ),
        (["--model.implementation", "fast"], "model.implementation='fast': .*'xla'"),
        (["--model.windows", "['64']"], r"model.windows=\['64'\]: expected a list"),
        (["--model.windows", "[64"], r"model.windows=\[64: expected a list"),
        (["--steps", ""], "steps='': expected an integer"),
        (["--validation.batches", ""], "validation.batches='': expected an integer or null"),
        (["--steps", "0"], "steps=0: expected an integer from 1"),
        (["--steps", "3000000000"], r"steps=3000000000: expected an integer from 1 to 2\*\*31 - 1"),
        (["--batch_size", "0"], "batch_size=0: expected an integer from 1"),
        (["--batch_size", "-8"], "batch_size=-8: expected an integer from 1"),
        (["--grad_accumulation", "0"], "grad_accumulation=0: expected an integer from 1"),
        (["--context", "1"], "context=1: expected an integer from 2"),
        (["--runs_directory", ""], "runs_directory='': expected a folder"),
        (["--compilation_cache", ""], "compilation_cache='': expected a folder, or null"),
        (["--name", ""], "name='': expected letters"),
        (["--data.directory="], "data.directory='': expected a folder"),
        (["--data.input", "['']"], r"data.input=\('',\): expected files"),
        (["--data.tokenizer", ""], "data.tokenizer='': expected bytes, bpe:N or a file"),
        (["--data.tokenizer", "bpe:many"], "data.tokenizer='bpe:many': expected bpe:N"),
        (["--data.tokenizer", "bpe:257"], "data.tokenizer='bpe:257': .* ≥ 258"),
        (["--model.rope_scaling.factor", ".nan"], "model.rope_scaling.factor=nan"),
        (["--model.rope_scaling.high_frequency_factor", ".inf"], "model.rope_scaling: .* inf"),
        (["--compilation_cache", "# a"], "compilation_cache='# a': reads as null"),
        (["--profile.steps", "301:302"], "profile.steps='301:302': .*steps=300"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    file: str, arguments: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_command_line(["--config", file, *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("saves", "passes", "more"),
    [
        ("16", "8", []),
        ("8", "8", []),
        ("null", "8", []),
        ("1000", "8", ["--steps", "1000"]),  # the last step is saved and validated anyway
        ("10", "8", ["--checkpoint.keep_best", "0"]),
    ],
)
def test_checkpoints_that_can_all_be_ranked_are_no_news(
    file: str, saves: str, passes: str, more: list[str]
) -> None:
    steps = ["--checkpoint.every_steps", saves, "--validation.every_steps", passes]
    assert parse_command_line(["--config", file, *steps, *more]).warnings() == []


def test_checkpoints_that_cannot_be_ranked_are_told_at_the_start(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps = ["--checkpoint.every_steps", "10", "--validation.every_steps", "8"]
    rest = ["--data.directory", str(tmp_path / "absent"), "--compilation_cache", "null"]
    assert pretrain.main(["--config", file, *steps, *rest]) == pretrain.EXIT_BAD_INPUT
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line.startswith("warning: checkpoint.keep_best=1 ")
    assert "checkpoint.every_steps=10 and validation.every_steps=8" in line
    assert "every 40 steps and the last" in line and line.endswith("such as 16")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps: 4", "key 'steps' is given twice, in lines 2 and 9"),
        ("optimizer: {b1: 0.1, b1: 0.2}", "key 'b1' is given twice"),
        ("colour: red", "unknown key 'colour'"),
        ("optimizer: {beta: 0.1}", "unknown key 'optimizer.beta'"),
        ("seed: null", "seed=null: expected an integer"),
        ("optimizer: {b1: null}", "optimizer.b1=null: expected a number"),
        ("seed: 1.5", "seed=1.5: expected an integer"),
        ("sample: {prompt: 3}", "sample.prompt=3: expected text"),
        ('seed: "1"', "seed='1': expected an integer"),
        ("seed: -010", "seed='-010': expected an integer"),
        ("seed: true", "seed=true: expected an integer"),
        ("seed: 12:30", "seed='12:30': expected an integer"),
        ('optimizer: {b1: "0.5"}', "optimizer.b1='0.5': expected a number"),
        ("optimizer: {b1: false}", "optimizer.b1=false: expected a number"),
        ('optimizer: {clip_norm: "1"}', "optimizer.clip_norm='1': expected a number or null"),
        ('log: {tensorboard: "true"}', "log.tensorboard='true': expected true or false"),
        ("log: {tensorboard: 1}", "log.tensorboard=1: expected true or false"),
        ('mesh: {data: "2"}', "mesh.data='2': expected an integer or auto"),
        ("mesh: {data: automatic}", "mesh.data=automatic: expected an integer or auto"),
        ("resume: [auto]", r"resume=\[auto\]: expected auto or never or must"),
        ("runs_directory: 3.0", "runs_directory=3.0: expected text"),
        ("optimizer: []", r"optimizer=\[\]: expected keys and values"),
        ("mesh: 3", "mesh=3: expected keys and values"),
        ("mesh:", "mesh=null: expected keys and values"),
        ("log: {every_steps: 1e1}", "log.every_steps=10.0: expected an integer"),
        ("- a", "not YAML"),
        ("? [seed]\n: 1", "line 9: expected a key's name"),
        ("mesh.data: 3", "unknown key 'mesh.data': sections are nested"),
        ("data: {directory: null}", "key 'data' is given twice"),
        ("profile: {steps: 15:10}", "profile.steps='15:10'"),
    ],
)
def test_bad_files_are_refused_in_one_line(file: str, line: str, expected: str) -> None:
    Path(file).write_text(f"{FILE}{line}\n")
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_command_line(["--config", file])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ('windows: ["64"]', r"model.windows=\['64'\]: expected a list, .* integer or full"),
        ("windows: [64.0]", r"model.windows=\[64.0\]: expected a list"),
        ('qk_norm: "false"', "model.qk_norm='false': expected true or false"),
        ('rope_scaling: {factor: "2"}', "model.rope_scaling.factor='2': expected a number"),
        ("rope_scaling: {low_frequency_factor: 5}", "model.rope_scaling: expected 0 < low_fr"),
    ],
)
def test_bad_models_of_files_are_refused_in_one_line(file: str, model: str, expected: str) -> None:
    Path(file).write_text(FILE.replace("num_slots: 32", model))
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_command_line(["--config", file])
    assert "\n" not in str(caught.value)


def test_integers_are_numbers_and_dates_are_text(file: str) -> None:
    Path(file).write_text(f"{FILE}optimizer: {{clip_norm: 2}}\nruns_directory: 2026-01-31\n")
    config = parse_command_line(["--config", file, "--optimizer.weight_decay", "0"])
    assert (config.optimizer.clip_norm, config.optimizer.weight_decay) == (2.0, 0.0)
    assert config.runs_directory == "2026-01-31"


def test_the_command_line_changes_sections_that_a_file_has_or_has_not(file: str) -> None:
    given = {
        "model.rope_scaling.factor": "2",
        "data.input": "[stdlib, 'a b']",
        "data.num_workers": "3",
        "sample.prompt": "# 1",
        "profile.steps": "2:3",
        "mesh.data": "auto",
        "compilation_cache": "null",
    }
    config = parse_command_line(["--config", file, *(f"--{k}={v}" for k, v in given.items())])
    assert config.model.rope_scaling.factor == 2.0 and config.model.num_slots == 32
    assert config.data.input == ("stdlib", "a b") and config.data.num_workers == 3
    assert config.data.directory == "data/small"
    assert (config.sample.prompt, config.profile.bounds) == ("# 1", (2, 3))
    assert (config.mesh.data, config.compilation_cache) == ("auto", None)


@pytest.mark.parametrize("name", ["null", "[nano]", "huge"])
def test_bad_presets_of_files_are_refused_in_one_line(file: str, name: str) -> None:
    Path(file).write_text(FILE.replace("preset: nano", f"preset: {name}"))
    with pytest.raises(ConfigError, match=r"model.preset=.*: expected one of nano") as caught:
        parse_command_line(["--config", file])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: small", "name: null", "name=null: expected text"),
        ("steps: 300", "steps:", "steps=null: expected an integer"),
        ("directory: data/small", "directory: ~", "data.directory=null: expected text"),
        ("learning_rate: 1e-3", "learning_rate: null", "schedule.learning_rate=null: .* number"),
        ("steps: 300\n", "", "required: steps"),
        ("learning_rate: 1e-3, ", "", "required: schedule.learning_rate"),
    ],
)
def test_required_values_that_are_null_or_absent(
    file: str, old: str, new: str, expected: str
) -> None:
    assert FILE.count(old) == 1
    Path(file).write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_command_line(["--config", file])
    assert "\n" not in str(caught.value)


def test_steps_of_a_profile_are_a_range_in_files_too(file: str) -> None:
    """YAML 1.1 would read 10:15 as 615."""
    Path(file).write_text(f"{FILE}profile: {{steps: 10:15}}\n")
    config = parse_command_line(["--config", file])
    assert config.profile.bounds == (10, 15)
    assert config_from_dict(yaml.safe_load(config.to_yaml())) == config


def test_what_must_be_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"required: name, .*model.width") as caught:
        parse_command_line(["--steps", "3"])
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_program_refuses_before_jax_starts_its_backends(file: str) -> None:
    script = (
        "import sys\n"
        "import train.pretrain\n"
        "from jax._src import xla_bridge\n"
        f"status = train.pretrain.main(['--config', {file!r}, '--mesh.data', '3'])\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: batch_size=16 is not divisible")
    assert "Traceback" not in done.stderr
