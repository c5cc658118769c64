"""The roofline's counts against counts by hand on small graphs, and its command line."""

from __future__ import annotations

import json
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iptv2_diffusion.evaluation.machines import MACHINES, Machine, measure_this_machine
from iptv2_diffusion.evaluation.roofline import FORMS, Recorder, count, fuse
from iptv2_diffusion.evaluation.roofline_steps import make_on_meta, record
from iptv2_diffusion.kernels import triton_fcsa, triton_ggsa

SCRIPT = Path(__file__).parents[2] / "eval" / "roofline.py"
UNIT = Machine("unit", {"float32": 2.0}, vector_flops=2.0, bandwidth=1.0, launch=0.0)  # one MAC or one byte per second


def recorded(function, *shapes, **own):
    given = [torch.empty(shape, device="meta") for shape in shapes]
    with Recorder(**own) as recorder:
        function(*given)
    return recorder


def cost(recorder, form):
    return count(recorder, form, UNIT, "float32")


class TestFusion:
    def test_a_chain_of_pointwise_operators(self):
        """Eager: each reads and writes 100 numbers of 4 bytes, the sum reads two maps; fused: two in, one out."""
        step = recorded(lambda x, y: F.gelu(x * 2).exp() + y, (10, 10), (10, 10))
        assert (cost(step, "eager").nbytes, cost(step, "eager").launches) == (4 * 100 * (2 + 2 + 2 + 3), 4)
        assert (cost(step, "compiled").nbytes, cost(step, "compiled").launches) == (4 * 100 * 3, 1)

    def test_a_product_stays_alone(self):
        """(8, 4) @ (4, 16): 512 MACs. Neither what comes before nor after is part of it, but those two differ."""
        step = recorded(lambda x, w: ((2 * x) @ w).relu(), (8, 4), (4, 16))
        x, w, out = 4 * 32, 4 * 64, 4 * 128
        for form in ("eager", "compiled"):
            assert cost(step, form).nbytes == (2 * x) + (x + w + out) + (2 * out)
            assert (cost(step, form).macs, cost(step, form).launches) == (512, 3)

    def test_an_operator_that_needs_a_product_of_the_chains_result_ends_the_chain(self):
        """y = 2x; y @ w + y reads y again: the sum cannot be in y's kernel, which runs before the product."""
        step = recorded(lambda x, w: (y := 2 * x) @ w + y, (8, 8), (8, 8))
        assert cost(step, "compiled").launches == 3

    def test_a_norm_of_rows_is_fused_with_its_neighbours(self):
        """Residual, LayerNorm over the last axis and modulation: reads two maps and two rows, writes one map.

        Mean and variance of the rows are results too.
        """
        run = recorded(lambda x, y, a, b: F.layer_norm(x + y, (8,)) * a + b, (5, 8), (5, 8), (8,), (8,))
        assert cost(run, "compiled").launches == 1
        assert cost(run, "compiled").nbytes == 4 * (2 * 40 + 2 * 8 + 40 + 2 * 5)

    def test_a_sum_over_positions_ends_a_kernel(self):
        step = recorded(lambda x: (y := x * 2) - y.sum(dim=0), (64, 8))
        assert [k.kind for k in fuse(step.operators, True)] == ["positions", "pointwise"]

    def test_views_and_fresh_memory_cost_nothing(self):
        step = recorded(lambda x: torch.empty_like(x.t().reshape(2, 50).unflatten(1, (5, 10))[0]), (100, 1))
        assert step.operators == []

    def test_an_expanded_tensor_counts_once(self):
        step = recorded(lambda x: x.expand(1000, 10) + 1, (1, 10))
        assert cost(step, "eager").nbytes == 4 * (10 + 10_000)

    def test_parts_of_a_buffer_are_read_as_parts(self):
        step = recorded(lambda x: x[:, :2] * x[:, 2:4], (10, 100))
        assert cost(step, "eager").nbytes == 4 * (20 + 20 + 20)


class TestOperators:
    def test_depthwise_convolutions_run_outside_of_the_matrix_units(self):
        conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False, device="meta")
        step = recorded(lambda x: conv(x).sum().backward(), (2, 6, 5, 5))
        forward, backward = (
            next(o for o in step.operators if o.name == n) for n in ("convolution", "convolution_backward")
        )
        assert forward.vector
        assert forward.macs == 2 * 6 * 25 * 9
        assert backward.macs == forward.macs  # x needs no gradient
        assert (backward.launches, backward.traffic) == (1, 4 * (2 * 300 + 54))

    def test_attention_never_stores_its_logits(self):
        model = make_on_meta("dit-s-2:num_layers=1", 16, "bfloat16", fused=True)
        operators = record(model, 2, False, "compiled").operators
        (attention,) = [o for o in operators if o.name == "attention"]
        tokens, width = 2 * 64, 6 * 64
        assert attention.macs == 2 * tokens * 64 * width
        assert attention.traffic == 4 * tokens * width * 2

    def test_focal_attention_by_its_own_loads_and_stores(self):
        """Two by two windows of 4×4: the shifted window covers 16 of the 64 positions."""
        positions, heads, width = 3 * 64, 2, 16
        forward, backward = triton_fcsa.traffic((3, 8, 8, 3 * width), 2, heads, 4, merged=True)
        assert forward == (2 * (positions + 48) * width * 8, 2 * width * (4 * positions + 5 * 48), 2)
        sums = 16 * heads * (positions + 48)
        assert backward == (5 * (positions + 48) * width * 8, 2 * width * (7 * positions + 10 * 48) + sums, 2)
        assert triton_fcsa.traffic((3, 8, 8, 3 * width), 2, heads, 8, merged=True)[0][2] == 1  # one window

    def test_grid_attention_by_its_own_loads_and_stores(self):
        """Stride 2 on 8×6: groups of 4·3 tokens. Loads 3 C and stores C; one float32 number per token and head."""
        positions, heads, width = 3 * 48, 2, 16
        forward, backward = triton_ggsa.traffic((3, 8, 6, 3 * width), 2, heads, (2, 2))
        assert forward == (2 * positions * 12 * width, 2 * width * 4 * positions + 4 * heads * positions, 1)
        assert backward == (7 * positions * 12 * width, 2 * width * 8 * positions + 4 * heads * positions, 2)

    @pytest.mark.parametrize(("latent", "kernels"), [(32, True), (256, False)])
    def test_groups_beyond_the_kernel_take_the_plain_formula(self, latent, kernels):
        """With stride 4 a group of the first level has 64 tokens at 32×32, and 4,096 at 256×256."""
        step = record(make_on_meta("iptv2-s", latent, "bfloat16", fused=True), 1, False, "kernels")
        names = [o.name for o in step.operators]
        assert ("grid_attention" in names) == kernels
        assert ("attention" in names) != kernels


@pytest.fixture(scope="module")
def steps():
    """Recorded steps of the tiny denoiser, by form and whether they train."""
    model = make_on_meta("tiny", None, "bfloat16", fused=False)
    return {(form, t): record(model, 2, t, form) for form in FORMS for t in (False, True)}


class TestModels:
    def test_macs_are_those_of_the_flop_counter(self):
        from iptv2_diffusion.models.presets import count_macs

        model = make_on_meta("tiny", None, "float32", fused=True)
        for form in FORMS:
            found = count(record(model, 2, False, form), form, UNIT, "float32").macs
            assert found / 2 == pytest.approx(count_macs(model), rel=0.01)

    def test_each_form_moves_less_than_the_one_before(self, steps):
        for training in (False, True):
            costs = [count(steps[form, training], form, MACHINES["h100"], "bfloat16") for form in FORMS]
            for more, less in pairwise(costs):
                assert less.nbytes < more.nbytes
                assert less.launches < more.launches
                assert less.seconds < more.seconds

    def test_a_training_step_has_about_three_times_the_products(self, steps):
        forward, step = (count(steps["compiled", t], "compiled", UNIT, "float32") for t in (False, True))
        assert 2.5 < step.macs / forward.macs < 3.2

    def test_parts_add_up_and_have_names(self, steps):
        found = count(steps["compiled", True], "compiled", MACHINES["a100"], "bfloat16")
        assert sum(found.parts.values()) == pytest.approx(found.seconds)
        assert {"FCSA", "GGSA", "feed-forward", "norms and modulation", "sampling and skips"} <= set(found.parts)

    def test_a_kernel_takes_the_longer_of_products_and_bytes(self):
        step = recorded(lambda x, w: x @ w, (8, 4), (4, 16))
        slow = Machine("slow", {"float32": 2.0}, 2.0, bandwidth=1e9, launch=1.0)
        assert count(step, "eager", slow, "float32").seconds == pytest.approx(512 + 1)
        assert cost(step, "eager").seconds == 4 * (32 + 64 + 128)


class TestScript:
    def run(self, capsys, monkeypatch, *options):
        monkeypatch.setattr("sys.argv", ["roofline.py", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    def test_the_last_line_is_one_object_with_the_ratios(self, capsys, monkeypatch, tmp_path):
        options = ("--models=tiny,dit-emoji64-s:num_layers=1", "--batch_size=2", "--json=true", "--parts=true")
        out = self.run(capsys, monkeypatch, *options, "--latent_size=8,16", f"--plot={tmp_path / 'plot.png'}")
        result = json.loads(out.splitlines()[-1])
        assert set(result["predicted_ratio_to_dit"]["tiny"]) == {"inference", "training"}
        rows = {(r["model"], r["latent"], r["what"], r["form"]): r["predicted_ms"] for r in result["rows"]}
        for row in result["ratios"]:
            ours, dit = (rows[m, row["latent"], row["what"], row["form"]] for m in ("tiny", row["to"]))
            assert row["ratio"] == pytest.approx(ours / dit)
        assert (tmp_path / "plot.png").stat().st_size > 1000

    def test_sizes_are_held_to_their_own_dit(self):
        reference = runpy.run_path(str(SCRIPT))["reference_of"]
        names = ["iptv2-s", "iptv2-xl-2", "dit-s-2", "dit-xl-2", "dit-l-2"]
        assert reference("iptv2-s", names) == "dit-s-2"
        assert reference("iptv2-s-2:window_size=4", names) == "dit-s-2"
        assert reference("iptv2-xl-2", names) == "dit-xl-2"
        assert reference("tiny", names) == "dit-l-2"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--forms=fast"], "forms is 'fast'; choose one of eager, compiled, kernels"),
            (["--batch_size=0"], "batch_size is 0; it must be at least 1"),
            (["--measure=true"], "measure times this machine, not h100; add --machine this"),
            (["--models=iptv2-q"], "no preset, config.json or model folder called 'iptv2-q'"),
        ],
    )
    def test_wrong_options_end_in_one_line(self, capsys, monkeypatch, options, message):
        monkeypatch.setattr("sys.argv", ["roofline.py", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code not in (0, None)
        assert message in capsys.readouterr().err + str(end.value.code)


def test_this_machine_has_rates():
    machine = measure_this_machine("float32", rounds=1)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.flops["float32"] < 1e15
