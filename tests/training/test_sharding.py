"""Sharded state on two real processes: saved states are complete, and loaded states are exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def main(folder):
    """Run by each process: save before and after steps, load into another model, continue."""
    import torch
    from accelerate import Accelerator

    from iptv2_diffusion.training.ema import ModelState
    from iptv2_diffusion.training.sharding import shard

    accelerator = Accelerator(cpu=True)

    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(20, 7))
        shard(model, accelerator, reshard_after_forward=True)
        groups = [[p for p in model.parameters() if (p.ndim == 1) == vectors] for vectors in (False, True)]
        decay = [{"params": group, "weight_decay": 0.1 / n} for n, group in enumerate(groups, start=1)]
        optimizer = torch.optim.AdamW(decay, lr=1e-2, fused=True)
        return model, optimizer, ModelState(accelerator, model, optimizer, decay=0.9)

    def train(run, steps):
        model, optimizer, state = run
        for seed in range(steps):
            torch.manual_seed(seed)
            model(torch.randn(2, 3, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state.step()

    def save(run):
        run[2]._save([], [], folder)
        accelerator.wait_for_everyone()

    def equal(one, other):
        left, right = one[2].snapshot(), other[2].snapshot()
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    first = make(0)
    save(first)
    assert all(state["step"] == 0 for state in first[1].state.values())  # saving is not an optimiser step
    train(first, 3)
    save(first)
    snapshot, saved = first[2].snapshot(), torch.load(f"{folder}/optimizer.bin", weights_only=True)
    for number, values in saved["state"].items():
        assert all(torch.equal(value, snapshot[f"optimizer.{number}.{name}"]) for name, value in values.items())
    assert len(saved["state"]) == 4
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]

    fresh, busy = make(1), make(2)
    train(busy, 1)
    for other in (fresh, busy):
        other[2]._load([], folder)
        assert equal(first, other)
    train(first, 2)
    train(busy, 2)
    assert equal(first, busy)
    print("exact", flush=True)


@pytest.mark.slow
def test_sharded_state_is_saved_whole_and_loaded_exactly(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("exact") == 2


if __name__ == "__main__":
    main(sys.argv[1])
