"""The recursive attack: its parts against independent twins, and small networks with ReLUs inverted exactly."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, nnls
from torch import nn
from torch.nn import functional as F

import i2f
from i2f.attacks.knowledge import understood
from i2f.attacks.recursive import completion, forecast, gram, lifted, linearised, masks, pool
from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import System, equations, patches
from i2f.attacks.recursive.tangent import Tangent
from i2f.attacks.setup import make_problems


class Block(nn.Module):
    """A residual block of two convolutions, with a projection where the shape changes."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Identity()
        if stride > 1 or before != width:
            self.down = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet() -> nn.Module:
    """A narrow ResNet for 12×12 images: nine positions behind the pool, a first stage that is short of rank."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    blocks = nn.Sequential(Block(12, 12, 1), Block(12, 24, 2), Block(24, 64, 2))
    model = nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the pass below: about half of the units are open
    model(torch.rand(64, 3, 12, 12))
    return model.double().eval()


def plain(activation=nn.ReLU, size: int = 12) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), activation(), nn.Conv2d(8, 8, 3, 2, 1), activation(), nn.Conv2d(8, 8, 3, 1, 1)]
    return nn.Sequential(*layers, activation(), nn.Flatten(), nn.Linear(8 * (size // 4) ** 2, 5)).double().eval()


def image(*shape: int) -> torch.Tensor:
    """Neighbours agree, as in pictures, up to some noise."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, shape[0], 4, 4, generator=generator, dtype=torch.float64)
    smooth = F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=True)
    return 0.7 * smooth + 0.3 * torch.rand(1, *shape, generator=generator, dtype=torch.float64)


def gradient(model: nn.Module, x: torch.Tensor, label: int = 3) -> list[torch.Tensor]:
    loss = F.cross_entropy(model(x), torch.tensor([label]))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def central(function, x: torch.Tensor, t: torch.Tensor, step: float = 1e-7) -> torch.Tensor:
    """Central differences, exact up to rounding where no unit changes its side."""
    return (function(x + step * t) - function(x - step * t)).detach() / (2 * step)


@pytest.fixture(scope="module")
def residual():
    """(J, x) of the residual network, whose J Jᵀ is formed once."""
    model, x = resnet(), image(3, 12, 12)
    return i2f.GradientJacobian(model, x, torch.tensor([3])), x


def mse(found: i2f.attacks.Reconstruction, x: torch.Tensor) -> float:
    return float((found.x - x).double().square().mean())


class TestInversion:
    def test_a_residual_network_is_inverted_exactly_without_its_label(self):
        model, x = resnet(), image(3, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-20
        assert found.matched
        assert found.converged
        assert found.y.tolist() == [3]
        last = found.layers[-1]
        assert last.rank < last.unknowns  # its first stage is short: the features were needed
        assert all(layer.rank == layer.unknowns for layer in found.layers[:-1])

    @pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.2)], ids=["relu", "leaky"])
    def test_plain_convolutions(self, activation):
        model, x = plain(activation), image(1, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-20

    def test_leaky_units_show_what_the_gradient_does_not(self):
        """R-GAP's case: fewer equations than unknowns in the weight gradient, and the rest from the values above."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 4, 2, 2, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, 2, 1, bias=False)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.LeakyReLU(0.2), nn.Linear(256, 5)).double().eval()
        x = image(3, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-20
        assert found.steps == 0
        assert found.layers[-1].completed
        assert found.layers[-1].rank < found.layers[-1].unknowns
        sent = gradient(model, x)
        sent[0] = torch.zeros_like(sent[0])  # equations that contradict each other complete nothing
        assert not i2f.invert(model, sent, None, x.shape, method="recursive", polish=False).matched

    def test_linear_layers_need_no_search(self):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4)]
        model, x = nn.Sequential(*layers).double().eval(), image(1, 6, 6)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-24
        assert found.steps == 0

    def test_a_float32_gradient(self):
        model, x = resnet().float(), image(3, 12, 12).float()
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        assert found.x.dtype == torch.float32
        assert mse(found, x) < 1e-10

    def test_noise_leaves_an_error_in_proportion(self):
        model, x = resnet(), image(3, 12, 12)
        errors = []
        for noise in (1e-5, 1e-4):
            generator = torch.Generator().manual_seed(0)
            sent = [
                g + noise * g.norm() / math.sqrt(g.numel()) * torch.randn(g.shape, generator=generator, dtype=g.dtype)
                for g in gradient(model, x)
            ]
            errors.append(mse(i2f.invert(model, sent, None, x.shape, method="recursive", polish=False), x))
        assert errors[1] < 1e-4
        assert 10 < errors[1] / errors[0] < 1000  # by the square

    @pytest.mark.parametrize("sigma", [1e-6, 1e-5])
    def test_under_noise_it_ends_where_the_influence_function_says(self, residual, sigma):
        """At the larger one, a gate is in doubt where the features leave the image."""
        (J, x), model = residual, resnet()
        delta = sigma * torch.randn(J.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = i2f.influence(J, delta).displacement.reshape(x.shape)
        found = i2f.invert(model, J.gradient + delta, None, x.shape, method="recursive")
        assert found.converged
        assert found.matched
        assert float((found.x - x - expected).norm()) < 1e-4 * float(expected.norm())
        rough = i2f.invert(model, J.gradient + delta, None, x.shape, method="recursive", polish=False)
        assert mse(rough, x) > 4 * mse(found, x)

    def test_the_callback_sees_the_search(self):
        model, x, seen = resnet(), image(3, 12, 12), []
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", callback=seen.append)
        assert [one.step for one in seen] == list(range(1, found.steps + 1))
        assert [one.evaluations for one in seen] == sorted(one.evaluations for one in seen)

    def test_where_the_equations_are_too_few_it_says_so(self):
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(18, 4)).double().eval()
        x = image(1, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        assert not found.matched
        assert not found.converged
        assert "unknowns per channel" in found.reason

    def test_a_small_residual_of_a_wrong_image_is_no_match(self):
        """Weights so small that the gradient hardly shows the image."""
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(18, 4)).double().eval()
        with torch.no_grad():
            model[0].weight *= 1e-5
            model[2].weight *= 1e-5
        x = image(1, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        assert mse(found, x) > 1e-3
        assert found.relative_residual < 1e-3
        assert not found.matched


class TestRefusals:
    @pytest.mark.parametrize(
        ("layers", "words"),
        [
            ([nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(400, 3)], r"1 \(Sigmoid\)"),
            (
                [nn.Conv2d(1, 4, 3, padding_mode="circular", padding=1), nn.Flatten(), nn.Linear(576, 3)],
                r"0 \(Conv2d\)",
            ),
            ([nn.Flatten(), nn.Linear(144, 3, bias=False)], "no bias"),
            ([nn.Flatten(), nn.Linear(144, 3), nn.ReLU()], "does not end in a linear layer"),
        ],
    )
    def test_a_network_that_it_cannot_read(self, layers, words):
        model, x = nn.Sequential(*layers).double().eval(), image(1, 12, 12)
        sent = [torch.ones_like(p) for p in model.parameters()]
        with pytest.raises(ValueError, match=words):
            i2f.invert(model, sent, torch.tensor([0]), x.shape, method="recursive")

    def test_control_flow(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(144, 3)

            def forward(self, x):
                x = x.flatten(1)
                return self.layer(x if x.sum() > 0 else -x)

        model, x = Branch().double().eval(), image(1, 12, 12)
        with pytest.raises(ValueError, match="cannot be read as a graph"):
            i2f.invert(model, gradient(model, x, 1), None, x.shape, method="recursive")

    def test_a_batch_a_mask_and_a_frozen_layer(self):
        model, x = plain(), image(1, 12, 12)
        sent = gradient(model, x)
        with pytest.raises(ValueError, match="one image"):
            i2f.invert(model, sent, torch.tensor([0, 1]), (2, 1, 12, 12), method="recursive")
        mask = torch.ones(sum(g.numel() for g in sent), dtype=torch.bool)
        with pytest.raises(ValueError, match="mask"):
            i2f.invert(model, sent, None, x.shape, method="recursive", mask=mask)
        model[2].weight.requires_grad_(False)
        parts = [g for g, p in zip(sent, model.parameters(), strict=True) if p.requires_grad]
        with pytest.raises(ValueError, match=r"2\.weight is frozen"):
            i2f.invert(model, parts, None, x.shape, method="recursive")

    def test_a_module_used_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(144, 3)

            def forward(self, x):
                return self.head(self.conv(torch.relu(self.conv(x))).flatten(1))

        model, x = Twice().double().eval(), image(1, 12, 12)
        with pytest.raises(ValueError, match="'conv' twice"):
            i2f.invert(model, gradient(model, x, 1), None, x.shape, method="recursive")


class TestForecast:
    def test_it_names_the_layer_and_its_rank_before_any_gradient(self):
        model, x = plain(), image(1, 12, 12)
        expected = [layer for layer in forecast(model, x.shape) if layer.what != "linear"]
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        measured = {layer.name: layer for layer in found.layers}
        assert any(layer.short for layer in expected)
        assert len(measured) > 2
        for layer in expected:
            if layer.layer in measured:
                assert measured[layer.layer].unknowns == layer.unknowns
                assert measured[layer.layer].rank <= layer.rank <= measured[layer.layer].rank + 2
        assert found.layers[-1].name == next(layer.layer for layer in expected if layer.short)

    def test_pools(self):
        layers = [nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 3)]
        model = nn.Sequential(*layers).eval()
        for shape, short in (((1, 1, 3, 3), False), ((1, 1, 4, 4), True)):  # nine entries of a patch
            assert [(layer.what, layer.short) for layer in forecast(model, shape)][1] == ("pool", short)
        model[0] = nn.Conv2d(5, 40, 3, padding=1)
        for pixels, short in ((6, False), (7, True)):  # 40 channels
            assert forecast(model, (1, 5, pixels, pixels))[1].short == short
        model[2] = nn.MaxPool2d(6)
        assert [(layer.what, layer.short) for layer in forecast(model, (1, 5, 6, 6))][1] == ("maximum", False)


class TestPool:
    """What a weight gradient shows where the signal is not known."""

    @pytest.mark.parametrize(("stride", "size"), [(1, (7, 5)), (2, (9, 9))])
    def test_patches_are_found_in_their_span(self, stride, size):
        conv = conv_node(nn.Conv2d(12, 40, 3, stride, 1), (12, *size))
        A = patches(torch.rand(12, *size, dtype=torch.float64), conv.module).T
        V = torch.linalg.svd(torch.randn(40, len(A), dtype=torch.float64) @ A, full_matrices=False)[2][: len(A)]
        found = pool.overlapping(V, conv, (12, *size))
        factor = (A * found).sum() / found.square().sum()
        assert torch.allclose(factor * found, A, atol=1e-9)

    def test_another_space_holds_no_patches(self):
        conv = conv_node(nn.Conv2d(12, 40, 3, padding=1), (12, 4, 4))
        V = torch.linalg.qr(torch.randn(108, 16, dtype=torch.float64))[0].T
        assert pool.overlapping(V, conv, (12, 4, 4)) is None
        one = conv_node(nn.Conv2d(12, 40, 1), (12, 4, 4))  # patches that do not overlap
        assert pool.overlapping(torch.eye(12, dtype=torch.float64), one, (12, 3, 4)) is None

    @pytest.mark.parametrize(
        ("module", "size"),
        [(nn.Conv2d(12, 60, 3, padding=2, dilation=2), 4), (nn.Conv2d(12, 60, 3, 3), 12), (nn.Conv2d(12, 60, 2, 2), 8)],
        ids=["dilated", "three apart", "two apart"],
    )
    def test_patches_that_are_not_tied_together_are_not_found(self, module, size):
        conv = conv_node(module, (12, size, size))
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            value = torch.rand(12, size, size, generator=generator, dtype=torch.float64)
            A = patches(value, module).T
            mixed = torch.randn(40, len(A), generator=generator, dtype=torch.float64) @ A
            V = torch.linalg.svd(mixed, full_matrices=False)[2][: len(A)]
            assert pool.overlapping(V, conv, (12, size, size)) is None

    def test_a_bottleneck_with_dead_channels(self):
        torch.manual_seed(0)
        layers = [nn.Conv2d(6, 120, 3, padding=1), nn.ReLU(), nn.Conv2d(120, 150, 1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(150, 5)).double().eval()
        with torch.no_grad():
            model[0].weight[:30] = 0
        x = noise_image(6, 5)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        assert mse(found, x) < 1e-20

    def test_a_short_gradient_says_how_many_positions_it_tells_apart(self):
        model, x = averaged(nn.Conv2d(8, 30, 3, padding=1)), noise_image(8, 6)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive", polish=False)
        assert "only 30 of 36 positions" in found.reason

    @pytest.mark.parametrize("slope", [0.0, 0.2])
    @pytest.mark.parametrize("noise", [0.0, 1e-3])
    def test_masks_behind_an_average_of_many_positions(self, slope, noise):
        model, x = averaged(nn.Conv2d(8, 60, 3, padding=1), slope), noise_image(8, 6)
        graph, sent = Graph(model, x.shape), gradient(model, x)
        parts = dict(zip([name for name, _ in model.named_parameters()], sent, strict=True))
        parts["0.weight"] = parts["0.weight"] + noise * parts["0.weight"].square().mean().sqrt() * torch.randn(
            parts["0.weight"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        relu = graph.nodes["_1"]
        signal = ((torch.softmax(model(x), 1) - F.one_hot(torch.tensor([3]), 5)) @ model[4].weight)[0] / 36
        score = pool.scores(graph, parts, relu, signal.detach().reshape(-1, 1, 1).expand(relu.shape), max(noise, 1e-14))
        wrong = (score > 0) != (graph.values(x[0])["_0"] > 0)
        assert int(wrong.sum()) <= (noise > 0) * 0.02 * wrong.numel()
        assert noise or torch.allclose(score.abs(), torch.tensor((1 - slope) / 2, dtype=torch.float64), atol=1e-6)

    def test_a_bottleneck_behind_an_average(self):
        """The patches of the last convolution, 1×1, do not overlap; those of the one before it do."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(6, 120, 3, padding=1), nn.ReLU(), nn.Conv2d(120, 150, 1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(150, 5)).double().eval()
        x = noise_image(6, 5)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-20

    @pytest.mark.parametrize("where", ["before the ReLU", "after it", "between two"])
    def test_below_a_maximum(self, where):
        torch.manual_seed(0)
        both = {"before the ReLU": [nn.MaxPool2d(2), nn.ReLU()], "after it": [nn.ReLU(), nn.MaxPool2d(2)]}
        both = both.get(where, [nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()])
        layers = [nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 60, 3, padding=1), *both]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(540, 5)).double().eval()
        x = image(3, 12, 12)
        found = i2f.invert(model, gradient(model, x), None, x.shape, method="recursive")
        assert mse(found, x) < 1e-20
        parts = gradient(model, x)
        parts[2] = torch.randn_like(parts[2])  # contradicts what the layer above shows
        assert mse(i2f.invert(model, parts, None, x.shape, method="recursive", polish=False), x) > 1e-4


def conv_node(module: nn.Conv2d, shape: tuple[int, ...]) -> Node:
    return Node("conv", "conv", ("input",), tuple(module(torch.zeros(1, *shape)).shape[1:]), module=module)


def noise_image(channels: int, size: int) -> torch.Tensor:
    """Its masks differ from position to position."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)


def averaged(convolution: nn.Conv2d, slope: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    convolution.reset_parameters()
    pool_ = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(convolution.out_channels, 5)]
    return nn.Sequential(convolution, nn.LeakyReLU(slope) if slope else nn.ReLU(), *pool_).double().eval()


class TestLifted:
    def search(self, model, x):
        """Of an attack on ∇L(x)."""
        sent = torch.cat([g.flatten() for g in gradient(model, x)])
        _, ((problem,),) = make_problems(model, [sent], None, x.shape, *understood({"method": "recursive"}))
        return lifted.Search(problem, Graph(problem.gmap.model, tuple(x.shape)), lifted.Factors())

    def test_gates_on_the_wrong_side_are_read_off_the_gradient(self):
        """The start lies beyond the kinks of many units; without noise the search ends at the truth."""
        model, x = resnet(), image(3, 12, 12)
        search = self.search(model, x)
        error = 3e-3 * torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        start = x[0] + error
        one, two = (search._flat(search.graph.values(z)) > 0 for z in (x[0], start))
        assert int((one != two).sum()) > 5
        found = search.run(start, error)
        assert found.settled
        assert found.beyond == 0
        assert float((found.x - x[0]).norm()) < 1e-6 * float(error.norm())

    def test_too_many_doubts_are_no_start(self, monkeypatch):
        model, x = resnet(), image(3, 12, 12)
        search = self.search(model, x)
        monkeypatch.setattr(lifted, "MOST", 10)
        assert search.run(x[0], torch.ones_like(x[0])) is None

    def test_held_gates_are_the_network_where_they_are_its_own(self):
        model, x = resnet(), image(3, 12, 12)
        graph = Graph(model, x.shape)
        relus = [node for node in graph.nodes.values() if node.kind == "relu"]
        u = torch.cat([graph.values(x[0])[node.inputs[0]].flatten() for node in relus])
        held = lifted.Held(model, tuple(x.shape[1:]), (u > 0).double(), {node.name: node.shape for node in relus})
        z = torch.cat([x.flatten(), torch.zeros_like(u)])[None]
        assert torch.allclose(held(z), model(x), atol=1e-12)
        z[0, x.numel() + int(u.argmax())] -= 1  # one gate closed
        assert float((held(z) - model(x)).detach().norm()) > 1e-6

    def test_the_preconditioner_is_nearly_the_gram_matrix(self, residual):
        (J, x), model = residual, resnet()
        graph = Graph(model, x.shape)
        logits = model(x).detach().requires_grad_()
        (signal,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([3])), logits)
        factor = gram.preconditioner(graph, graph.values(x[0]), signal[0])
        assert factor is not None
        L = factor.double()
        H = J.gram()
        ratio = torch.linalg.eigvalsh(
            torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, H, upper=False).T, upper=False)
        )
        own = torch.linalg.eigvalsh(H)
        assert float(own[-1] / own[0]) > 500
        assert float(ratio[-1] / ratio[0]) < 20

    def test_one_preconditioner_serves_the_same_image_under_other_noise(self, monkeypatch):
        model, x = plain(), image(1, 12, 12)
        sent, made = torch.cat([g.flatten() for g in gradient(model, x)]), []
        whole = gram.preconditioner
        monkeypatch.setattr(lifted, "preconditioner", lambda *a: made.append(1) or whole(*a))
        noise = 1e-5 * torch.randn(2, len(sent), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        i2f.invert_many(model, list(sent + noise), None, x.shape, method="recursive")
        assert made == [1]


class TestParts:
    @pytest.mark.parametrize(
        "options",
        [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"kernel_size": (1, 3), "stride": (2, 1)}],
    )
    def test_the_equations_are_the_weight_gradient(self, options):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, **{"kernel_size": 3, **options}).double()
        a = torch.randn(3, 7, 6, dtype=torch.float64)
        out = conv(a[None])
        delta = torch.randn_like(out)
        (G,) = torch.autograd.grad(out, conv.weight, delta)
        T = equations(delta[0], conv, a.shape)
        assert torch.allclose(T @ a.flatten(1).T, G.permute(0, 2, 3, 1).reshape(len(T), -1), atol=1e-12)
        again = delta[0].flatten(1) @ patches(a, conv).T
        assert torch.allclose(again, G.flatten(1), atol=1e-12)

    def test_a_system_is_solved_in_its_modes(self):
        torch.manual_seed(0)
        T = torch.randn(12, 4, dtype=torch.float64) @ torch.randn(4, 9, dtype=torch.float64)
        a = torch.randn(9, 5, dtype=torch.float64)
        system = System(slice(0, 5), T, T @ a, [12])
        found = system.solve()
        assert system.rank == 4
        assert not system.full
        expected = torch.from_numpy(np.linalg.lstsq(T.numpy(), (T @ a).numpy(), rcond=1e-10)[0])
        assert torch.allclose(found.T, expected, atol=1e-9)
        assert torch.allclose(system.misfit(a.T), torch.zeros(4, 5, dtype=torch.float64), atol=1e-9)

    def test_the_tangent_is_the_derivative_and_its_transpose(self):
        model, x = resnet(), image(3, 12, 12)
        graph = Graph(model, x.shape)
        tangent = Tangent(graph, [graph.output], graph.values(x[0]))
        t, v = torch.randn_like(x[0]), torch.randn(5, dtype=torch.float64)
        expected = central(model, x, t[None])[0]
        assert torch.allclose(tangent(t)[graph.output], expected, atol=1e-8)
        (back,) = torch.autograd.grad(model(x.requires_grad_())[0] @ v, x)
        assert torch.allclose(tangent.transpose({graph.output: v}), back[0], atol=1e-12)

    def test_the_tangent_of_a_stack_and_of_maxima(self):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 4)]
        model, x = nn.Sequential(*layers).double().eval(), image(1, 12, 12)
        graph = Graph(model, x.shape)
        tangent = Tangent(graph, ["_2"], graph.values(x[0]))
        stack = torch.randn(5, 1, 12, 12, dtype=torch.float64)
        each = torch.cat([central(model[:3], x, t[None]) for t in stack])
        assert torch.allclose(tangent(stack)["_2"], each, atol=1e-8)

    def test_masks_by_likelihood(self):
        value, spread = torch.tensor([0.5, 0.02, -0.02, 0.0]), torch.full((4,), 0.01)
        assert (masks.of_values(value, spread, 0.0) > 0).tolist() == [True, False, False, False]  # two σ are no proof
        assert (masks.of_values(value, spread, 0.1) > 0).tolist()[:3] == [True, True, False]  # a sign is
        ratio = torch.tensor([1.02, 0.48, 0.03])
        assert (masks.of_signals(ratio, torch.full((3,), 0.1), 0.0) > 0).tolist() == [True, False, False]

    @pytest.mark.parametrize("leak", [0.0, 0.2])
    def test_moments_of_a_relu(self, leak):
        u, s = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.7], dtype=torch.float64)
        nodes, weights = np.polynomial.hermite_e.hermegauss(150)
        z = u[:, None] + s[:, None] * torch.from_numpy(nodes)
        p = torch.from_numpy(weights / weights.sum())
        f = F.leaky_relu(z, leak)
        mean, slope, left = linearised.relu_moments(u, s, leak)
        expected = (f * p).sum(1)
        covariance = ((f - expected[:, None]) * (z - u[:, None]) * p).sum(1)
        variance = ((f - expected[:, None]).square() * p).sum(1)
        assert torch.allclose(mean, expected, atol=3e-3)
        assert torch.allclose(slope, covariance / s.square(), atol=1e-2)
        assert torch.allclose(left, variance - covariance.square() / s.square(), atol=1e-2)

    def test_bounded_least_squares(self):
        generator = np.random.default_rng(0)
        A, a = generator.normal(size=(14, 20)), np.maximum(generator.normal(size=20) - 0.4, 0)
        H, b = torch.from_numpy(A.T @ A), torch.from_numpy(A.T @ (A @ a))
        lower, upper = torch.zeros(20, dtype=torch.float64), torch.full((20,), torch.inf, dtype=torch.float64)
        found = completion.bounded(lambda v: H @ v, b, lower, upper)
        assert np.allclose(
            nnls(A, A @ a)[0], a, atol=1e-8
        )  # the signs determine it, with fewer equations than unknowns
        assert np.allclose(found.numpy(), a, atol=1e-7)
        tight = torch.full((20,), 0.1, dtype=torch.float64)
        assert completion.bounded(lambda v: H @ v, b, lower, tight) is None  # lsq_linear: nothing within reaches it
        assert lsq_linear(A, A @ a, (0, 0.1)).cost > 1e-3
