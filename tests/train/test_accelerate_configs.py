"""The shipped accelerate configurations: accelerate reads each, and none uses an engine that the scripts refuse."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from ldm_runs import ROOT

from iptv2_diffusion.training.accelerator import resolve_sharding
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.sharding import launcher_options

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert not config.fsdp_config
    assert not config.deepspeed_config
    assert config.num_processes == {"one_gpu": 1, "ddp_8gpu_bf16": 8, "multi_node_bf16": 32}[path.stem]


@pytest.fixture
def launcher(monkeypatch):
    """Set the variables in which `accelerate launch` passes its options."""

    def ask(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return ask


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_other_engines_are_refused_with_the_remedy(launcher, engine):
    assert launcher_options() == {}
    launcher(**{f"ACCELERATE_USE_{engine}": "true"})
    with pytest.raises(ConfigError, match=r"--sharding zero3 \(or zero2\)"):
        launcher_options()


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {"sharding": "zero3"}),
        ({"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {"sharding": "zero3"}),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"sharding": "zero2"}),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {"sharding": "zero3", "sharded_checkpoints": True}),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"sharding": "zero3", "gradient_checkpointing": True}),
    ],
)
def test_fsdp2_of_accelerate_is_our_sharding(launcher, asked, options):
    launcher(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", **asked)
    assert launcher_options() == options
    config = TrainingConfig(sharding="zero2")
    assert resolve_sharding(config) == TrainingConfig(sharding="zero2")  # the run's own option takes precedence


def test_fsdp2_of_accelerate_becomes_the_run_s_configuration_and_leaves_accelerate(launcher, capsys):
    launcher(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    assert resolve_sharding(TrainingConfig()) == TrainingConfig(sharding="zero3")
    assert "--sharding zero3" in capsys.readouterr().out
    assert launcher_options() == {}  # accelerate finds nothing to shard either


def test_parameters_on_the_cpu_are_refused(launcher):
    launcher(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="true")
    with pytest.raises(ConfigError, match="leave --fsdp_offload_params out"):
        launcher_options()
