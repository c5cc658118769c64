"""The training loop, on a regression small enough to run hundreds of steps in a second."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from iptv2_diffusion.data.draws import generator_for, own_slices
from iptv2_diffusion.training.accelerator import make_accelerator
from iptv2_diffusion.training.cuda_graphs import PositionalCall, wants_graphs
from iptv2_diffusion.training.errors import ConfigError, NonFiniteLossError
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.loop import Outcome, Trainer
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.parsing import parse_config
from iptv2_diffusion.training.training_task import TrainingTask


class Regression(TrainingTask):
    """y = 3x; batches are a function of the step. `at_step` may do something to the run."""

    def __init__(self, config, at_step=None):
        self.config, self.at_step = config, at_step or (lambda step, model: None)
        self.slices = own_slices(config.batch_size, 1, 0, config.gradient_accumulation_steps)

    def micro_batches(self, step):
        x = torch.randn(self.config.batch_size, 4, generator=generator_for(self.config.seed, step))
        return [x[part] for part in self.slices]

    def loss(self, model, batch):
        self.at_step(self.steps, model)
        return (model(batch) - 3 * batch).square().mean()

    def evaluate(self, model, step, last, interrupt):
        return {"heldout_loss": (model(torch.ones(1, 4)) - 3).square().mean().item()}


def start(tmp_path, name="run", at_step=None, scaler=None, **options):
    defaults = {"max_train_steps": 8, "batch_size": 8, "checkpoint_every": 2, "eval_every": 4, "log_every": 1}
    defaults |= {"report_to": "none", "learning_rate": 1e-2, "num_threads": 1, "preview_every": 0}
    config = TrainingConfig(output_dir=str(tmp_path / name), **{**defaults, **options})
    torch.manual_seed(0)
    accelerator = make_accelerator(config)
    if scaler is not None:  # accelerate refuses fp16 on a CPU, but torch supports autocast and loss scaling there
        accelerator.state._mixed_precision, accelerator.native_amp, accelerator.scaler = "fp16", True, scaler
    trainer = Trainer(config, accelerator, torch.nn.Sequential(torch.nn.Linear(4, 4)))
    task = Regression(config, at_step)
    type(task).steps = property(lambda self: trainer.step)
    trainer.resume()
    return trainer, task


def run(*arguments, **options):
    trainer, task = start(*arguments, **options)
    trainer.fit(task)
    return trainer


def snapshot(trainer):
    return trainer.state.snapshot()


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rows(trainer):
    """The log without fields that depend on the clock."""
    timing = ("time", "seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(trainer.metrics.path)]


def test_it_learns_and_logs(tmp_path):
    trainer = run(tmp_path, max_train_steps=200, learning_rate=5e-2, checkpoint_every=100)
    log = rows(trainer)
    assert log[-2]["loss"] < 0.01 * log[0]["loss"]
    assert [row["step"] for row in log if "heldout_loss" in row] == list(range(4, 201, 4))
    trainer.finish()
    assert (trainer.output_dir / "loss_curve.png").stat().st_size > 0
    assert (trainer.output_dir / "config.yaml").is_file()


@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_resume_is_exact_in_weights_optimiser_average_and_log(tmp_path, stop_at):
    whole = run(tmp_path, "whole")
    run(tmp_path, "half", max_train_steps=stop_at)
    resumed = run(tmp_path, "half")
    assert equal(snapshot(whole), snapshot(resumed))
    evaluated = {4, 8}  # a run that ends at 3 also evaluates there
    assert [r for r in rows(resumed) if r["step"] in evaluated or "loss" in r] == rows(whole)


def test_a_changed_number_of_images_is_reported(tmp_path, capsys):
    for images, told in ((20, ""), (20, ""), (19, "the data has 19 images instead of 20")):
        trainer, task = start(tmp_path, max_train_steps=8 if told else 4)
        task.images = images
        trainer.fit(task)
        assert (told in capsys.readouterr().out) if told else ("images instead of" not in capsys.readouterr().out)


def test_a_task_needs_only_batches_and_a_loss(tmp_path):
    """The defaults of `TrainingTask`: no figures, no pictures, no position."""

    class Bare(TrainingTask):
        micro_batches, loss, steps = Regression.micro_batches, Regression.loss, 0

        def __init__(self, task):
            vars(self).update(vars(task))

    trainer, task = start(tmp_path, preview_every=2)
    assert trainer.fit(Bare(task)) is Outcome.FINISHED
    assert not any("heldout_loss" in row for row in rows(trainer))
    assert equal(snapshot(trainer), snapshot(run(tmp_path, "whole")))
    assert trainer.checkpoints.latest().progress.keys() == {"seconds", "skipped", "due", "images"}
    with pytest.raises(TypeError, match="abstract"):
        TrainingTask()


def test_a_finished_run_does_nothing_more(tmp_path):
    whole = run(tmp_path)
    before = snapshot(whole)
    again = run(tmp_path)
    assert (again.step, equal(snapshot(again), before)) == (8, True)


def test_accumulation_equals_the_large_batch(tmp_path):
    large, small = (run(tmp_path, str(n), gradient_accumulation_steps=n) for n in (1, 4))
    for name, value in snapshot(large).items():
        assert torch.allclose(value, snapshot(small)[name], atol=1e-6), name
    for left, right in zip(rows(large), rows(small), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_nan_stops_before_the_weights_with_the_step_and_keeps_the_checkpoint(tmp_path):
    def poison(step, model):
        if step == 5:
            with torch.no_grad():
                model[0].bias.fill_(torch.nan)

    trainer, task = start(tmp_path, at_step=poison)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 6.*checkpoint-00000004 is kept") as caught:
        trainer.fit(task)
    assert "\n" not in str(caught.value)
    assert trainer.checkpoints.latest().step == 4
    assert torch.isfinite(trainer.state.averaged_state_dict()["0.bias"]).all()


def test_an_infinite_gradient_stops_too(tmp_path):
    def explode(step, model):
        if step == 1:
            model[0].bias.register_hook(lambda gradient: gradient * torch.inf)

    trainer, task = start(tmp_path, at_step=explode)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is .* at step 2.*no checkpoint yet"):
        trainer.fit(task)


def spoil(*steps):
    """Make the gradient of these steps NaN."""

    def at_step(step, model):
        for hook in list(model[0].bias._backward_hooks or ()):
            del model[0].bias._backward_hooks[hook]
        if step in steps:
            model[0].bias.register_hook(lambda gradient: gradient * torch.nan)

    return at_step


def test_skipped_steps_touch_nothing_are_counted_and_survive_resumption(tmp_path, capsys):
    trainer, task = start(tmp_path, at_step=spoil(2, 3, 6), max_skipped_steps=2, max_train_steps=4)
    seen = {}
    step = trainer.train_step

    def watched(*arguments):
        before, at = snapshot(trainer), trainer.step
        values = step(*arguments)
        seen[at] = equal(before, snapshot(trainer))
        return values

    trainer.train_step = watched
    assert trainer.fit(task) is Outcome.FINISHED
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert capsys.readouterr().out.count(": skipped") == 2
    resumed, task = start(tmp_path, at_step=spoil(6), max_skipped_steps=2, max_train_steps=8)
    assert (resumed.skipped.total, resumed.skipped.in_a_row) == (2, 2)
    resumed.fit(task)
    assert [row.get("skipped_steps", 0) for row in rows(resumed) if "loss" in row] == [0, 0, 1, 2, 2, 2, 3, 3]


def test_too_many_skipped_steps_in_a_row_stop(tmp_path):
    trainer, task = start(tmp_path, at_step=spoil(3, 4, 5), max_skipped_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"at step 6: stopped after 2 skipped steps .*00000004 is kept"):
        trainer.fit(task)


def test_overflows_of_fp16_are_counted_and_leave_weights_and_average_alone(tmp_path, capsys):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer, task = start(tmp_path, scaler=scaler, max_train_steps=40, eval_every=20)
    trainer.fit(task)
    overflows = trainer.skipped.total
    assert 1 <= overflows < 15
    assert scaler.get_scale() == 2.0 ** (24 - overflows)
    assert trainer.state.averaged_steps == 40 - overflows
    assert capsys.readouterr().out.count("fp16 overflows") == overflows
    first, last = (row["heldout_loss"] for row in rows(trainer) if "heldout_loss" in row)
    assert last < first


def test_endless_overflows_of_fp16_stop(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=0.999)
    trainer, task = start(tmp_path, scaler=scaler, max_train_steps=50)
    with pytest.raises(NonFiniteLossError, match=r"fp16 overflows.* at step 31: stopped after 30 skipped steps"):
        trainer.fit(task)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_save_and_exit_and_the_run_resumes_exactly(tmp_path, capsys, name):
    def send(step, model):
        if step == 4:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(signal.SIGTERM)
    trainer, task = start(tmp_path, at_step=send, checkpoint_every=0)
    assert trainer.fit(task) is Outcome.STOPPED
    assert f"stopped by {name} at step" in capsys.readouterr().out
    assert trainer.step in (5, 6)  # the flag is read once a step, after the loss
    assert trainer.checkpoints.latest().step == trainer.step
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = run(tmp_path, checkpoint_every=0)
    assert equal(snapshot(resumed), snapshot(run(tmp_path, "whole")))


@pytest.mark.parametrize("when", ["in the step", "in its evaluation"])
@pytest.mark.parametrize("at", [4, 8])  # 8: the last
def test_a_stop_leaves_the_evaluation_of_its_step_for_later(tmp_path, capsys, at, when):
    whole = run(tmp_path, "whole")

    def send(step, model):
        if step == at - 1 and when == "in the step":
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, task = start(tmp_path, at_step=send)

    def evaluate(model, step, last, interrupt):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            interrupt()
        return Regression.evaluate(task, model, step, last, interrupt)

    task.evaluate = evaluate
    assert trainer.fit(task) is Outcome.STOPPED
    assert f"stopped by SIGTERM at step {at}" in capsys.readouterr().out
    assert trainer.step == trainer.checkpoints.latest().step == at
    assert not any("heldout_loss" in row for row in rows(trainer) if row["step"] == at)
    for _ in range(2):  # the second finds the run finished
        resumed = run(tmp_path)
        assert rows(resumed) == rows(whole)
        assert equal(snapshot(resumed), snapshot(whole))


def test_a_time_budget_ends_the_run_and_its_schedule(tmp_path):
    options = {"max_train_steps": 10**6, "max_train_minutes": 0.02, "lr_schedule": "linear", "log_every": 10}
    trainer = run(tmp_path, checkpoint_every=0, eval_every=0, **options)
    assert 10 < trainer.step < 10**6
    assert trainer.seconds == pytest.approx(1.2, rel=0.3)
    assert rows(trainer)[-1]["lr"] < 0.05 * rows(trainer)[0]["lr"]
    assert run(tmp_path, checkpoint_every=0, **options).step == trainer.step  # finished: nothing more to do


def test_overwrite_starts_again_once(tmp_path):
    run(tmp_path)
    trainer, _ = start(tmp_path, overwrite=True)
    assert trainer.step == 0
    saved = parse_config(TrainingConfig, ["--config", str(trainer.output_dir / "config.yaml")])
    assert saved == dataclasses.replace(trainer.config, overwrite=False)  # the file can be used again


def test_the_resume_check_of_a_dry_run(tmp_path):
    trainer = run(tmp_path)
    trainer.check_resume()
    trainer.step += 1
    with pytest.raises(RuntimeError, match="no checkpoint of step 9"):
        trainer.check_resume()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 8 does not divide over 1 processes x 3 micro-batches; use 9"):
        start(tmp_path, gradient_accumulation_steps=3)


def test_graphs_of_a_gpu_are_left_out_on_a_cpu(tmp_path, capsys):
    trainer = run(tmp_path, cuda_graphs=True)
    assert "cuda_graphs is on, but this run is on cpu: nothing is recorded" in capsys.readouterr().out
    assert rows(trainer)[-2]["loss"] < rows(trainer)[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1, not 2"),
        ({"gradient_checkpointing": True}, "does not work with gradient_checkpointing"),
        ({"torch_compile": True}, "does not work with torch_compile"),
    ],
)
def test_graphs_refuse_what_they_would_do_wrong(options, message):
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    assert wants_graphs(TrainingConfig(cuda_graphs=True), gpu)
    assert not wants_graphs(TrainingConfig(), gpu)
    with pytest.raises(ConfigError, match=message):
        wants_graphs(TrainingConfig(cuda_graphs=True, **options), gpu)
    with pytest.raises(ConfigError, match="one process, not 2"):
        wants_graphs(TrainingConfig(cuda_graphs=True), SimpleNamespace(device=torch.device("cuda"), num_processes=2))


def test_a_positional_call_equals_the_call_by_keyword():
    class Told(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    x, t, c = (torch.full((1,), float(value)) for value in range(3))
    call = PositionalCall(Told(), (1, "timestep", 0), {"return_dict": False, 2: "constant"})
    assert call(x, t, c) == ((c, x, "constant"), {"timestep": t, "return_dict": False})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_weights(tmp_path, precision):
    trainer = run(tmp_path, mixed_precision=precision)
    assert all(value.dtype == torch.float32 for value in trainer.state.module.state_dict().values())
    assert rows(trainer)[-2]["loss"] < rows(trainer)[0]["loss"]
