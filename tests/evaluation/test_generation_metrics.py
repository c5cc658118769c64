"""evaluation/generation_metrics.py: each distance against independent or loop-written code, each encoder end to end."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from transformers import Dinov2Config, Dinov2Model

from iptv2_diffusion.evaluation import feature_extractors
from iptv2_diffusion.evaluation.feature_extractors import dinov2, efficientnet_lite0, extract_features, inception_v3
from iptv2_diffusion.evaluation.generation_metrics import (
    Statistics,
    frechet_distance,
    frechet_distance_pca,
    half_half_floor,
    half_sample_error,
    inception_score,
    kid,
    mean_kernel,
    nearest_neighbour_distance,
    precision_recall,
    statistics,
)
from iptv2_diffusion.files import file_sha256


@pytest.fixture(scope="module")
def features():
    """Two sets of 90 and 70 features in 12 dimensions, correlated and shifted, as float32."""
    torch.manual_seed(0)
    mix = torch.randn(12, 12)
    return torch.randn(90, 12) @ mix, torch.randn(70, 12) @ (mix + 0.3 * torch.randn(12, 12)) + 0.4


@pytest.fixture(scope="module")
def pictures():
    """Smooth random pictures: (6, 3, 40, 48) uint8."""
    torch.manual_seed(1)
    coarse = torch.rand(6, 3, 5, 6) * 255
    return torch.nn.functional.interpolate(coarse, size=(40, 48), mode="bicubic").clamp(0, 255).byte()


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights under the 566 keys of FID's Inception."""
    torch.manual_seed(2)
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    state = network.state_dict()
    assert len(state) == 566
    torch.save(state, path)
    return path


class TestFrechetDistance:
    def test_is_that_of_a_matrix_square_root(self, features):
        a, b = (f.double().numpy() for f in features)
        sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
        expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sigma_a + sigma_b - 2 * root)
        assert frechet_distance(*features) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(*map(statistics, features)) == frechet_distance(*features)

    def test_is_that_of_torch_fidelity_given_float64(self, features):
        stats = [fid_features_to_statistics(f.double()) for f in features]
        expected = fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]
        assert frechet_distance(*features) == pytest.approx(expected, rel=1e-10)

    def test_holds_for_fewer_images_than_dimensions(self):
        """There tr(Σa Σb)^½ is the sum of the singular values of A Bᵀ, with A and B the centred features."""
        torch.manual_seed(3)
        a, b = torch.randn(9, 40).double(), torch.randn(7, 40).double() + 0.5
        centred_a, centred_b = (x - x.mean(dim=0) for x in (a, b))
        overlap = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / (8 * 6) ** 0.5
        traces = centred_a.square().sum() / 8 + centred_b.square().sum() / 6
        expected = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + traces - 2 * overlap
        assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)

    def test_of_equal_sets_is_zero_and_it_is_symmetric(self, features):
        assert frechet_distance(features[0], features[0]) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(*features) == pytest.approx(frechet_distance(*features[::-1]), rel=1e-10)

    def test_in_principal_components_is_that_of_projected_features(self, features):
        a, b = (f.double().numpy() for f in features)
        axes = np.linalg.svd(b - b.mean(0), full_matrices=False)[2][:5].T
        expected = frechet_distance(torch.from_numpy(a @ axes), torch.from_numpy(b @ axes))
        assert frechet_distance_pca(*features, components=5) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance_pca(*features, components=12) == pytest.approx(frechet_distance(*features), rel=1e-9)
        assert frechet_distance_pca(*features, components=5, fit_on=features[0]) != pytest.approx(expected, rel=1e-3)
        with pytest.raises(ValueError, match="70 images of 12 features have no 13 principal components"):
            frechet_distance_pca(*features, components=13)

    def test_refuses_features_of_different_encoders(self, features):
        with pytest.raises(ValueError, match="of 12 and of 5 dimensions"):
            frechet_distance(features[0], features[1][:, :5])


class TestKID:
    def test_is_that_of_loops_over_pairs(self, features):
        a, b = features[0][:8].double(), features[1][:6].double()

        def kernel(x, y):
            return (float(x @ y) / 12 + 1) ** 3

        within_a = np.mean([kernel(a[i], a[j]) for i in range(8) for j in range(8) if i != j])
        within_b = np.mean([kernel(b[i], b[j]) for i in range(6) for j in range(6) if i != j])
        across = np.mean([kernel(x, y) for x in a for y in b])
        assert kid(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)
        assert mean_kernel(b) == pytest.approx(within_b, rel=1e-12)
        assert kid(a, b, within_b=mean_kernel(b)) == kid(a, b)

    def test_is_that_of_torch_fidelity_on_one_subset_of_all(self, features):
        options = {"kid_subsets": 1, "kid_subset_size": 70, "verbose": False}
        expected = kid_features_to_metric(features[0][:70].double(), features[1].double(), **options)
        assert kid(features[0][:70], features[1]) == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-9)

    def test_is_zero_on_average_for_equal_distributions(self):
        torch.manual_seed(4)
        values = np.array([kid(torch.randn(40, 4), torch.randn(60, 4)) for _ in range(200)])
        assert abs(values.mean()) < 4 * values.std() / 200**0.5
        assert values.min() < 0


def test_precision_and_recall_are_those_of_loops(features):
    samples, reference = features[0][:30].double(), features[1][:25].double()

    def covered(points, centres, k=3):
        radii = [sorted(float((c - d).norm()) for d in centres)[k] for c in centres]  # its own distance is the first
        inside = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    precision, recall = precision_recall(samples, reference)
    assert precision == pytest.approx(covered(samples, reference))
    assert recall == pytest.approx(covered(reference, samples))
    assert 0 < precision < 1
    with pytest.raises(ValueError, match="3 samples and 25 references have no 3 neighbours"):
        precision_recall(samples[:3], reference)


def test_inception_score_is_that_of_loops():
    torch.manual_seed(5)
    logits = 3 * torch.randn(20, 7)
    order = np.random.RandomState(2020).permutation(20)

    def of(rows):
        p = [torch.softmax(logits[i].double(), 0) for i in rows]
        mean = sum(p) / len(p)
        return np.exp(np.mean([float((q * (q.log() - mean.log())).sum()) for q in p]))

    assert inception_score(logits) == pytest.approx(of(order))
    assert inception_score(logits, split_size=10) == pytest.approx(np.mean([of(order[:10]), of(order[10:])]))


class TestNearestNeighbours:
    def test_of_features_are_those_of_loops(self, features):
        queries, references = features[0][:9], features[1][:11]
        distance, index = nearest_neighbour_distance(queries, references, block=4)
        for i, query in enumerate(queries):
            slow = [(query - r).square().mean().sqrt().item() for r in references]
            assert index[i] == int(np.argmin(slow))
            assert distance[i].item() == pytest.approx(min(slow), rel=1e-6)

    def test_of_images_may_be_mirrored_and_distances_are_exact(self):
        torch.manual_seed(6)
        queries, references = torch.rand(5, 3, 4, 6) * 255, torch.rand(7, 3, 4, 6) * 255
        references[3] = queries[2].flip(-1) + 2
        distance, index = nearest_neighbour_distance(queries, references)
        for i, query in enumerate(queries):
            slow = [
                min((query - r).square().mean().sqrt(), (query - r.flip(-1)).square().mean().sqrt()) for r in references
            ]
            assert index[i] == int(np.argmin(slow))
            assert distance[i] == pytest.approx(float(min(slow)), rel=1e-5)
        assert index[2] == 3
        assert distance[2] == pytest.approx(2, abs=1e-4)


def test_floor_compares_disjoint_halves_and_depends_on_the_seed_alone(features):
    numbers = torch.arange(10.0)[:, None]
    seen = []
    half_half_floor(numbers, lambda a, b: seen.append((set(a.flatten().tolist()), set(b.flatten().tolist()))) or 0.0)
    ((a, b),) = seen
    assert a | b == set(range(10))
    assert len(a) == len(b) == 5
    assert half_half_floor(features[0], seed=1) == half_half_floor(features[0], seed=1)
    assert half_half_floor(features[0], seed=1) != half_half_floor(features[0], seed=2)


def test_half_sample_error_of_a_mean_is_its_standard_error():
    torch.manual_seed(7)
    values = torch.randn(200, 1) * 3
    expected = values.std().item() / 200**0.5
    assert half_sample_error(lambda x: x.mean().item(), values, repeats=2000) == pytest.approx(expected, rel=0.06)


class TestInception:
    def test_all_heads_are_those_of_the_network_layer_by_layer(self, inception_weights, pictures):
        """torchvision's blocks, called one after another on TensorFlow's resize; ADM's sFID takes 7 channels of one."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        extractor = inception_v3(inception_weights)
        outputs = extractor.outputs(pictures[:2])
        assert {name: tuple(value.shape) for name, value in outputs.items()} == {
            "pool": (2, 2048),
            "spatial": (2, 7 * 17 * 17),
            "logits": (2, 1008),
        }
        assert torch.equal(extractor(pictures[:2]), outputs["pool"])
        net = extractor.network
        x = interpolate_bilinear_2d_like_tensorflow1x(pictures[:2].float(), size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = getattr(net, name)(x)
        x = net.MaxPool_2(x)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
            x = getattr(net, name)(x)
        branch = net.Mixed_6d.branch1x1
        spatial = torch.relu(branch.bn(branch.conv(x)))[:, :7]
        for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 16, 6), (3, 11, 4)):  # ADM: (H, W, C)
            kept = outputs["spatial"][:, (row * 17 + column) * 7 + channel]
            assert torch.allclose(kept, spatial[:, channel, row, column], atol=1e-6)
        assert spatial.std() > 0
        assert torch.allclose(outputs["logits"], outputs["pool"] @ net.fc.weight.T, rtol=1e-4, atol=1e-6)

    def test_network_is_pytorch_fids_where_the_resize_is_the_same(self, inception_weights, pictures, monkeypatch):
        """At 299 pixels neither resizes. The test undoes the other difference, (x - 128)/128 or (x - 127.5)/127.5."""
        pytorch_fid = pytest.importorskip("pytorch_fid.inception")
        home = inception_weights.parent / "home"
        (home / "hub/checkpoints").mkdir(parents=True)
        (home / "hub/checkpoints" / inception_weights.name).write_bytes(inception_weights.read_bytes())
        monkeypatch.setenv("TORCH_HOME", str(home))
        theirs = pytorch_fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
        large = torch.nn.functional.interpolate(pictures[:2].float(), size=(299, 299)).byte()
        with torch.no_grad():
            expected = theirs((large.float() - 128) / 128)[0].flatten(1)
        assert torch.allclose(inception_v3(inception_weights)(large), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0

    @pytest.mark.slow
    def test_distance_is_torchmetrics_end_to_end(self, inception_weights, pictures):
        extractor = inception_v3(inception_weights)
        network = NoTrainInceptionV3("inception", ["2048"], str(inception_weights), antialias=False)
        metric = FrechetInceptionDistance(feature=network, normalize=False)
        metric.update(pictures[:2], real=True)
        metric.update(pictures[2:4], real=False)
        ours = frechet_distance(extractor(pictures[2:4]), extractor(pictures[:2]))
        assert ours == pytest.approx(float(metric.compute()), rel=1e-3)

    def test_files_without_weights_are_refused_and_nothing_is_unpickled(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (tmp_path.joinpath("sprung").touch, ())

        (tmp_path / "trap.pth").write_bytes(pickle.dumps({"fc.weight": Trap()}))
        torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
        for name in ("trap.pth", "other.pth"):
            with pytest.raises(ValueError, match=f"{name} does not hold the weights of FID's Inception"):
                inception_v3(tmp_path / name)
        assert not (tmp_path / "sprung").exists()
        with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth"):
            inception_v3(tmp_path / "none.pth")

    @pytest.mark.parametrize("cause", ["offline", "unreachable", "another file"])
    def test_weights_that_cannot_be_downloaded_are_named(self, cause, tmp_path, monkeypatch):
        """A file:// address replaces the server: the file is missing, or its bytes do not match its hash."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if cause == "offline" else "0")
        name = feature_extractors.URL_INCEPTION_V3.rsplit("/", 1)[1]
        (tmp_path / "server").mkdir()
        if cause == "another file":
            (tmp_path / "server" / name).write_bytes(b"not these")
        monkeypatch.setattr(feature_extractors, "URL_INCEPTION_V3", f"file://{tmp_path}/server/{name}")
        with pytest.raises(FileNotFoundError) as caught:
            inception_v3()
        for part in (name, feature_extractors.INCEPTION_SHA256, "--inception_weights"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "hub/checkpoints").glob("*.pth"))


class TestOtherEncoders:
    def test_efficientnet_lite0_agrees_with_its_package_and_with_torchmetrics(self, pictures):
        pytest.importorskip("efficientnet_lite_pytorch")
        extractor = efficientnet_lite0(64)
        square = torch.nn.functional.interpolate(pictures.float(), size=(64, 64)).byte()
        ours = extract_features(extractor, square.split(4))["pool"]
        with torch.no_grad():
            direct = extractor.network.extract_features((square.float() - 127) / 128).mean(dim=(2, 3))
        assert ours.shape == (6, 1280)
        assert torch.allclose(ours, direct, atol=1e-5)
        assert (extractor.name, extractor.sha256[:8]) == ("efficientnet-lite0@64", "57934424")
        metric = FrechetInceptionDistance(feature=efficientnet_lite0(64), normalize=False, input_img_size=(3, 64, 64))
        metric.update(square, real=True)
        metric.update(255 - square, real=False)
        expected = frechet_distance(extractor(255 - square), ours)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-3)
        with pytest.raises(ValueError, match="multiples of 32"):
            efficientnet_lite0(50)
        with pytest.raises(ValueError, match="give uint8"):
            extractor(pictures[0])

    def test_efficientnet_lite0_recognises_what_is_in_a_photograph(self):
        """The weights are ImageNet's: class 285 is an Egyptian cat, 504 a coffee mug, 967 an espresso."""
        pytest.importorskip("efficientnet_lite_pytorch")
        data = pytest.importorskip("skimage.data")
        extractor = efficientnet_lite0()
        for image, classes in ((data.chelsea(), range(281, 288)), (data.coffee(), (504, 967, 968))):
            features = extractor(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
            with torch.no_grad():
                assert extractor.network._fc(features).argmax().item() in classes

    def test_dinov2_gives_the_class_token(self, tmp_path, pictures):
        torch.manual_seed(8)
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
        model = Dinov2Model(config).eval()
        model.save_pretrained(tmp_path)
        extractor = dinov2(str(tmp_path))
        large = torch.nn.functional.interpolate(pictures.float(), size=(224, 224)).byte()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            pixels = (large / 255 - mean[:, None, None]) / std[:, None, None]
            expected = model(pixels).last_hidden_state[:, 0]
        assert torch.allclose(extractor(large), expected, atol=1e-5)
        assert extractor.sha256 == file_sha256(tmp_path / "model.safetensors")
        assert extractor.dimensions == 16


def test_statistics_without_a_count_are_taken_as_they_are(features):
    stored = Statistics(*(getattr(statistics(features[1]), n) for n in ("mean", "covariance")))
    assert frechet_distance(features[0], stored) == frechet_distance(*features)
    with pytest.raises(ValueError, match="two images or more"):
        statistics(features[0][:1])
