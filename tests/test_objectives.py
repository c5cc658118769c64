"""DiffusionObjective against loop-written references, torch.distributions and the schedulers' own arithmetic."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.distributions import Normal, kl_divergence

from iptv2_diffusion import DiffusionObjective, IPTV2Transformer2DModel
from iptv2_diffusion.variational_bound import discretized_gaussian_nll, gaussian_kl

PREDICTION_TYPES = ["epsilon", "v_prediction", "flow"]
TIMESTEPS = (0, 1, 37, 500, 998, 999)


def make_objective(prediction_type: str, learned_variance: bool = False, **options) -> DiffusionObjective:
    scheduler = DiffusionObjective.make_scheduler(prediction_type, learned_variance=learned_variance)
    return DiffusionObjective(scheduler, learned_variance=learned_variance, **options)


def make_batch(objective: DiffusionObjective, size: int = 4):
    """Latents (6, 3, size, size), noise and timesteps, with both ends of the schedule among them."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(TIMESTEPS), 3, size, size, generator=generator)
    timesteps = torch.tensor(TIMESTEPS)
    return latents, noise, timesteps.float() if objective.prediction_type == "flow" else timesteps


def tiny_model(out_channels: int) -> IPTV2Transformer2DModel:
    torch.manual_seed(0)
    model = IPTV2Transformer2DModel(
        sample_size=4,
        in_channels=3,
        out_channels=out_channels,
        num_class_embeds=5,
        channels=8,
        layers_per_stage=(1, 1, 1),
        num_attention_heads=1,
        window_size=4,
        grid_stride=(2, 1),
        conditioning_dim=16,
    )
    nn.init.normal_(model.proj_out.weight, std=0.1)  # a fresh model predicts zero
    return model


class Answer(nn.Module):
    """A model that returns a given prediction."""

    def __init__(self, *parts: torch.Tensor):
        super().__init__()
        self.answer = nn.Parameter(torch.cat(parts, dim=1))

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        return (self.answer,)


def alpha_sigma(objective: DiffusionObjective, timestep: float) -> tuple[float, float]:
    """Reference: alpha and sigma of one timestep from the definition, in Python floats."""
    if objective.prediction_type == "flow":
        return 1 - timestep / 1000, timestep / 1000
    alpha_bar = 1.0
    for step in range(int(timestep) + 1):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
class TestTargets:
    def test_noise_and_target_match_the_definition(self, prediction_type):
        objective = make_objective(prediction_type)
        latents, noise, timesteps = make_batch(objective)
        noisy, target = objective.add_noise(latents, noise, timesteps), objective.target(latents, noise, timesteps)
        for i, timestep in enumerate(timesteps.tolist()):
            alpha, sigma = alpha_sigma(objective, timestep)
            expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "flow": noise - latents}
            torch.testing.assert_close(noisy[i], alpha * latents[i] + sigma * noise[i], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(target[i], expected[prediction_type][i], rtol=1e-3, atol=1e-4)

    def test_true_target_leads_back_to_the_latents(self, prediction_type):
        objective = make_objective(prediction_type)
        latents, noise, timesteps = make_batch(objective)
        noisy, target = objective.add_noise(latents, noise, timesteps), objective.target(latents, noise, timesteps)
        original = objective.predict_original(target, noisy, timesteps)
        # at t = 999 epsilon determines x0 with 1/alpha = 157 times the rounding error
        torch.testing.assert_close(original, latents, rtol=1e-3, atol=2e-3)

    def test_perfect_predictor_has_no_loss_and_loss_is_the_mean_square(self, prediction_type):
        objective = make_objective(prediction_type)
        latents, noise, timesteps = make_batch(objective)
        target = objective.target(latents, noise, timesteps)
        assert objective.loss(Answer(target), latents, noise, timesteps).eq(0).all()
        loss = objective.loss(Answer(target + 0.5), latents, noise, timesteps)
        torch.testing.assert_close(loss, torch.full((len(TIMESTEPS),), 0.25))

    def test_samples_do_not_mix(self, prediction_type):
        objective = make_objective(prediction_type)
        latents, noise, timesteps = make_batch(objective)
        labels = torch.tensor([0, 1, 2, 3, 4, 5])
        model = tiny_model(3).eval()
        together = objective.loss(model, latents, noise, timesteps, labels)
        assert together.dtype == torch.float32
        alone = [
            objective.loss(model, *(x[i : i + 1] for x in (latents, noise, timesteps, labels)))
            for i in range(len(TIMESTEPS))
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def test_min_snr_weights_the_error_of_x0(self, prediction_type):
        gamma = 5.0
        objective = make_objective(prediction_type, min_snr_gamma=gamma)
        latents, noise, timesteps = make_batch(objective)
        weights = objective.snr_weight(timesteps).tolist()
        for timestep, weight in zip(timesteps.tolist(), weights, strict=True):
            alpha, sigma = alpha_sigma(objective, timestep)
            if sigma == 0:  # flow at t = 0: x0 is given, its error is none
                assert weight == 0
                continue
            # an error of 1 in the prediction is one of this size in x0
            in_x0 = sigma / alpha if prediction_type == "epsilon" else sigma
            assert weight == pytest.approx(in_x0**2 * min((alpha / sigma) ** 2, gamma), rel=1e-2)
        target = objective.target(latents, noise, timesteps)
        loss = objective.loss(Answer(target + 1), latents, noise, timesteps)
        torch.testing.assert_close(loss, torch.tensor(weights), rtol=1e-5, atol=1e-6)


class TestTimesteps:
    def test_uniform_numbers_reach_every_timestep_equally(self):
        uniform = (torch.arange(4000) + 0.5) / 4000
        timesteps = make_objective("epsilon").sample_timesteps(uniform)
        assert timesteps.dtype == torch.int64
        assert timesteps.bincount(minlength=1000).tolist() == [4] * 1000
        assert make_objective("epsilon").sample_timesteps(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]

    def test_flow_timesteps_are_the_noise_level_in_thousandths(self):
        timesteps = make_objective("flow").sample_timesteps(torch.tensor([0.0, 0.25, 0.999]))
        torch.testing.assert_close(timesteps, torch.tensor([0.0, 250.0, 999.0]))

    def test_flow_shift_follows_the_scheduler(self):
        scheduler = DiffusionObjective.make_scheduler("flow", shift=3.0)
        levels = scheduler.timesteps.flip(0)  # after the scheduler's own shift, from 1/1000 to 1
        uniform = torch.arange(1, 1001) / 1000
        torch.testing.assert_close(DiffusionObjective(scheduler).sample_timesteps(uniform), levels)

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    @pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
    def test_timestep_shift_keeps_the_signal_to_noise_ratio_of_more_pixels(self, prediction_type, sampling):
        """t / (1 - t), the flow's noise over signal, is multiplied by s whatever the density (SD3, eq. 23)."""
        uniform = (torch.arange(64) + 0.5) / 64
        scheduler = DiffusionObjective.make_scheduler(prediction_type, num_train_timesteps=10**6)
        plain, shifted = (
            DiffusionObjective(scheduler, timestep_sampling=sampling, timestep_shift=s).sample_timesteps(uniform)
            for s in (1.0, 2.0)
        )
        plain, shifted = plain.double() / 10**6, shifted.double() / 10**6
        torch.testing.assert_close(shifted / (1 - shifted), 2 * plain / (1 - plain), rtol=1e-3, atol=0)

    def test_training_shift_and_the_schedulers_multiply_and_one_shifts_nothing(self):
        uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
        both, one, none = (
            DiffusionObjective(DiffusionObjective.make_scheduler("flow", shift=a), timestep_shift=b)
            for a, b in ((3.0, 2.0), (6.0, 1.0), (1.0, 1.0))
        )
        torch.testing.assert_close(both.sample_timesteps(uniform), one.sample_timesteps(uniform))
        assert both.scheduler.shift == 3.0  # sampling is not touched
        assert torch.equal(none.sample_timesteps(uniform), uniform * 1000)
        with pytest.raises(ValueError, match="timestep_shift is 0; it must be above 0"):
            DiffusionObjective(none.scheduler, timestep_shift=0)

    @pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
    def test_logit_normal_has_the_right_quantiles(self, prediction_type):
        objective = make_objective(prediction_type, timestep_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8)
        uniform = torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 2**-24])
        timesteps = objective.sample_timesteps(uniform).double()
        assert timesteps.isfinite().all()
        assert timesteps.min() >= 0
        assert timesteps.max() <= 1000
        for u, timestep in zip(uniform[1:4].tolist(), timesteps[1:4].tolist(), strict=True):
            level = 1 / (1 + math.exp(0.5 - 0.8 * Normal(0, 1).icdf(torch.tensor(u)).item()))
            assert timestep == pytest.approx(1000 * level, abs=1)


class TestGaussianTerms:
    def test_kl_matches_torch_distributions(self):
        generator = torch.Generator().manual_seed(0)
        mean_q, mean_p, log_q, log_p = torch.randn(4, 100, generator=generator, dtype=torch.float64)
        expected = kl_divergence(Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp()))
        torch.testing.assert_close(gaussian_kl(mean_q - mean_p, log_q, log_p), expected)

    @pytest.mark.parametrize("log_std", [-6.0, -4.0, -2.0, 0.0])
    @pytest.mark.parametrize("mean", [-1.2, 0.0, 0.3, 0.97])
    def test_probabilities_of_the_256_bins_sum_to_one(self, mean, log_std):
        bins = -1 + 2 * torch.arange(256) / 255
        nll = discretized_gaussian_nll(bins, torch.tensor(mean), torch.tensor(2 * log_std))
        # bins of probability below 1e-12 count as 1e-12
        assert nll.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-4)

    def test_bin_far_from_the_mean_is_improbable_but_finite(self):
        x, mean = torch.tensor([-3.0, -0.5, 0.5, 3.0]), torch.tensor([3.0, 0.5, -0.5, -3.0], requires_grad=True)
        nll = discretized_gaussian_nll(x, mean, torch.tensor(-9.0))
        assert nll.isfinite().all()
        assert nll.min() > 20
        nll.sum().backward()
        assert mean.grad.isfinite().all()


class TestLearnedVariance:
    def test_bound_matches_distributions_built_step_by_step(self):
        objective = make_objective("epsilon", learned_variance=True)
        scheduler = objective.scheduler
        latents, noise, timesteps = make_batch(objective)
        generator = torch.Generator().manual_seed(1)
        prediction = noise + 0.1 * torch.randn(noise.shape, generator=generator)
        variance_output = torch.randn(noise.shape, generator=generator)
        noisy = objective.add_noise(latents, noise, timesteps)
        bound = objective.variational_bound(prediction, variance_output, latents, noisy, timesteps)

        betas = scheduler.betas.double().tolist()
        for i, t in enumerate(timesteps.tolist()):
            alpha, sigma = alpha_sigma(objective, t)
            previous = alpha_sigma(objective, t - 1)[0] if t > 0 else 1.0  # sqrt of the cumulative product before t
            x0, x_t = latents[i].double(), noisy[i].double()
            predicted = (x_t - sigma * prediction[i].double()) / alpha
            if t == 0:
                log_small = math.log(betas[1] * (1 - alpha**2) / (1 - alpha_sigma(objective, 1)[0] ** 2))
            else:
                log_small = math.log(betas[t] * (1 - previous**2) / (1 - alpha**2))
                # diffusers interpolates likewise when sampling
                sampled = scheduler._get_variance(t, predicted_variance=variance_output[i])
                fraction = (variance_output[i] + 1) / 2
                own = fraction * math.log(betas[t]) + (1 - fraction) * log_small
                torch.testing.assert_close(sampled, own, rtol=1e-3, atol=5e-3)
            fraction = (variance_output[i].double() + 1) / 2
            std = (0.5 * (fraction * math.log(betas[t]) + (1 - fraction) * log_small)).exp()
            if t == 0:
                p = Normal(predicted, std)
                upper = torch.where(x0 > 0.999, torch.tensor(1.0, dtype=torch.float64), p.cdf(x0 + 1 / 255))
                lower = torch.where(x0 < -0.999, torch.tensor(0.0, dtype=torch.float64), p.cdf(x0 - 1 / 255))
                expected = -(upper - lower).clamp(min=1e-12).log()
            else:
                from_x0 = previous * betas[t] / (1 - alpha**2)
                from_x_t = math.sqrt(1 - betas[t]) * (1 - previous**2) / (1 - alpha**2)
                small = torch.tensor(math.exp(0.5 * log_small), dtype=torch.float64)
                q = Normal(from_x0 * x0 + from_x_t * x_t, small)
                expected = kl_divergence(q, Normal(from_x0 * predicted + from_x_t * x_t, std))
            assert bound[i].item() == pytest.approx(expected.mean().item() / math.log(2), rel=2e-3)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_perfect_mean_and_posterior_variance_have_no_divergence(self, prediction_type):
        objective = make_objective(prediction_type, learned_variance=True)
        latents, noise, timesteps = make_batch(objective)
        target = objective.target(latents, noise, timesteps)
        loss = objective.loss(Answer(target, torch.full_like(target, -1)), latents, noise, timesteps)
        # x0 from epsilon carries 157 times the rounding error at t = 999
        torch.testing.assert_close(loss[1:], torch.zeros(len(TIMESTEPS) - 1), rtol=0, atol=1e-4)

    def test_mean_learns_from_the_squared_error_alone(self):
        objective = make_objective("epsilon", learned_variance=True)
        plain = make_objective("epsilon")
        latents, noise, timesteps = make_batch(objective)
        guess = torch.zeros_like(noise)
        both, mean = Answer(guess, guess), Answer(guess)
        objective.loss(both, latents, noise, timesteps).sum().backward()
        plain.loss(mean, latents, noise, timesteps).sum().backward()
        torch.testing.assert_close(both.answer.grad[:, :3], mean.answer.grad)
        assert both.answer.grad.isfinite().all()
        assert both.answer.grad[:, 3:].abs().amax(dim=(1, 2, 3)).gt(0).all()

    def test_bound_is_least_at_the_variance_of_the_error(self):
        # the model's mean being off, the best variance is above the posterior's: gradient descent must raise it
        objective = make_objective("epsilon", learned_variance=True)
        latents, noise, _ = make_batch(objective)
        timesteps = torch.full((len(TIMESTEPS),), 20)
        model = Answer(noise + 1.0, torch.full_like(noise, -1))
        objective.loss(model, latents, noise, timesteps).sum().backward()
        assert model.answer.grad[:, 3:].max() < 0

    def test_gradients_of_a_real_model_are_finite(self):
        objective = make_objective("epsilon", learned_variance=True, min_snr_gamma=5.0)
        latents, noise, timesteps = make_batch(objective)
        model = tiny_model(6)
        objective.loss(model, 10 * latents, noise, timesteps, torch.arange(6)).mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_bfloat16_model_gives_a_float32_loss(self):
        objective = make_objective("epsilon", learned_variance=True)
        latents, noise, timesteps = make_batch(objective)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective.loss(tiny_model(6), latents, noise, timesteps, torch.arange(6))
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()


class TestSchedulers:
    def test_latents_are_not_clipped_and_few_steps_start_at_the_end(self):
        scheduler = DiffusionObjective.make_scheduler("epsilon")
        scheduler.set_timesteps(10)
        assert not scheduler.config.clip_sample
        assert scheduler.timesteps[0] == 999

    def test_learned_range_ends_at_zero_where_no_noise_is_added(self):
        scheduler = DiffusionObjective.make_scheduler("epsilon", learned_variance=True)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[[0, -1]].tolist() == [999, 0]

    def test_overrides_win(self):
        scheduler = DiffusionObjective.make_scheduler("v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
        assert scheduler.config.beta_end == 0.012
        assert scheduler.config.prediction_type == "v_prediction"

    def test_any_scheduler_of_the_ddpm_family_works(self):
        objective = DiffusionObjective(DDIMScheduler(prediction_type="v_prediction"))
        latents, noise, timesteps = make_batch(objective)
        target = objective.target(latents, noise, timesteps)
        assert objective.loss(Answer(target), latents, noise, timesteps).eq(0).all()


class TestErrors:
    def test_wrong_channel_count_names_the_numbers(self):
        objective = make_objective("epsilon", learned_variance=True)
        with pytest.raises(ValueError, match=r"returns 3 channels for latents of 3.*must return 6"):
            objective.loss(tiny_model(3), *make_batch(objective))

    def test_learned_variance_needs_its_scheduler(self):
        for prediction_type in ("epsilon", "flow"):
            with pytest.raises(ValueError, match="learned_range"):
                DiffusionObjective(DiffusionObjective.make_scheduler(prediction_type), learned_variance=True)

    @pytest.mark.parametrize(
        "options", [{"timestep_sampling": "beta"}, {"logit_std": 0.0}, {"min_snr_gamma": -1.0}], ids=lambda o: str(*o)
    )
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_objective("epsilon", **options)

    def test_unknown_prediction_type(self):
        with pytest.raises(ValueError, match="sample"):
            DiffusionObjective.make_scheduler("sample")
        with pytest.raises(ValueError, match="sample"):
            DiffusionObjective(DDIMScheduler(prediction_type="sample"))
