"""Training with the Triton kernels, and mutations of them, under the interpreter."""

import pytest

pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

import triton_checks


def test_an_error_in_a_backward_is_noticed():
    triton_checks.run_interpreted("interpreted_mutations.py")


@pytest.mark.slow
def test_the_loss_curve_of_200_steps_is_that_of_the_plain_formulas():
    triton_checks.run_interpreted("interpreted_training.py")
