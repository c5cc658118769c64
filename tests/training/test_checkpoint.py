"""Checkpoints are complete or absent, and older ones survive damage, full disks and interrupted saves."""

import json
import resource
import signal

import pytest
import torch
from accelerate import Accelerator

from iptv2_diffusion.training.checkpoint import CheckpointManager, differing_fields, verify
from iptv2_diffusion.training.ema import ModelState
from iptv2_diffusion.training.errors import UserError

CONFIG = {"learning_rate": 1e-3, "model": "tiny"}


class Run:
    """A linear model with an optimiser and averaged weights, as a trainer holds them."""

    def __init__(self, folder, config=CONFIG, width=4):
        self.accelerator = Accelerator()
        model = torch.nn.Linear(width, width)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.state = ModelState(self.accelerator, self.model, decay=0.9)
        self.messages = []
        self.manager = CheckpointManager(folder, self.accelerator, config, keep_last=2, say=self.messages.append)

    def train(self, steps=1):
        for _ in range(steps):
            self.model(torch.ones(2, self.model.in_features)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.step()

    def tensors(self):
        moments = self.optimizer.state_dict()["state"]
        return [*self.model.state_dict().values(), *self.state.averaged_state_dict().values()] + [
            value for state in moments.values() for value in state.values()
        ]


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_checkpoint_restores_everything_bit_for_bit(tmp_path):
    first = Run(tmp_path)
    first.train(3)
    first.manager.save(3, {"seconds": 1.5})
    second = Run(tmp_path)
    assert not same(first.tensors(), [torch.zeros(1)])
    found = second.manager.latest()
    assert (found.step, found.progress) == (3, {"seconds": 1.5})
    second.train()  # the optimiser has state, which loading must replace
    second.manager.load(found)
    assert same(first.tensors(), second.tensors())
    first.train(2)
    second.train(2)
    assert same(first.tensors(), second.tensors())
    assert second.state.averages[0].optimization_step == 5


@pytest.mark.parametrize("reverse", [False, True])
def test_another_memory_format_on_resumption_changes_nothing(tmp_path, reverse):
    """Fused AdamW iterates over weights and moments in memory order: both must have the same layout."""
    runs, formats = [], (torch.channels_last, torch.contiguous_format)
    for memory_format in reversed(formats) if reverse else formats:
        torch.manual_seed(0)
        accelerator = Accelerator()
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        state = ModelState(accelerator, model, optimizer, decay=0.9)
        runs.append((model, optimizer, state, CheckpointManager(tmp_path, accelerator, CONFIG, state=state)))

    def train(model, optimizer, state, manager):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(2, 3, 5, 5, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    train(*runs[0])
    runs[0][3].save(3)
    runs[1][3].load(runs[1][3].latest())
    assert torch.allclose(train(*runs[0]), train(*runs[1]), atol=1e-5)


def test_the_last_k_are_kept_and_nothing_else_is_left(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2, 3, 4):
        run.manager.save(step)
    assert folders(tmp_path) == ["checkpoint-00000003", "checkpoint-00000004"]
    manifest = verify(tmp_path / "checkpoint-00000004")
    assert set(manifest["files"]) >= {"model.safetensors", "ema.safetensors", "optimizer.bin"}


def test_nothing_found_in_an_empty_or_missing_folder(tmp_path):
    assert Run(tmp_path).manager.latest() is None
    assert Run(tmp_path / "missing").manager.latest() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "no manifest"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_previous_one_used(tmp_path, damage):
    run = Run(tmp_path)
    run.manager.save(1)
    run.manager.save(2)
    weights, manifest = (tmp_path / "checkpoint-00000002" / name for name in ("model.safetensors", "manifest.json"))
    data = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(data[:-5])
    elif damage == "flip":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.unlink()
    assert run.manager.latest().step == 1
    assert folders(tmp_path) == ["checkpoint-00000001", "damaged-checkpoint-00000002"]
    assert "checkpoint-00000002 is damaged" in run.messages[0]
    run.manager.save(2)  # the run continues, and a second damaged checkpoint does not overwrite the first
    (tmp_path / "checkpoint-00000002" / "manifest.json").unlink()
    assert run.manager.latest().step == 1
    assert "damaged-checkpoint-00000002-1" in folders(tmp_path)


def test_a_manifest_that_is_not_ours_makes_a_damaged_checkpoint(tmp_path):
    run = Run(tmp_path)
    path = run.manager.save(1) / "manifest.json"
    whole = json.loads(path.read_text())
    name, entry = next(iter(whole["files"].items()))
    changes = [{"files": other} for other in (None, 3, [name], {name: None}, {name: {}}, {name: {"bytes": "1"}})]
    changes += [{"files": {name: {**entry, "sha256": None}}}, {"step": "1"}, {"step": None}, {"config": []}]
    changes += [{"progress": None}]
    contents = [b"null", b"[]", b"3", b"\xff", b"[" * 100_000, *(json.dumps({**whole, **c}).encode() for c in changes)]
    for content in contents:
        (tmp_path / "checkpoint-00000001").mkdir(exist_ok=True)
        path.write_bytes(content)
        assert run.manager.latest() is None, content[:60]
        run.manager.delete_all()
    assert len(folders(tmp_path)) == len(contents)  # set aside, none deleted
    assert "is damaged (its manifest.json cannot be read)" in run.messages[0]


def test_another_configuration_is_refused_with_the_fields(tmp_path):
    Run(tmp_path).manager.save(1)
    with pytest.raises(UserError, match=r"learning_rate is 0.001 there, 0.01 here.*--overwrite"):
        Run(tmp_path, {**CONFIG, "learning_rate": 1e-2}).manager.latest()
    assert folders(tmp_path) == ["checkpoint-00000001"]


def test_another_configuration_may_be_accepted_knowingly(tmp_path):
    Run(tmp_path).manager.save(1)
    run = Run(tmp_path, {**CONFIG, "learning_rate": 1e-2})
    run.manager.accept_changes = True
    assert run.manager.latest().step == 1
    assert "learning_rate is 0.001 there, 0.01 here" in run.messages[0]


def test_an_option_that_came_later_counts_as_its_default(tmp_path):
    Run(tmp_path).manager.save(1)
    run = Run(tmp_path, {**CONFIG, "new": 5})
    run.manager.defaults = {"new": 5}
    assert run.manager.latest().step == 1
    run.manager.defaults = {"new": 4}
    with pytest.raises(UserError, match="new is 4 there, 5 here"):
        run.manager.latest()


def test_fields_that_differ_are_named():
    assert differing_fields({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [
        "b is 2 there, 3 here",
        "c is None there, 4 here",
    ]


def test_another_model_is_refused_in_one_line(tmp_path):
    Run(tmp_path).manager.save(1)
    other = Run(tmp_path, width=5)
    with pytest.raises(UserError, match="does not fit this model"):
        other.manager.load(other.manager.latest())


def test_files_of_a_killed_save_are_removed(tmp_path):
    run = Run(tmp_path)
    run.manager.save(1)
    half = tmp_path / ".tmp-checkpoint-00000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert run.manager.latest().step == 1
    assert folders(tmp_path) == ["checkpoint-00000001"]


@pytest.mark.parametrize(
    "limit", [100, 4000]
)  # bytes per file: a limit within the weights, and one within the optimiser
def test_a_full_disk_leaves_older_checkpoints_whole(tmp_path, limit):
    """The operating system's limit on file sizes acts like a full disk: writes fail half-way with an error."""
    run = Run(tmp_path, width=20)
    run.train()
    run.manager.save(1)
    before = verify(tmp_path / "checkpoint-00000001")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot save checkpoint 2 .*older checkpoints are complete .*00000001"):
            run.manager.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert folders(tmp_path) == ["checkpoint-00000001"]
    assert verify(tmp_path / "checkpoint-00000001") == before
    run.manager.save(2)
    assert run.manager.latest().step == 2


def test_overwrite_deletes_every_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.manager.save(1)
    run.manager.delete_all()
    assert run.manager.latest() is None


def test_equal_states_give_equal_files(tmp_path):
    run = Run(tmp_path)
    run.train()
    run.manager.save(1)
    run.manager.save(2)
    files = [json.loads((tmp_path / f"checkpoint-0000000{i}" / "manifest.json").read_text())["files"] for i in (1, 2)]
    assert files[0] == files[1]


class TestWhatIsNotOurs:
    def test_rotation_and_overwrite_keep_foreign_files(self, tmp_path):
        """A folder named like a checkpoint, a note inside a checkpoint, and temporary files of other programs."""
        (tmp_path / "checkpoint-00000001").mkdir()
        (tmp_path / "checkpoint-00000001" / "holiday.png").write_bytes(b"mine")
        (tmp_path / ".tmp-mine").mkdir()
        run = Run(tmp_path)
        for step in (2, 3):
            run.manager.save(step)
        (tmp_path / "checkpoint-00000002" / "notes.txt").write_text("mine")
        run.manager.save(4)
        assert (tmp_path / "left-of-checkpoint-00000002" / "notes.txt").read_text() == "mine"
        assert (tmp_path / "checkpoint-00000001" / "holiday.png").read_bytes() == b"mine"
        run.manager.delete_all()
        assert (tmp_path / "checkpoint-00000001" / "holiday.png").read_bytes() == b"mine"
        assert (tmp_path / ".tmp-mine").is_dir()
        assert folders(tmp_path) == [".tmp-mine", "checkpoint-00000001", "left-of-checkpoint-00000002"]

    def test_a_foreign_file_at_the_place_of_a_new_checkpoint_is_moved_aside(self, tmp_path):
        (tmp_path / "checkpoint-00000005").mkdir()
        (tmp_path / "checkpoint-00000005" / "holiday.png").write_bytes(b"mine")
        Run(tmp_path).manager.save(5)
        assert verify(tmp_path / "checkpoint-00000005")["step"] == 5
        assert (tmp_path / "left-of-checkpoint-00000005" / "holiday.png").read_bytes() == b"mine"


@pytest.mark.parametrize("moment", ["save_state", "_seal"])
def test_a_second_ctrl_c_during_the_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, moment):
    run = Run(tmp_path)
    run.manager.save(1)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.accelerator if moment == "save_state" else run.manager, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.manager.save(2)
    assert folders(tmp_path) == ["checkpoint-00000001"]
    assert "saving checkpoint 2 was interrupted; complete checkpoints: checkpoint-00000001" in run.messages
    assert Run(tmp_path).manager.latest().step == 1
