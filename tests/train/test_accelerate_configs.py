"""The ready accelerate configurations: accelerate reads each, and none asks for an engine that the scripts refuse."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from ldm_runs import ROOT

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.sharding import refuse_other_sharding

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert not config.fsdp_config
    assert not config.deepspeed_config
    assert config.num_processes == {"one_gpu": 1, "ddp_8gpu_bf16": 8, "multi_node_bf16": 32}[path.stem]


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_other_engines_are_refused_with_the_remedy(monkeypatch, engine):
    refuse_other_sharding()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=r"--sharding zero3 \(or zero2\)"):
        refuse_other_sharding()
