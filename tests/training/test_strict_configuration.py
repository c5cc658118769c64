"""Ambiguous configurations are refused with their line; properties of accepted configurations."""

import json
import math
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iptv2_diffusion.models.presets import create_model
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.restoration.config import RestorationConfig
from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_json, read_yaml
from iptv2_diffusion.training.errors import UserError
from iptv2_diffusion.training.parsing import parse_config

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


LAUGHS = "".join(f"{n}: &{n} [{', '.join([f'*{name}'] * 10)}]\n" for name, n in zip("abcdef", "bcdefg", strict=True))


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: 1\nbatch_size: 2\nseed: 3", "line 3: 'seed' is given twice, first in line 1"),
            ("a:\n  b: 1\n  b: 1", "line 3: 'b' is given twice, first in line 2"),
            ("seed: 010", "line 1: 010 would be read as an octal number"),
            ("\nseed: -07", "line 2: -07 would be"),
            ("time: 1:30", "line 1: 1:30 would be read as a number to base 60"),
            ("learning_rate: .nan", r"line 1: \.nan is not a finite number"),
            ("learning_rate: -.INF", r"line 1: -\.INF is not a finite number"),
            ("x: [1, [.inf]]", "line 1"),
            ("seed: " + "9" * 5000, "a number has 5000 digits"),
            ("? [1]\n: 2", "cannot be a name|cannot be read|unhashable"),
            ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
            ("a: &x [*x]", "anchor|alias|cannot be read|found"),
            ("[" * 3000, "expected|cannot be read"),
            ("a: &a [x, x]\n" + LAUGHS, "repeats anchors to more than 100000"),
            ("a: &a [*a]", "recursive"),
            ("\tseed: 1", "cannot start any token"),
            ("seed: 1\n---\nseed: 2", "expected a single document"),
        ],
    )
    def test_refused_with_the_line(self, text, message):
        with pytest.raises(StrictSyntaxError, match=message) as caught:
            read_yaml(text)
        assert "\n" not in str(caught.value)

    def test_valid_configurations_are_read_as_by_the_library(self):
        text = "a: 0\nb: -1\nc: 1.5\nd: [1, 2]\ne: {x: 0x10, y: '010'}\nf: &n {z: 1}\ng: {<<: *n, w: 2}\nh: 1_000\ni: ~"
        assert read_yaml(text) == yaml.safe_load(text)

    @quick
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    )
    def test_what_was_written_is_read_back(self, value):
        assert read_yaml(yaml.safe_dump(value)) == value
        assert read_json(json.dumps(value)) == value

    @quick
    @given(st.text())
    def test_any_text_is_read_or_refused(self, text):
        for read in (read_yaml, read_json):
            try:
                read(text)
            except StrictSyntaxError as error:
                told = str(error)
            else:
                continue
            assert "\n" not in told
            assert told


class TestJson:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": 1, "a": 2}', "'a' is given twice"),
            ('{"a": NaN}', "NaN is not a finite number"),
            ('{"a": -Infinity}', "-Infinity is not a finite"),
            ('{"a": 1e999}', "1e999 is not a finite"),
            ("[" * 100_000, "nested too deeply"),
            ("{", "not JSON"),
        ],
    )
    def test_refused(self, text, message):
        with pytest.raises(StrictSyntaxError, match=message):
            read_json(text)


CONFIGS = [LDMConfig, VAEConfig, RestorationConfig]


class TestOptions:
    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "NaN", "Infinity"])
    @pytest.mark.parametrize("name", ["learning_rate", "ema_decay", "max_train_minutes", "weight_decay"])
    def test_numbers_are_finite_on_the_command_line(self, name, value):
        with pytest.raises(UserError, match=rf"{name} is .*; it must be a finite number"):
            parse_config(LDMConfig, [f"--{name}={value}"])

    def test_leading_zeros(self, tmp_path):
        with pytest.raises(UserError, match="seed is '010'; write it without leading zeros"):
            parse_config(LDMConfig, ["--seed", "010"])
        (tmp_path / "c.yaml").write_text("batch_size: 4\nseed: 010\n")
        with pytest.raises(UserError, match=r"c\.yaml, line 2: 010 would be read as an octal number"):
            parse_config(LDMConfig, ["--config", str(tmp_path / "c.yaml")])
        assert parse_config(LDMConfig, ["--seed", "0", "--learning_rate", "0.001"]).seed == 0

    @pytest.mark.parametrize("text", ["2024-01-01", "2024-01-01 10:00:00", "1.10", "0x10", "1_000", "1.50e+3"])
    def test_text_is_kept_as_it_is_written(self, tmp_path, text):
        (tmp_path / "c.yaml").write_text(f"output_dir: {text}\nseed: 0x10\nlearning_rate: 1.10\nrevision: {text}\n")
        config = parse_config(LDMConfig, ["--config", str(tmp_path / "c.yaml")])
        assert (config.output_dir, config.revision, config.seed, config.learning_rate) == (text, text, 16, 1.1)

    def test_home_folders(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "c.yaml").write_text("seed: 7\n")
        assert parse_config(LDMConfig, ["--config", "~/c.yaml"]).seed == 7

    @pytest.mark.parametrize("config", CONFIGS)
    @quick
    @given(st.data())
    def test_any_value_of_any_option_is_accepted_or_refused_in_one_line(self, config, data):
        import dataclasses

        name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(config)]))
        value = data.draw(
            st.one_of(
                st.integers().map(str),
                st.floats().map(str),
                st.text(st.characters(codec="utf-8"), max_size=20),
                st.sampled_from(
                    ["none", "true", "[]", "{}", "[1,2]", "0", "-1", "1,2,3", ",", "[[]]", '{"a": 1}', "[null]"]
                ),
            )
        )
        try:
            parsed = parse_config(config, [f"--{name}={value}"])
        except UserError as error:
            told = str(error)
        else:
            values = dataclasses.asdict(parsed).values()
            assert all(math.isfinite(v) for v in values if isinstance(v, float))
            return
        assert told
        assert "\n" not in told.replace(repr(value), "").replace(value, "")


@dataclass
class Huge:
    values: dict


@pytest.mark.parametrize(
    "overrides",
    [
        {"channels": 10**12},
        {"channels": 10**6},
        {"layers_per_stage": (10**9, 1, 1)},
        {"layers_per_stage": (9000, 9000, 1)},
        {"channels": 1 << 19},
        {"window_size": 10**30},
        {"channels": -8},
        {"channels": 0},
        {"channels": "many"},
        {"num_attention_heads": 0},
        {"window_size": 0},
        {"layers_per_stage": ()},
        {"layers_per_stage": None},
        {"ffn_ratio": float("nan")},
        {"sample_size": 10**9},
        {"conditioning_dim": 10**15},
    ],
)
def test_model_overrides_that_exceed_any_memory(overrides):
    with pytest.raises((ValueError, TypeError)) as caught:
        create_model("tiny", **overrides)
    assert "\n" not in str(caught.value)
