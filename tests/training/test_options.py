"""The run configuration: precedence, types, errors that name the remedy, and what may change on resumption."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from iptv2_diffusion.evaluation.generation_options import GenerationConfig
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.restoration.config import RestorationConfig
from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import Range, TrainingConfig, frozen_fields, option, save_config
from iptv2_diffusion.training.parsing import parse_config


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    data: str = option("photos", "images", group="data")
    size: int | tuple[int, int] = option(64, "pixels", group="data", at_least=1)
    names: tuple[str, ...] = option(("a", "b"), "names", group="data", nonempty=True)
    extra: dict = option({}, "overrides", group="data")  # noqa: RUF009
    kind: Literal["no", "some"] = option("some", "a choice", group="data")
    limit: float | None = option(None, "perhaps", group="data", free=True)
    source: str | None = option("here", "perhaps", group="data", free=True)


def parse(*words, tmp_path=None, **values):
    if values:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        words = ("--config", str(path), *words)
    return parse_config(Config, words)


def test_defaults_yaml_and_command_line_in_this_order(tmp_path):
    config = parse("--batch_size", "8", tmp_path=tmp_path, batch_size=16, seed=5)
    assert (config.batch_size, config.seed, config.data) == (8, 5, "photos")


def test_later_yaml_wins(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"seed: {seed}")
    assert parse("--config", str(tmp_path / "a"), "--config", str(tmp_path / "b")).seed == 2


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=3e-4"], "learning_rate", 3e-4),
        (["--dry_run"], "dry_run", True),
        (["--channels_last", "false"], "channels_last", False),
        (["--size", "48"], "size", 48),
        (["--size", "48,64"], "size", (48, 64)),
        (["--extra", '{"channels": 8}'], "extra", {"channels": 8}),
        (["--limit", "2"], "limit", 2.0),
        (["--limit", "none"], "limit", None),
        (["--data", "2024"], "data", "2024"),
        (["--max_train_steps", "1e3"], "max_train_steps", 1000),
        (["--kind", "no"], "kind", "no"),
    ],
)
def test_words_become_values(words, name, value):
    result = getattr(parse(*words), name)
    assert result == value
    assert type(result) is type(value)


def test_yaml_1_1_traps(tmp_path):
    """YAML reads 1e-4 as a word and a bare no as false; here both mean what they look like."""
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-4\nkind: no\n")
    config = parse_config(Config, ["--config", str(path)])
    assert config.learning_rate == 1e-4
    assert config.kind == "no"


@pytest.mark.parametrize("word", ["none", "None", "null", "~", ""])
def test_none_is_none_in_yaml_and_on_the_command_line(tmp_path, word):
    path = tmp_path / "config.yaml"
    path.write_text(f"limit: {word}\nsource: {word}\ndata: none\n")
    config = parse_config(Config, ["--config", str(path)])
    assert (config.limit, config.source, config.data) == (
        None,
        None,
        "none",
    )  # `data` must be a word, so none is a word
    assert parse("--source", word).source is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batchsize", "3"], "did you mean batch_size"),
        (["--learning_rate", "fast"], "learning_rate is 'fast'; it must be NUMBER"),
        (["--max_train_steps", "1.5"], "must be INT"),
        (["--kind", "many"], "choose one of no, some"),
        (["--extra", "{oops"], "is not JSON"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--ema_decay", "1"], r"must be in \[0, 1\)"),
        (["--adam_beta2", "1.5"], r"adam_beta2 is 1.5; it must be in \[0, 1\)"),
        (["--max_grad_norm", "-1"], "max_grad_norm is -1.0; it must be at least 0"),
        (["--ema_power", "0"], "ema_power is 0.0; it must be above 0"),
        (["--size", "64,0"], "size is 64,0; each must be at least 1"),
        (["--names", ""], "names is empty; give at least one"),
        (["--num_threads", "0"], "num_threads is 0; it must be at least 1, or none"),
        (["--size", "wide"], r"size is 'wide'; it must be INT\|INT,INT"),
        (["--size", "1,2,3"], r"it must be INT\|INT,INT"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["stray"], "'stray'"),
    ],
)
def test_errors_are_one_line_and_name_the_remedy(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 3", "unknown option 'max_steps' in .*did you mean max_train_steps"),
        ("- a\n- b", "must hold `name: value` lines"),
        ("a: [1", "is not YAML"),
    ],
)
def test_errors_in_yaml_name_the_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_config(Config, ["--config", str(path)])


def test_saved_configuration_reads_back_equal(tmp_path):
    config = parse("--size", "48,64", "--extra", '{"a": [1, 2]}', "--limit", "0.5")
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == config


def test_length_and_paths_may_change_on_resumption_but_not_the_recipe():
    frozen = frozen_fields(parse())
    assert {"learning_rate", "seed", "batch_size", "data"} <= set(frozen)
    assert not {"max_train_steps", "output_dir", "log_every", "limit", "num_workers"} & set(frozen)


def test_a_configuration_never_changes_and_a_changed_copy_is_checked():
    config = parse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 8
    assert dataclasses.replace(config, batch_size=8).batch_size == 8
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        dataclasses.replace(config, batch_size=0)
    with pytest.raises(ConfigError, match="sharding does not work with fp16"):
        Config(sharding="zero2", mixed_precision="fp16")


@pytest.mark.parametrize(
    ("limits", "taken", "refused", "words"),
    [
        (Range(at_least=1), (1, 1.5, 10**9), (0, 0.999, -math.inf, math.nan), "be at least 1"),
        (Range(above=0), (1e-9, 5), (0, -1), "be above 0"),
        (Range(below=3), (-5, 2.9), (3, 4), "be below 3"),
        (Range(at_least=0, below=1), (0, 0.5), (-1e-9, 1), "be in [0, 1)"),
        (Range(above=0, at_most=1), (0.5, 1), (0, 1.1), "be in (0, 1]"),
        (Range(at_least=0, at_most=2**32 - 1), (0, 2**32 - 1), (-1, 2**32), "be in [0, 4294967295]"),
        (Range(), (-math.inf, 0, math.inf), (), ""),
    ],
)
def test_a_range_takes_what_it_says(limits, taken, refused, words):
    assert all(number in limits for number in taken)
    assert not any(number in limits for number in refused)
    assert str(limits) == words
    for number in refused:
        with pytest.raises(ConfigError) as caught:
            limits.check("x", (taken[0], number))
        assert str(caught.value) == f"x is {taken[0]:g},{number:g}; each must {words}"


@pytest.mark.parametrize("config", [LDMConfig, VAEConfig, RestorationConfig, GenerationConfig])
def test_every_option_says_what_it_is_in_a_whole_phrase(config):
    """Each help begins with a noun or a verb, so that it can be read without the option's name."""
    for field in dataclasses.fields(config):
        text = field.metadata["help"]
        assert len(text) > 8, field.name
        assert text.split()[0] not in {"of", "for", "at", "none:", "in", "as", "on", "such", "to"}, (field.name, text)


def test_mutable_defaults_are_not_shared():
    parse().extra["a"] = 1
    assert parse().extra == {}


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in vars(parse()))
    assert "[0.0001]" in text
