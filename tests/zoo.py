"""Small networks of every kind, each with an input, labels and a loss: what people bring.

`RIGHT`: J is defined and must be exact. `REFUSED`: there is none, or none that this package could take, and the error
must name the reason. `EITHER`: exact, or refused for that reason. d_x ≤ 40 and d_θ < 500, float64, seeded.
"""

import collections
import copy
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    """`meant`: the loss and labels that plain PyTorch needs, where it does not take these."""

    model: nn.Module
    x: Tensor
    y: Any
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    meant: tuple[Callable[[Any, Any], Tensor], Any] | None = None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A stream of its own, and float64 as the default."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(name: str) -> Case:
    """The same at every call."""
    make = {**RIGHT, **{key: value[0] for key, value in {**REFUSED, **EITHER}.items()}}[name]
    with seeded(zlib.crc32(name.encode())), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hook-style parametrizations and scripts are deprecated, and still in use
        return make()


class Net(nn.Module):
    """Parts, and a forward written beside them: forward(net, x)."""

    def __init__(self, forward: Callable[["Net", Tensor], Any], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.rule = forward

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


def labels(n: int = 1) -> Tensor:
    return torch.arange(1, n + 1) % 3


def around(layer: nn.Module, *shape: int, n: int = 1) -> Case:
    """The layer, then tanh and a linear classifier."""
    x = torch.rand(n, *shape)
    width = layer.eval()(x).flatten(1).shape[1]
    return Case(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).eval(), x, labels(n))


def between(layer: nn.Module, width: int = 6, *, n: int = 1) -> Case:
    """A linear layer before and one behind it."""
    x, before = torch.rand(n, 5), nn.Linear(5, width)
    out = layer.eval()(before(x)).flatten(1).shape[1]
    return Case(nn.Sequential(before, layer, nn.Linear(out, 3)).eval(), x, labels(n))


def spatial(layer: nn.Module, *shape: int, channels: int = 2, n: int = 1) -> Case:
    """A convolution before it, of as many axes as the input has, and a linear classifier behind it."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2](
        shape[0], channels, 3 if len(shape) < 4 else 1, padding="same"
    )
    x = torch.rand(n, *shape)
    first = nn.Sequential(conv, nn.Tanh())
    width = layer.eval()(first(x)).flatten(1).shape[1]
    return Case(nn.Sequential(*first, layer, nn.Flatten(), nn.Linear(width, 3)).eval(), x, labels(n))


def bounded(layer: nn.Module) -> Case:
    """An elementwise layer with kinks on (-3, 3): its inputs are spread, and no kink lies within 1e-3 of one."""
    return Case(nn.Sequential(Spread(), layer, nn.Linear(8, 3)).eval(), torch.rand(1, 5), labels())


class Spread(nn.Linear):
    """Preactivations near -3.3, -2.2, …, 4.4, so that every piece of an activation is met."""

    def __init__(self):
        super().__init__(5, 8)
        with torch.no_grad():
            self.weight.mul_(0.3)
            self.bias.copy_(1.1 * torch.arange(-3, 5))


def sequence(layer: nn.Module, batch_first: bool = True, width: int = 3, n: int = 1) -> Case:
    """A recurrent layer over four steps, then a classifier of all its outputs."""
    x = torch.rand(n, 4, width)

    def forward(net: Net, x: Tensor) -> Tensor:
        out = net.layer(x if batch_first else x.transpose(0, 1))[0]
        return net.head(torch.tanh(out if batch_first else out.transpose(0, 1)).flatten(1))

    out = layer(x)[0].shape[-1]
    return Case(Net(forward, layer=layer, head=nn.Linear(4 * out, 3)).eval(), x, labels(n))


def attention(forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> Case:
    """Three tokens of width four."""
    return Case(Net(forward, head=nn.Linear(12, 3), **parts).eval(), torch.rand(1, 3, 4), labels())


def mlp(last: nn.Module | None = None, out: int = 3) -> nn.Sequential:
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, out)]
    return nn.Sequential(*layers, *([] if last is None else [last])).eval()


def with_loss(loss: Callable[[Any, Any], Tensor], y: Any, *, out: int = 3, last: nn.Module | None = None) -> Case:
    y = y() if callable(y) else y
    return Case(mlp(last, out), torch.rand(len(y), 5), y, loss)


def changed(change: Callable[[nn.Sequential], Any], model: Callable[[], nn.Sequential] = mlp) -> Case:
    """A small network after `change`, which alters it in place or returns another."""
    net = model()
    other = change(net)
    return Case((other if isinstance(other, nn.Module) else net).eval(), torch.rand(1, 5), labels())


def forwarded(
    forward: Callable[[Net, Tensor], Any], loss: Callable = F.cross_entropy, n: int = 1, **parts: Any
) -> Case:
    """Two linear layers, `a` and `b`, and a forward that uses them."""
    return Case(Net(forward, a=nn.Linear(5, 7), b=nn.Linear(7, 3), **parts).eval(), torch.rand(n, 5), labels(n), loss)


# ---- forwards


def soft_lookup(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(x.softmax(-1) @ net.table.weight).flatten(1))


def lstm_with_fixed_state(net: Net, x: Tensor) -> Tensor:
    out, _ = net.layer(x, (net.h, net.c))
    return net.head(out.flatten(1))


def cells(net: Net, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = net.cell(step, state)
    return net.head(state[0] if isinstance(state, tuple) else state)


def in_place(net: Net, x: Tensor) -> Tensor:
    x.mul_(2).sub_(0.5)
    return net.b(torch.tanh(net.a(x)))


def unpool(net: Net, x: Tensor) -> Tensor:
    pooled, where = F.max_pool2d(net.conv(x), 2, return_indices=True)
    return net.head(F.max_unpool2d(torch.tanh(pooled), where, 2).flatten(1))


def under_no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.tanh(net.a(x))
    return net.b(z)


def half_under_no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(net.a(x))
    return net.b(torch.tanh(net.a(x)) * gate)


class Round(torch.autograd.Function):
    """A straight-through estimator: its backward is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return by_output


class Clipped(torch.autograd.Function):
    """The identity, with a backward that clips: as gradient-reversal and clipping layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return -0.5 * by_output


class Square(torch.autograd.Function):
    """x², rightly differentiable twice, without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * by_output


class Once(torch.autograd.Function):
    """tanh with a backward that is marked as having no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return (1 - ctx.saved_tensors[0] ** 2) * by_output


class Sine(torch.autograd.Function):
    """sin with two derivatives and no third."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return SineBackward.apply(ctx.saved_tensors[0], by_output)


class SineBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by_output: Tensor) -> Tensor:
        ctx.save_for_backward(x, by_output)
        return x.cos() * by_output

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        return SineLast.apply(*ctx.saved_tensors, v)


class SineLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by_output: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return -x.sin() * by_output * v, x.cos() * v


class Cube(torch.autograd.Function):
    """x³ with everything that PyTorch asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * by_output

    @staticmethod
    def jvp(ctx: Any, along: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * along


class Gated(torch.autograd.Function):
    """z · sin z, whose backward takes the factor sin z for a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.gate = z.detach().sin()
        return z * ctx.gate

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> Tensor:
        return by_output * ctx.gate


class Symmetric(nn.Module):
    """A parametrization: W = A + Aᵀ."""

    def forward(self, a: Tensor) -> Tensor:
        return a + a.mT


class Aliased(nn.Module):
    """One weight under two names; `forward` uses the second."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.tied = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.tied)))


class Renamed(nn.Module):
    """Both names in one module, as embeddings that are also the output's weight have them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(5, 5))
        self.tied, self.head = self.weight, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.tanh(x @ self.weight) @ self.tied))


class Listed(Aliased):
    """The second name is an entry of a plain list."""

    def __init__(self):
        super().__init__()
        del self.tied
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.kept[0])))


class Viewed(Aliased):
    """The second name is a view that was taken at construction, with its graph."""

    def __init__(self):
        super().__init__()
        del self.tied
        self.turned = self.first.weight.mT

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.turned)))


class HiddenLayers(nn.Module):
    """Layers in a plain list, whose parameters are registered by hand, as nets of older code are."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(5, 6), nn.Linear(6, 3)]
        for k, layer in enumerate(self.layers):
            self.register_parameter(f"w{k}", layer.weight)
            self.register_parameter(f"b{k}", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class InClosure(nn.Module):
    """The forward is a function that holds the layer itself, and so does a registered name."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        layer = self.layer
        self.function = lambda x: torch.tanh(layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x))


class Norms(nn.Module):
    """Normalisations called as functions, by a class of the user's own."""

    def __init__(self, norm: Callable[..., Tensor], scale: bool = True):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 6), nn.Linear(6, 3), norm
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(6)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.a(x)) if self.scale is None else self.norm(self.a(x), self.scale)
        return self.b(torch.tanh(z))


class Twice(nn.Linear):
    """A subclass of a known layer that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.tanh(super().forward(x))


def inner_step(create_graph: bool) -> Callable[[Net, Tensor], Tensor]:
    """The features after one step down an energy of their own, as energy-based networks and MAML have them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = net.a(x)
            z = z if z.requires_grad else z.requires_grad_()
            (slope,) = torch.autograd.grad(z.sin().square().sum(), z, create_graph=create_graph)
        return net.b(z - 0.3 * slope)

    return forward


def fixed_point(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = x.new_zeros(1, 7)
        for _ in range(5):
            z = torch.tanh(net.a(x) + 0.3 * z)
    return net.b(torch.tanh(net.a(x) + 0.3 * z))


def without_grad(net: Net, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = torch.tanh(net.a(x))
    torch.set_grad_enabled(before)
    return net.b(z * net.a(x))


def in_inference_mode(net: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        z = torch.tanh(net.a(x))
    return net.b(z.clone())


def clamping(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.a.weight.clamp_(-0.2, 0.2)
    return net.b(torch.tanh(net.a(x)))


def experts(net: Net, x: Tensor) -> Tensor:
    weight, which = net.d(x).softmax(-1).topk(2)
    return net.b(sum(w * torch.tanh(net.c[i](x)) for w, i in zip(weight[0], which[0].tolist(), strict=True)))


def hypernetwork(net: Net, x: Tensor) -> Tensor:
    weight = net.c(x).view(3, 7)
    return torch.func.functional_call(net.b, {"weight": torch.tanh(weight)}, (torch.tanh(net.a(x)),))


def packed(net: Net, x: Tensor) -> Tensor:
    lengths = torch.tensor([4, 2])
    _, h = net.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
    return net.head(h[-1])


def fresh(net: Net, x: Tensor) -> Tensor:
    out = x.new_zeros(1, 7)
    out += torch.tanh(net.a(x))
    out[:, 0] = x.sum()
    return net.b(out)


def keeping(net: Net, x: Tensor) -> Tensor:
    net.features = torch.tanh(net.a(x))
    return net.b(net.features)


def run_before(case: Case) -> Case:
    case.model(case.x)
    return case


@dataclass
class Answer:
    logits: Tensor


class Opaque:
    """An output that shows its tensors on request alone."""

    def __init__(self, logits: Tensor):
        self._logits = logits

    def logits(self) -> Tensor:
        return self._logits


def cached(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "product"):
        net.product = net.a.weight.T @ net.a.weight
    return net.b(torch.tanh(net.a(x))) * (x @ net.product @ x.T)


def cached_before() -> Case:
    with torch.no_grad():
        return run_before(forwarded(cached))


def building(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "table"):
        net.register_buffer("table", torch.linspace(0, 1, x.shape[1], dtype=x.dtype))
    return net.b(torch.tanh(net.a(x + net.table)))


def masked(net: Net, x: Tensor) -> Tensor:
    z = net.a(x) * 2
    z[z < 0.05] = 0.3
    return net.b(z.sin())


def hooked_activation(net: Net, x: Tensor) -> Tensor:
    z = torch.tanh(net.a(x))
    if z.requires_grad:
        z.register_hook(lambda g: 2 * g)
    return net.b(z)


def clipped_activation(net: Net, x: Tensor) -> Tensor:
    z = torch.tanh(net.a(x))
    if z.requires_grad:
        z.register_hook(lambda g: g / g.norm())
    return net.b(z)


def nearest(net: Net, x: Tensor) -> Tensor:
    z = net.a(x)
    q = net.codes(torch.cdist(z, net.codes.weight).argmin(1))
    return net.b(torch.tanh(z + (q - z).detach()) + 0.1 * (q - z.detach()) + 0.1 * (q.detach() - z))


def exported(net: nn.Module) -> Case:
    x = torch.rand(1, 5)
    return Case(torch.export.export(net, (x,)).module(), x, labels())


def features_in_loss() -> Case:
    case = run_before(forwarded(keeping))
    return case._replace(loss=lambda out, y: F.cross_entropy(out, y) + 0.1 * case.model.features.square().mean())


def knows_parent() -> Case:
    case = forwarded(lambda net, x: net.b(torch.tanh(net.a(x))) * net.a.parent[0].scale)
    case.model.scale, case.model.a.parent = 1.5, [case.model]
    return case


COMPILED = torch.compile(lambda z: z.sin() * z, backend="aot_eager")


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt(), self.bias)


class Adapted(nn.Module):
    """A frozen layer and a trainable product of two thin matrices beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(5, 6).requires_grad_(False), nn.Linear(6, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + x @ self.down.T @ self.up.T))


Output = collections.namedtuple("Output", ("logits", "features"))


# ---- changes


def patched(net: nn.Sequential) -> None:
    old = net[0].forward
    net[0].forward = lambda x: old(x) * 2


def patched_activation(net: nn.Sequential) -> None:
    net[1].forward = lambda x: torch.tanh(x) + 0.1 * x**2


def hooked(net: nn.Sequential) -> None:
    net[0].register_forward_hook(lambda module, args, out: out * 2)


def pre_hooked(net: nn.Sequential) -> None:
    net[2].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))


def backward_hooked(net: nn.Sequential) -> None:
    net[1].register_full_backward_hook(lambda module, by_input, by_output: (2 * by_input[0],))


def backward_pre_hooked(net: nn.Sequential) -> None:
    net[1].register_full_backward_pre_hook(lambda module, by_output: (2 * by_output[0],))


def parameter_hooked(net: nn.Sequential) -> None:
    net[0].weight.register_hook(lambda g: 2 * g)


def double_grad(parameter: Tensor) -> None:
    parameter.grad.mul_(2)


def accumulation_hooked(net: nn.Sequential) -> None:
    net[0].weight.register_post_accumulate_grad_hook(double_grad)


def pruned(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[0], "weight", 0.4)
    prune.random_structured(net[2], "weight", 0.3, dim=1)


def frozen_first(net: nn.Sequential) -> None:
    net[0].requires_grad_(False)


def frozen_head(net: nn.Sequential) -> None:
    net[2].requires_grad_(False)


def biases_only(net: nn.Sequential) -> None:
    net[0].weight.requires_grad_(False)
    net[2].weight.requires_grad_(False)


def turned_weight(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.randn(5, 7).T)


def hook_spectral(net: nn.Sequential) -> None:
    net.train()
    nn.utils.spectral_norm(net[0])
    net(torch.rand(1, 5))  # a power step, and a weight with a graph
    net.eval()


def hook_weight_norm(net: nn.Sequential) -> None:
    nn.utils.weight_norm(net[0])
    nn.utils.weight_norm(net[2], dim=None)
    net(torch.rand(1, 5))


def compiled_in_place(net: nn.Sequential) -> None:
    net.compile(backend="eager")


def grad_sample(net: nn.Sequential) -> nn.Module:
    from opacus import GradSampleModule

    return GradSampleModule(net)


def fast_clipping(net: nn.Sequential) -> nn.Module:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return GradSampleModuleFastGradientClipping(net, max_grad_norm=1.0)


def quantized(net: nn.Sequential) -> nn.Module:
    scale = torch.tensor(0.05, dtype=torch.float32)
    zero = torch.tensor(0, dtype=torch.int32)
    net[1].forward = lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)
    return net


def loss_with_weights(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy and a penalty on the network's own weights."""
    return lambda out, y: F.cross_entropy(out, y) + 0.1 * sum(p.square().sum() for p in model.parameters())


def penalized() -> Case:
    net = mlp()
    return Case(net, torch.rand(1, 5), labels(), loss_with_weights(net))


def shared_module() -> Case:
    layer = nn.Linear(5, 5)
    return Case(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3)).eval(), torch.rand(1, 5), labels())


def shared_activation() -> Case:
    act = nn.Tanh()
    net = nn.Sequential(nn.Linear(5, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3))
    return Case(net.eval(), torch.rand(1, 5), labels())


def tied_ends() -> Case:
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    net[4].weight = net[0].weight
    return Case(net.eval(), torch.rand(1, 5), labels())


def position_table(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(x + net.table(net.index)).flatten(1))


def bag(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.table(net.index, per_sample_weights=x)))


def stored(norm: nn.Module) -> nn.Module:
    """The normalisation with statistics that are not the initial ones."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def channels_last() -> Case:
    case = around(nn.Conv2d(2, 3, 2), 2, 3, 3, n=2)
    return case._replace(
        model=case.model.to(memory_format=torch.channels_last), x=case.x.to(memory_format=torch.channels_last)
    )


def dictionary(out: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(out["logits"], y) + 0.1 * out["features"].square().mean()


MASK = torch.ones(3, 3).triu(1).bool()
SEQUENCE = {"batch_first": True}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
ENCODER = {"d_model": 4, "nhead": 2, "dim_feedforward": 5, "dropout": 0.0, **SEQUENCE}

# fmt: off
ACTIVATIONS = {
    **{type(layer).__name__: layer for layer in (
        nn.Identity(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(2.0), nn.ELU(0.7),
        nn.CELU(0.7), nn.SELU(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Hardswish(), nn.ReLU(),
        nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh(), nn.Softshrink(), nn.Hardshrink(), nn.Threshold(0.6, 0.3),
        nn.RReLU(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1), nn.Dropout(), nn.AlphaDropout(),
    )},
    **{f"{type(layer).__name__}, in place": layer for layer in (
        nn.ReLU(True), nn.ELU(0.7, True), nn.LeakyReLU(0.2, True), nn.SiLU(True), nn.Hardswish(True), nn.SELU(True),
        nn.CELU(0.7, True), nn.ReLU6(True), nn.Mish(True), nn.Hardtanh(inplace=True), nn.Threshold(0.6, 0.3, True),
    )},
    "GELU, tanh": nn.GELU("tanh"),
    "GELU subclass": type("GELU", (nn.GELU,), {"forward": lambda self, x: 2 * F.gelu(x)})(),
}

RIGHT: dict[str, Callable[[], Case]] = {
    # layers with parameters
    "Linear": lambda: Case(nn.Linear(5, 3), torch.rand(1, 5), labels()),
    "Linear, no bias": lambda: between(nn.Linear(6, 4, bias=False)),
    "Linear on tokens": lambda: around(nn.Linear(4, 3), 3, 4),
    "Linear subclass": lambda: between(Twice(6, 4)),
    "NonDynamicallyQuantizable": lambda: between(nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4)),
    "LazyLinear": lambda: around(nn.LazyLinear(4), 5),
    "Bilinear": lambda: Case(Net(lambda net, x: net.b(torch.tanh(net.a(x, x.cos()))), a=nn.Bilinear(5, 5, 4),
        b=nn.Linear(4, 3)).eval(), torch.rand(1, 5), labels()),
    "Conv1d": lambda: around(nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 7),
    "Conv2d": lambda: around(nn.Conv2d(2, 3, 3, stride=2, padding=1), 2, 4, 4),
    "Conv2d, two layers": lambda: spatial(nn.Conv2d(2, 2, (2, 3), stride=(2, 1), padding=(0, 1)), 1, 4, 5),
    "Conv2d, dilated in one axis": lambda: spatial(nn.Conv2d(2, 2, 2, dilation=(1, 2)), 1, 4, 5, n=2),
    "Conv3d": lambda: around(nn.Conv3d(1, 2, 2), 1, 3, 3, 3),
    "ConvTranspose1d": lambda: around(nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), 2, 4),
    "ConvTranspose2d": lambda: around(nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1), 2, 3, 3),
    "ConvTranspose3d": lambda: around(nn.ConvTranspose3d(1, 1, 2), 1, 2, 2, 3),
    "Conv2d, groups": lambda: around(nn.Conv2d(4, 4, 2, groups=2), 4, 3, 3),
    "Conv2d, depthwise": lambda: around(nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3),
    "Conv2d, dilated": lambda: around(nn.Conv2d(1, 2, 2, dilation=2), 1, 4, 4),
    "Conv2d, same": lambda: around(nn.Conv2d(1, 2, 3, padding="same"), 1, 3, 4),
    "Conv2d, same, even kernel": lambda: around(nn.Conv2d(1, 2, 2, padding="same"), 1, 3, 3),
    "Conv2d, valid": lambda: around(nn.Conv2d(1, 2, 3, padding="valid"), 1, 4, 4),
    "Conv2d, circular": lambda: around(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), 1, 4, 4),
    "Conv2d, reflect": lambda: around(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), 1, 4, 4),
    "Conv2d, replicate": lambda: around(nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"), 1, 4, 4),
    "Conv1d, circular": lambda: around(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), 1, 6),
    "Embedding, soft lookup": lambda: Case(Net(soft_lookup, table=nn.Embedding(6, 4), head=nn.Linear(8, 3)).eval(),
        torch.rand(1, 2, 6), labels()),
    "Embedding, max_norm": lambda: Case(Net(position_table, table=nn.Embedding(6, 4, max_norm=10.0),
        index=torch.tensor([4, 1, 4]), head=nn.Linear(12, 3)).eval(), torch.rand(1, 3, 4), labels()),
    "Embedding, positions": lambda: Case(Net(position_table, table=nn.Embedding(6, 4, padding_idx=0),
        index=torch.tensor([4, 0, 4]), head=nn.Linear(12, 3)).eval(), torch.rand(1, 3, 4), labels()),
    "RNN": lambda: sequence(nn.RNN(3, 4, **SEQUENCE)),
    "RNN, relu": lambda: sequence(nn.RNN(3, 4, nonlinearity="relu", **SEQUENCE)),
    "LSTM": lambda: sequence(nn.LSTM(3, 3, **SEQUENCE)),
    "GRU": lambda: sequence(nn.GRU(3, 3, **SEQUENCE)),
    "GRU, no bias": lambda: sequence(nn.GRU(3, 3, bias=False, **SEQUENCE), n=2),
    "LSTM, time first": lambda: sequence(nn.LSTM(3, 3), batch_first=False),
    "LSTM, bidirectional": lambda: sequence(nn.LSTM(3, 2, bidirectional=True, **SEQUENCE)),
    "LSTM, two layers": lambda: sequence(nn.LSTM(3, 2, num_layers=2, dropout=0.3, **SEQUENCE).eval()),
    "LSTM, projection": lambda: sequence(nn.LSTM(3, 4, proj_size=2, **SEQUENCE)),
    "RNNCell": lambda: Case(Net(cells, cell=nn.RNNCell(3, 4), head=nn.Linear(4, 3)).eval(), torch.rand(1, 4, 3),
        labels()),
    "LSTMCell": lambda: Case(Net(cells, cell=nn.LSTMCell(3, 4), head=nn.Linear(4, 3)).eval(), torch.rand(1, 4, 3),
        labels()),
    "GRUCell": lambda: Case(Net(cells, cell=nn.GRUCell(3, 4), head=nn.Linear(4, 3)).eval(), torch.rand(1, 4, 3),
        labels()),
    "MultiheadAttention": lambda: attention(lambda net, x: net.head(net.a(x, x, x)[0].flatten(1)),
        a=nn.MultiheadAttention(4, 2, **SEQUENCE)),
    "MultiheadAttention, no weights": lambda: attention(lambda net, x: net.head(net.a(x, x, x,
        need_weights=False)[0].flatten(1)), a=nn.MultiheadAttention(4, 2, **SEQUENCE)),
    "MultiheadAttention, kv": lambda: attention(lambda net, x: net.head(net.a(x, x[..., :3], x[..., 1:3],
        need_weights=False)[0].flatten(1)), a=nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True,
        add_zero_attn=True, **SEQUENCE)),
    "MultiheadAttention, mask": lambda: attention(
        lambda net, x: net.head(net.a(x, x, x, attn_mask=MASK)[0].flatten(1)), a=nn.MultiheadAttention(4, 2,
        **SEQUENCE)),
    "scaled_dot_product_attention": lambda: attention(lambda net,
        x: net.head(F.scaled_dot_product_attention(*net.a(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4),
        is_causal=True).transpose(1, 2).flatten(1)), a=nn.Linear(4, 12)),
    "TransformerEncoderLayer, relu": lambda: attention(lambda net, x: net.head(net.a(x).flatten(1)),
        a=nn.TransformerEncoderLayer(**ENCODER)),
    "TransformerEncoderLayer, gelu": lambda: attention(lambda net, x: net.head(net.a(x).flatten(1)),
        a=nn.TransformerEncoderLayer(activation="gelu", **ENCODER)),
    "TransformerEncoderLayer, norm first": lambda: attention(lambda net, x: net.head(net.a(x).flatten(1)),
        a=nn.TransformerEncoderLayer(activation="gelu", norm_first=True, **ENCODER)),
    "TransformerEncoderLayer in Sequential": lambda: around(nn.TransformerEncoderLayer(**ENCODER), 3, 4),
    "TransformerEncoder": lambda: attention(lambda net, x: net.head(net.a(x).flatten(1)),
        a=nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2, enable_nested_tensor=False)),
    "TransformerDecoderLayer": lambda: attention(lambda net, x: net.head(net.a(x, x.cos()).flatten(1)),
        a=nn.TransformerDecoderLayer(**ENCODER)),
    "TransformerDecoderLayer, norm first": lambda: attention(lambda net, x: net.head(net.a(x, x.cos()).flatten(1)),
        a=nn.TransformerDecoderLayer(norm_first=True, activation=F.silu, **ENCODER)),
    "Transformer": lambda: attention(lambda net, x: net.head(net.a(x, x.cos()).flatten(1)), a=nn.Transformer(4, 2, 1, 1,
        5, 0.0, activation="gelu", **SEQUENCE)),
    "PReLU": lambda: bounded(nn.PReLU()),
    "PReLU, each channel": lambda: bounded(nn.PReLU(8)),
    "AdaptiveLogSoftmaxWithLoss": lambda: Case(Net(lambda net, x: net.b.log_prob(torch.tanh(net.a(x))), a=nn.Linear(5,
        6), b=nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2], div_value=2.0)).eval(), torch.rand(1, 5), labels(), F.nll_loss),
    "ParameterList": lambda: Case(Net(lambda net, x: torch.tanh(x @ net.p[0]) @ net.p[1] * net.d["scale"],
        p=nn.ParameterList([torch.randn(5, 4), torch.randn(4, 3)]),
        d=nn.ParameterDict({"scale": torch.tensor(0.7)})).eval(), torch.rand(1, 5), labels()),
    "an empty parameter": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))) + net.c.sum(),
        c=nn.Parameter(torch.empty(0))),
    # normalisations
    "LayerNorm": lambda: between(nn.LayerNorm(6)),
    "LayerNorm, no affine": lambda: between(nn.LayerNorm(6, elementwise_affine=False)),
    "LayerNorm on images": lambda: spatial(nn.LayerNorm((2, 3, 3)), 1, 3, 3),
    "LayerNorm, no bias": lambda: between(nn.LayerNorm(6, bias=False), n=2),
    "F.layer_norm": lambda: Case(Norms(lambda z, w: F.layer_norm(z, (6,), w)).eval(), torch.rand(1, 5), labels()),
    "torch.layer_norm": lambda: Case(Norms(lambda z, w: torch.layer_norm(z, (6,), w)).eval(), torch.rand(1, 5),
        labels()),
    "torch.native_layer_norm": lambda: Case(Norms(lambda z, w: torch.native_layer_norm(z, (6,), w, None,
        1e-5)[0]).eval(), torch.rand(1, 5), labels()),
    "RMSNorm": lambda: between(nn.RMSNorm(6)),
    "F.rms_norm": lambda: Case(Norms(lambda z, w: F.rms_norm(z, (6,), w)).eval(), torch.rand(1, 5), labels()),
    "F.normalize": lambda: Case(Norms(F.normalize, scale=False).eval(), torch.rand(1, 5), labels()),
    "F.group_norm": lambda: Case(Norms(lambda z, w: F.group_norm(z, 2, w)).eval(), torch.rand(1, 5), labels()),
    "F.batch_norm": lambda: Case(Norms(lambda z, w: F.batch_norm(z, None, None, w, training=True)).eval(), torch.rand(3,
        5), labels(3)),
    "F.instance_norm": lambda: Case(Norms(lambda z, w: F.instance_norm(z.view(1, 2, 3),
        weight=w[:2]).flatten(1)).eval(), torch.rand(1, 5), labels()),
    "GroupNorm": lambda: spatial(nn.GroupNorm(2, 4), 1, 3, 3, channels=4),
    "GroupNorm, no affine": lambda: spatial(nn.GroupNorm(2, 4, affine=False), 1, 3, 3, channels=4, n=2),
    "BatchNorm1d": lambda: between(stored(nn.BatchNorm1d(6))),
    "BatchNorm1d on sequences": lambda: spatial(stored(nn.BatchNorm1d(2)), 1, 5),
    "BatchNorm2d": lambda: spatial(stored(nn.BatchNorm2d(2)), 1, 3, 3),
    "BatchNorm3d": lambda: spatial(stored(nn.BatchNorm3d(2)), 1, 2, 2, 3),
    "SyncBatchNorm": lambda: spatial(stored(nn.SyncBatchNorm(2)), 1, 3, 3),
    "BatchNorm1d, its batch": lambda: between(nn.BatchNorm1d(6, track_running_stats=False), n=3),
    "BatchNorm2d, its batch": lambda: spatial(nn.BatchNorm2d(2, track_running_stats=False), 1, 3, 3),
    "BatchNorm2d, its batch of two": lambda: spatial(nn.BatchNorm2d(2, track_running_stats=False), 1, 3, 3, n=2),
    "BatchNorm2d, no affine": lambda: spatial(stored(nn.BatchNorm2d(2, affine=False)), 1, 3, 3),
    "BatchNorm3d, its batch": lambda: spatial(nn.BatchNorm3d(2, track_running_stats=False), 1, 2, 2, 3),
    "InstanceNorm1d": lambda: spatial(nn.InstanceNorm1d(2), 1, 5),
    "InstanceNorm1d, affine": lambda: spatial(nn.InstanceNorm1d(2, affine=True), 1, 5),
    "InstanceNorm2d": lambda: spatial(nn.InstanceNorm2d(2), 1, 3, 3),
    "InstanceNorm2d, affine": lambda: spatial(nn.InstanceNorm2d(2, affine=True), 1, 3, 3, n=2),
    "InstanceNorm2d, stored": lambda: spatial(stored(nn.InstanceNorm2d(2, track_running_stats=True)), 1, 3, 3),
    "InstanceNorm3d": lambda: spatial(nn.InstanceNorm3d(2, affine=True), 1, 2, 2, 3),
    "InstanceNorm1d, stored, training mode": lambda: (case := spatial(
        nn.InstanceNorm1d(2, track_running_stats=True), 1, 5))._replace(model=case.model.train()),
    "LocalResponseNorm": lambda: spatial(nn.LocalResponseNorm(2), 1, 3, 3),
    # activations
    **{name: partial(bounded, layer) for name, layer in ACTIVATIONS.items()},
    "GLU": lambda: between(nn.GLU()),
    "Softmax2d": lambda: spatial(nn.Softmax2d(), 1, 3, 3),
    "an activation on tokens": lambda: around(nn.Sequential(nn.Linear(4, 3), nn.GELU()), 3, 4),
    "an activation on images of tokens": lambda: Case(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(8, 3)).eval(), torch.rand(1, 2, 2, 3), labels()),
    "an activation on five axes": lambda: Case(nn.Sequential(nn.Sigmoid(), nn.Flatten(), nn.Linear(24, 3)).eval(),
        torch.rand(1, 2, 3, 2, 2), labels()),
    "an activation first": lambda: Case(nn.Sequential(nn.Softplus(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(),
        nn.Linear(4, 3)).eval(), torch.rand(1, 3, 4), labels()),
    # pooling
    "AvgPool1d": lambda: spatial(nn.AvgPool1d(2), 1, 6),
    "AvgPool2d": lambda: spatial(nn.AvgPool2d(3, 2, 1, count_include_pad=False), 1, 4, 4),
    "AvgPool3d": lambda: spatial(nn.AvgPool3d(2), 1, 2, 4, 4),
    "AdaptiveAvgPool1d": lambda: spatial(nn.AdaptiveAvgPool1d(2), 1, 5),
    "AdaptiveAvgPool2d": lambda: spatial(nn.AdaptiveAvgPool2d(1), 1, 4, 4),
    "AdaptiveAvgPool3d": lambda: spatial(nn.AdaptiveAvgPool3d((1, 2, 2)), 1, 2, 3, 3),
    "MaxPool1d": lambda: spatial(nn.MaxPool1d(2), 1, 6),
    "MaxPool2d": lambda: spatial(nn.MaxPool2d(2, ceil_mode=True), 1, 5, 5),
    "MaxPool3d": lambda: spatial(nn.MaxPool3d(2), 1, 2, 4, 4),
    "AdaptiveMaxPool1d": lambda: spatial(nn.AdaptiveMaxPool1d(2), 1, 6),
    "AdaptiveMaxPool2d": lambda: spatial(nn.AdaptiveMaxPool2d(2), 1, 4, 4),
    "AdaptiveMaxPool3d": lambda: spatial(nn.AdaptiveMaxPool3d((1, 2, 2)), 1, 2, 4, 4),
    "MaxUnpool2d": lambda: Case(Net(unpool, conv=nn.Conv2d(1, 2, 1), head=nn.Linear(32, 3)).eval(), torch.rand(1, 1, 4,
        4), labels()),
    "LPPool1d": lambda: spatial(nn.Sequential(nn.Softplus(), nn.LPPool1d(3, 2)), 1, 6),
    "LPPool2d": lambda: spatial(nn.LPPool2d(2, 2), 1, 4, 4),
    "FractionalMaxPool2d": lambda: spatial(nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.rand(1, 2,
        2)), 1, 4, 4),
    "a mean over tokens": lambda: Case(Net(lambda net, x: net.b(torch.tanh(net.a(x)).mean(1)), a=nn.Linear(4, 5),
        b=nn.Linear(5, 3)).eval(), torch.rand(1, 3, 4), labels()),
    # padding, shuffling, shapes
    "ConstantPad1d": lambda: spatial(nn.ConstantPad1d(1, 0.3), 1, 4),
    "ZeroPad2d": lambda: spatial(nn.ZeroPad2d((1, 0, 2, 1)), 1, 3, 3),
    "ZeroPad2d, negative": lambda: spatial(nn.ZeroPad2d(-1), 1, 4, 4),
    "ReflectionPad1d": lambda: spatial(nn.ReflectionPad1d(1), 1, 4),
    "ReflectionPad2d": lambda: spatial(nn.ReflectionPad2d(1), 1, 3, 3),
    "ReflectionPad3d": lambda: spatial(nn.ReflectionPad3d(1), 1, 2, 2, 3),
    "ReplicationPad2d": lambda: spatial(nn.ReplicationPad2d(1), 1, 3, 3),
    "ReplicationPad3d": lambda: spatial(nn.ReplicationPad3d((1, 0, 0, 1, 0, 0)), 1, 2, 2, 2),
    "CircularPad2d": lambda: spatial(nn.CircularPad2d(1), 1, 3, 3),
    "PixelShuffle": lambda: spatial(nn.PixelShuffle(2), 1, 2, 3, channels=4),
    "PixelUnshuffle": lambda: spatial(nn.PixelUnshuffle(2), 1, 4, 4),
    "ChannelShuffle": lambda: spatial(nn.ChannelShuffle(2), 1, 3, 3, channels=4),
    "Unfold": lambda: spatial(nn.Unfold(2), 1, 3, 3),
    "Fold": lambda: spatial(nn.Fold((3, 3), 2), 1, 4, channels=8),
    "Upsample, nearest": lambda: spatial(nn.Upsample(scale_factor=2), 1, 2, 3),
    "Upsample, linear": lambda: spatial(nn.Upsample(scale_factor=2, mode="linear"), 1, 5),
    "Upsample, bilinear": lambda: spatial(nn.Upsample(scale_factor=1.5, mode="bilinear"), 1, 3, 3),
    "Upsample, bilinear, corners": lambda: spatial(nn.Upsample((4, 5), mode="bilinear", align_corners=True), 1, 3, 3),
    "Upsample, bicubic": lambda: spatial(nn.Upsample((4, 4), mode="bicubic"), 1, 3, 3),
    "Upsample, trilinear": lambda: spatial(nn.Upsample((2, 3, 3), mode="trilinear"), 1, 2, 2, 2),
    "interpolate, antialias": lambda: spatial(Net(lambda net, x: F.interpolate(x, (2, 2), mode="bilinear",
        antialias=True)), 1, 4, 4),
    "interpolate, area": lambda: spatial(Net(lambda net, x: F.interpolate(x, (2, 2), mode="area")), 1, 4, 4),
    "Flatten of (n, L, C)": lambda: Case(nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(9, 3)).eval(),
        torch.rand(2, 3, 4), labels(2)),
    "Flatten, inner axes": lambda: Case(nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), nn.Flatten(), nn.Linear(6,
        3)).eval(), torch.rand(1, 2, 2, 2), labels()),
    "Flatten of five axes": lambda: Case(nn.Sequential(nn.Conv3d(1, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16,
        3)).eval(), torch.rand(1, 1, 2, 2, 2), labels()),
    "Flatten of a flat input": lambda: Case(nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.Flatten(), nn.Tanh(),
        nn.Flatten(1, -1), nn.Linear(4, 3)).eval(), torch.rand(1, 5), labels()),
    "Unflatten": lambda: Case(nn.Sequential(nn.Linear(5, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8, 3)).eval(), torch.rand(1, 5), labels()),
    "CosineSimilarity": lambda: Case(Net(lambda net, x: F.cosine_similarity(net.a(x)[:, None], net.c, dim=-1) * 3,
        a=nn.Linear(5, 4), c=nn.Parameter(torch.randn(3, 4))).eval(), torch.rand(1, 5), labels()),
    "cdist": lambda: Case(Net(lambda net, x: -torch.cdist(torch.tanh(net.a(x)), net.c), a=nn.Linear(5, 4),
        c=nn.Parameter(torch.randn(3, 4))).eval(), torch.rand(1, 5), labels()),
    "grid_sample": lambda: Case(Net(lambda net, x: net.b(F.grid_sample(x, F.affine_grid(net.t[None], (1, 1, 3, 3),
        False), align_corners=False).flatten(1)), t=nn.Parameter(torch.tensor([[0.9, 0.1, 0.05], [-0.1, 0.8, 0.02]])),
        b=nn.Linear(9, 3)).eval(), torch.rand(1, 1, 4, 4), labels()),
    "fft": lambda: Case(Net(lambda net, x: net.b(torch.fft.irfft(torch.fft.rfft(net.a(x)) * net.f, n=6)), a=nn.Linear(5,
        6), f=nn.Parameter(torch.rand(4)), b=nn.Linear(6, 3)).eval(), torch.rand(1, 5), labels()),
    "einsum and cumsum": lambda: forwarded(lambda net, x: net.b(torch.einsum("ni,nj->nij", torch.tanh(net.a(x)),
        x).sum(2).cumsum(1))),
    "sorted": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)).sort().values)),
    # parametrizations, pruning, tied weights
    "weight_norm, hook": lambda: changed(hook_weight_norm),
    "weight_norm": lambda: changed(lambda net: [parametrizations.weight_norm(net[0]), None][1]),
    "spectral_norm, hook": lambda: changed(hook_spectral),
    "spectral_norm": lambda: changed(lambda net: [parametrizations.spectral_norm(net[0]), None][1]),
    "orthogonal, matrix_exp": lambda: changed(lambda net: [parametrizations.orthogonal(net[0],
        orthogonal_map="matrix_exp"), None][1]),
    "orthogonal, cayley": lambda: changed(lambda net: [parametrizations.orthogonal(net[0], orthogonal_map="cayley"),
        None][1]),
    "orthogonal, householder": lambda: changed(lambda net: [parametrizations.orthogonal(net[0],
        orthogonal_map="householder"), None][1]),
    "a parametrization of one's own": lambda: Case(nn.Sequential(parametrize.register_parametrization(nn.Linear(5, 5),
        "weight", Symmetric()), nn.Tanh(), nn.Linear(5, 3)).eval(), torch.rand(1, 5), labels()),
    "pruned": lambda: changed(pruned),
    "pruned, made permanent": lambda: changed(lambda net: [pruned(net), prune.remove(net[0], "weight"), None][2]),
    "tied, in one module": lambda: Case(Renamed().eval(), torch.rand(1, 5), labels()),
    "tied, second name": lambda: Case(Aliased().eval(), torch.rand(1, 5), labels()),
    "tied, plain list": lambda: Case(Listed().eval(), torch.rand(1, 5), labels()),
    "tied, one module twice": shared_module,
    "one activation twice": shared_activation,
    "tied, both ends": tied_ends,
    "layers in a plain list": lambda: Case(HiddenLayers().eval(), torch.rand(1, 5), labels()),
    # what the loss does not meet, or is frozen
    "a layer without effect": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))), c=nn.Linear(2, 2)),
    "a layer without effect, in front": lambda: Case(Net(lambda net, x: net.b(torch.tanh(net.a(x))), c=nn.Linear(5, 6),
        a=nn.Linear(5, 4), b=nn.Linear(4, 3)).eval(), torch.rand(2, 5), labels(2)),
    "a loss that skips a head": lambda: forwarded(lambda net, x: (net.b(torch.tanh(net.a(x))), net.c(x)), lambda out,
        y: F.cross_entropy(out[0], y), c=nn.Linear(5, 2)),
    "a branch of x alone": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))) + x[:, :3].sin()),
    "a branch of θ alone": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))) + net.c.square(),
        c=nn.Parameter(torch.randn(3))),
    "x that is not used whole": lambda: Case(Net(lambda net, x: net.b(torch.tanh(net.a(x[:, :3]))), a=nn.Linear(3, 4),
        b=nn.Linear(4, 3)).eval(), torch.rand(1, 5), labels()),
    "frozen first layer": lambda: changed(frozen_first),
    "frozen head": lambda: changed(frozen_head),
    "biases alone": lambda: changed(biases_only),
    "a transposed weight": lambda: changed(turned_weight),
    "channels last": channels_last,
    "x expanded": lambda: Case(mlp(), torch.rand(1, 5).expand(2, 5), labels(2)),
    "x transposed": lambda: Case(mlp(), torch.rand(5, 2).T, labels(2)),
    "training mode, nothing random": lambda: Case(mlp().train(), torch.rand(1, 5), labels()),
    # forwards
    "a branch": lambda: forwarded(lambda net, x: net.b(net.a(x).sin() if x.sum() > 0 else net.a(x))),
    "a choice by argmax": lambda: forwarded(
        lambda net, x: net.b(torch.tanh(net.a(x))) * net.c.weight[0, x.argmax().item()],
        c=nn.Linear(5, 1)),
    "mixture of experts": lambda: forwarded(
        experts, c=nn.ModuleList(nn.Linear(5, 7) for _ in range(3)), d=nn.Linear(5, 3)),
    "weights by .data": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.c(F.linear(x, net.a.weight.data)))),
        c=nn.Linear(7, 7)),
    "a step of gradient descent": lambda: forwarded(inner_step(True)),
    "vmap in the forward": lambda: forwarded(
        lambda net, x: net.b(torch.func.vmap(lambda z: z.sin() * z.sum())(net.a(x)))),
    "jacrev in the forward": lambda: forwarded(lambda net, x: net.b(torch.func.vmap(torch.func.jacrev(
        lambda z: net.a(z).sin().sum()))(x) @ net.a.weight.T)),
    "a hypernetwork": lambda: forwarded(hypernetwork, c=nn.Linear(5, 21)),
    "PackedSequence": lambda: Case(Net(packed, layer=nn.GRU(3, 3, batch_first=True), head=nn.Linear(3, 3)).eval(),
        torch.rand(2, 4, 3), labels(2)),
    "writes into a fresh tensor": lambda: forwarded(fresh),
    "in place on activations": lambda: forwarded(lambda net, x: net.b((net.a(x).mul_(2).tanh_() * 1.5).add_(x.sum()))),
    "gather and scatter": lambda: forwarded(
        lambda net, x: net.b(x.new_zeros(1, 7).index_add(1, torch.tensor([0, 2, 2, 6, 1]),
        x.sin()) * net.a(x)).gather(1, torch.tensor([[2, 0, 1]]))),
    "linalg": lambda: forwarded(
        lambda net, x: net.b(torch.linalg.solve(torch.eye(7, dtype=x.dtype) * 3 + torch.tanh(net.a(x)).T @ net.a(x),
        net.a(x).T).T)),
    "eigenvalues": lambda: forwarded(lambda net, x: net.b(torch.linalg.eigvalsh(torch.diag(torch.arange(7.0)).to(x)
        + torch.tanh(net.a(x)).T @ torch.tanh(net.a(x)))[None])),
    "weight standardisation": lambda: Case(nn.Sequential(Standardized(1, 2, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 3)).eval(), torch.rand(1, 1, 3, 3), labels()),
    "low-rank adapter": lambda: Case(Adapted().eval(), torch.rand(1, 5), labels()),
    "AveragedModel": lambda: changed(torch.optim.swa_utils.AveragedModel),
    "a wrapped layer": lambda: changed(lambda net: nn.Sequential(nn.DataParallel(net[0]), net[1], net[2])),
    "a compiled layer": lambda: changed(
        lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), net[1], net[2])),
    "compiled, aot_eager": lambda: changed(lambda net: torch.compile(net, backend="aot_eager")),
    "a module that cannot be copied": lambda: forwarded(
        lambda net, x: net.b(torch.tanh(net.a(x))), lock=threading.Lock()),
    "a module that keeps its features": lambda: run_before(forwarded(keeping)),
    "a module that knows its parent": knows_parent,
    "x that requires a gradient": lambda: (case := changed(lambda net: None))._replace(x=case.x.requires_grad_()),
    "without a batch axis inside": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x[0]))),
        lambda out, y: F.cross_entropy(out, y[0])),
    "batch and tokens joined": lambda: Case(
        nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)), torch.rand(2, 3, 4), labels(2),
        lambda out, y: F.cross_entropy(out, y.repeat_interleave(3))),
    "batch joined, square": lambda: Case(nn.Sequential(nn.Flatten(0), nn.Linear(6, 3)), torch.rand(1, 2, 3), labels(),
        lambda out, y: F.cross_entropy(out, y[0])),
    "a custom Function, new style": lambda: forwarded(lambda net, x: net.b(Cube.apply(net.a(x)))),
    "weights cached before": cached_before,
    "built at the first call": lambda: forwarded(building),
    "floor": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)) + (5 * net.a(x)).floor())),
    "median": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)) - net.a(x).median(1, keepdim=True).values)),
    "a boolean mask": lambda: forwarded(lambda net, x: net.b(torch.tanh(z := net.a(x))) * z[z > 0.05].square().sum()),
    "assignment by a mask": lambda: forwarded(masked),
    "attention weights in the loss": lambda: attention(
        lambda net, x: (net.head((o := net.a(x, x, x))[0].flatten(1)), o[1]),
        a=nn.MultiheadAttention(4, 2, **SEQUENCE))._replace(loss=lambda out, y:
        F.cross_entropy(out[0], y) - (out[1] * out[1].log()).sum()),
    "output is a dataclass": lambda: forwarded(lambda net, x: Answer(net.b(torch.tanh(net.a(x)))), lambda out, y:
        F.cross_entropy(out.logits, y)),
    "output is an object": lambda: forwarded(lambda net, x: Opaque(net.b(torch.tanh(net.a(x)))), lambda out, y:
        F.cross_entropy(out.logits(), y)),
    "output with None": lambda: forwarded(lambda net, x: [None, net.b(torch.tanh(net.a(x)))], lambda out, y:
        F.cross_entropy(out[1], y)),
    "labels in the loss": lambda: with_loss(
        lambda out, y: F.cross_entropy(out, torch.tensor([1, 2])), torch.tensor([9, 9])),
    "labels of tokens": lambda: Case(
        nn.Sequential(nn.Linear(4, 3)).eval(), torch.rand(1, 3, 4), torch.tensor([[1, 0, 2]]),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())),
    "a custom Function, no forward mode": lambda: forwarded(lambda net, x: net.b(Square.apply(net.a(x)))),
    "no third derivative": lambda: forwarded(lambda net, x: net.b(Sine.apply(net.a(x)))),
    "in place on its input": lambda: forwarded(in_place),
    "a detached weight": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)) / net.b.weight.detach().norm())),
    "fixed batch size": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)).view(1, -1))),
    "LSTM, fixed state": lambda: Case(Net(lstm_with_fixed_state, layer=nn.LSTM(3, 3, **SEQUENCE), h=torch.rand(1, 1, 3),
        c=torch.rand(1, 1, 3), head=nn.Linear(12, 3)).eval(), torch.rand(1, 4, 3), labels()),
    "LSTM, learned state": lambda: Case(Net(lstm_with_fixed_state, layer=nn.LSTM(3, 3, **SEQUENCE),
        h=nn.Parameter(torch.rand(1, 1, 3)), c=nn.Parameter(torch.rand(1, 1, 3)), head=nn.Linear(12, 3)).eval(),
        torch.rand(1, 4, 3), labels()),
    "output is a dict": lambda: forwarded(lambda net, x: {"logits": net.b(torch.tanh(net.a(x))), "features": net.a(x)},
        dictionary),
    "output is a tuple": lambda: forwarded(lambda net, x: (net.b(torch.tanh(net.a(x))), net.a(x)), lambda out,
        y: F.cross_entropy(out[0], y) + 0.1 * out[1].square().mean()),
    "output is a namedtuple": lambda: forwarded(lambda net, x: Output(net.b(torch.tanh(net.a(x))), net.a(x)),
        lambda out, y: F.cross_entropy(out.logits, y)),
    "output is a scalar": lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))).square().mean(), lambda out,
        y: out),
    "one output": lambda: with_loss(lambda out, y: F.mse_loss(out[:, 0], y), lambda: torch.rand(2), out=1),
    "logits for each place": lambda: Case(nn.Sequential(nn.Conv2d(1, 3, 2)).eval(), torch.rand(1, 1, 3, 3),
        torch.randint(3, (1, 2, 2))),
    "patched forward": lambda: changed(patched),
    "patched activation": lambda: changed(patched_activation),
    "forward hook": lambda: changed(hooked),
    "forward pre-hook": lambda: changed(pre_hooked),
    "checkpointed": lambda: forwarded(lambda net, x: net.b(checkpoint(lambda z: torch.tanh(net.a(z)), x,
        use_reentrant=False))),
    # wrappers
    "DataParallel": lambda: changed(nn.DataParallel),
    "GradSampleModule": lambda: (case := changed(grad_sample))._replace(model=case.model.train()),
    "compiled": lambda: changed(lambda net: torch.compile(net, backend="eager")),
    "fast clipping": lambda: (case := changed(fast_clipping))._replace(model=case.model.train()),
    "a grad-sample layer": lambda: (case := changed(lambda net: nn.Sequential(grad_sample(net[0]), net[1],
        net[2])))._replace(model=case.model.train()),
    "compiled in place": lambda: changed(compiled_in_place),
    "GraphModule": lambda: changed(lambda net: torch.fx.symbolic_trace(net)),
    "Sequential in Sequential": lambda: changed(lambda net: nn.Sequential(nn.Sequential(net[0], net[1]), net[2])),
    # losses
    "MSE": lambda: with_loss(F.mse_loss, lambda: torch.rand(2, 3)),
    "L1": lambda: with_loss(F.l1_loss, lambda: torch.rand(1, 3)),
    "SmoothL1Loss": lambda: with_loss(nn.SmoothL1Loss(beta=0.2), lambda: torch.rand(2, 3)),
    "HuberLoss": lambda: with_loss(nn.HuberLoss(delta=0.4), lambda: torch.rand(2, 3)),
    "BCEWithLogitsLoss": lambda: with_loss(nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (2, 3)).double()),
    "BCEWithLogitsLoss, (n, 1)": lambda: with_loss(nn.BCEWithLogitsLoss(), lambda: torch.ones(2, 1), out=1),
    "BCELoss": lambda: with_loss(nn.BCELoss(), lambda: torch.rand(2, 3), last=nn.Sigmoid()),
    "soft labels": lambda: with_loss(F.cross_entropy, lambda: torch.rand(2, 3).softmax(1)),
    "one-hot labels": lambda: with_loss(F.cross_entropy, lambda: F.one_hot(torch.tensor([1, 2]), 3).double()),
    "label smoothing": lambda: with_loss(nn.CrossEntropyLoss(label_smoothing=0.1), labels(2)),
    "class weights": lambda: with_loss(nn.CrossEntropyLoss(WEIGHTS), labels(2)),
    "class weights, sum": lambda: with_loss(nn.CrossEntropyLoss(WEIGHTS,
        reduction="sum"), labels(2)),
    "a label of −100": lambda: with_loss(nn.CrossEntropyLoss(), torch.tensor([1, -100])),
    "ignore_index": lambda: with_loss(nn.CrossEntropyLoss(ignore_index=2), torch.tensor([1, 2, 0])),
    "sum reduction": lambda: with_loss(nn.CrossEntropyLoss(reduction="sum"), labels(2)),
    "NLLLoss": lambda: with_loss(nn.NLLLoss(), labels(2), last=nn.LogSoftmax(1)),
    "SoftMarginLoss": lambda: with_loss(nn.SoftMarginLoss(), lambda: torch.tensor([[1.0], [-1.0]]).double(), out=1),
    "SoftMarginLoss, integers": lambda: with_loss(lambda out, y: F.soft_margin_loss(out[:, 0], y), torch.tensor([1,
        -1]), out=1),
    "labels ±1, own loss": lambda: with_loss(lambda out, y: F.softplus(-y * out[:, 0]).mean(), torch.tensor([1, -1]),
        out=1),
    "labels ±1, two outputs": lambda: with_loss(lambda out, y: F.softplus(-y * (out[:, 1] - out[:, 0])).mean(),
        torch.tensor([1, -1]), out=2),
    "labels (n, 1)": lambda: with_loss(lambda out, y: F.cross_entropy(out, y.squeeze(1)), labels(2)[:, None]),
    "labels int32": lambda: with_loss(lambda out, y: F.cross_entropy(out, y.long()), labels(2).int()),
    "labels from 1": lambda: with_loss(lambda out, y: F.cross_entropy(out, y - 1), torch.tensor([1, 3])),
    "labels as bool": lambda: with_loss(lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y.double()),
        torch.tensor([True, False]), out=1),
    "MultiLabelSoftMarginLoss": lambda: with_loss(nn.MultiLabelSoftMarginLoss(), lambda: torch.randint(2, (2,
        3)).double()),
    "HingeEmbeddingLoss": lambda: with_loss(nn.HingeEmbeddingLoss(2.0), torch.tensor([[1, -1, 1]])),
    "PoissonNLLLoss": lambda: with_loss(nn.PoissonNLLLoss(), lambda: torch.rand(2, 3)),
    "GaussianNLLLoss": lambda: with_loss(lambda out, y: F.gaussian_nll_loss(out[:, 0], y, F.softplus(out[:, 1])),
        lambda: torch.rand(2)),
    "KLDivLoss": lambda: with_loss(nn.KLDivLoss(reduction="batchmean"), lambda: torch.rand(2, 3).softmax(1),
        last=nn.LogSoftmax(1)),
    "focal loss": lambda: with_loss(lambda out, y: ((1 - (-F.cross_entropy(out, y,
        reduction="none")).exp()) ** 2 * F.cross_entropy(out, y, reduction="none")).mean(), labels(2)),
    "a loss over the batch": lambda: with_loss(lambda out, y: F.cross_entropy(out @ out.T / 0.5, y), torch.tensor([0, 1,
        2])),
    "no labels": lambda: with_loss(lambda out, y: out.square().mean(), torch.tensor([0, 0])),
}
# fmt: on

DETACHED = "its gradient depends on x in a way that autograd does not see|detach|no_grad"
# fmt: off
EITHER: dict[str, tuple[Callable[[], Case], str]] = {
    "encoder under no_grad": (lambda: forwarded(under_no_grad), DETACHED),
    "half of it under no_grad": (lambda: forwarded(half_under_no_grad), DETACHED),
    "z * z.detach()": (lambda: forwarded(lambda net, x: net.b((z := net.a(x)) * z.detach())), DETACHED),
    "z * z.data": (lambda: forwarded(lambda net, x: net.b((z := net.a(x)) * z.data)), DETACHED),
    "detached norm": (lambda: forwarded(lambda net, x: net.b((z := net.a(x)) / z.norm().item())), DETACHED),
    "a loss that detaches": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))), lambda out,
        y: (F.cross_entropy(out, y, reduction="none") * out.detach().softmax(1).amax(1)).mean()), DETACHED),
    "hook on an activation": (lambda: forwarded(hooked_activation), "[Hh]ook|" + DETACHED),
    "clipping hook on an activation": (lambda: forwarded(clipped_activation), "[Hh]ook|" + DETACHED),
    "backward pre-hook": (lambda: changed(backward_pre_hooked), "[Hh]ook"),
    "exported": (lambda: exported(mlp()), "export|" + DETACHED),
    "exported with a detach": (lambda: exported(Net(lambda net, x: net.b((z := net.a(x)) * z.detach()),
        a=nn.Linear(5, 7), b=nn.Linear(7, 3))), "export|" + DETACHED),
    "aten.detach": (lambda: forwarded(lambda net, x: net.b(net.a(x) * torch.ops.aten.detach(net.a(x)))), DETACHED),
    "vector quantisation": (lambda: forwarded(nearest, codes=nn.Embedding(4, 7)), DETACHED),
    "copied data": (lambda: forwarded(
        lambda net, x: net.b(net.a(x) * torch.zeros(1, 7).to(x).copy_(net.a(x).data))), DETACHED),
    "from_numpy": (lambda: forwarded(
        lambda net, x: net.b(net.a(x) * torch.from_numpy(net.a(x).detach().numpy()))), DETACHED),
    "a detach in a custom Function": (lambda: forwarded(lambda net, x: net.b(Gated.apply(net.a(x)))), DETACHED),
    "its own teacher": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))), lambda out, y: F.mse_loss(out,
        out.detach().sin())), DETACHED),
    "x detached in one branch": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)) + net.c(x.detach())),
        c=nn.Linear(5, 7)), DETACHED),
    "forward through NumPy": (lambda: forwarded(lambda net,
        x: net.b(net.a(x) * torch.as_tensor(x.detach().numpy().mean()))), DETACHED),
    "a reversed gradient": (lambda: forwarded(lambda net, x: net.b(Clipped.apply(torch.tanh(net.a(x))))), DETACHED),
    "backward hook": (lambda: changed(backward_hooked), "[Hh]ook"),
    "hook on a parameter": (lambda: changed(parameter_hooked), "hook|own gradient"),
    "hook on a parameter's .grad": (lambda: changed(accumulation_hooked), "hook|own gradient"),
    "a loss with the weights": (penalized, "loss|own gradient"),
    "tied, a view": (lambda: Case(Viewed().eval(), torch.rand(1, 5), labels()),
        "view|non-leaf|deepcopy|copied|own gradient"),
    "layer in a closure": (lambda: Case(InClosure().eval(), torch.rand(1, 5), labels()), "own gradient|closure|copy"),
    "checkpointed, reentrant": (lambda: forwarded(lambda net, x: net.b(checkpoint(lambda z: torch.tanh(net.a(z)), x,
        use_reentrant=True))), "checkpoint"),
    "EmbeddingBag": (lambda: Case(Net(bag, table=nn.EmbeddingBag(6, 4, mode="sum"), index=torch.tensor([[4, 0, 4]]),
        head=nn.Linear(4, 3)).eval(), torch.rand(1, 3), labels()), "second derivative"),
    "straight-through by detach": (lambda: forwarded(lambda net, x: net.b((z := net.a(x)) + (z.round() - z).detach())),
        DETACHED),
    "fake quantisation": (lambda: changed(quantized), DETACHED),
    "a step of gradient descent, first order": (lambda: forwarded(inner_step(False)), DETACHED),
    "a fixed point under no_grad": (lambda: forwarded(fixed_point), DETACHED),
    "set_grad_enabled": (lambda: forwarded(without_grad), DETACHED),
    "detach_": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x)) * net.a(x).clone().detach_())), DETACHED),
    "through tolist": (lambda: forwarded(
        lambda net, x: net.b(net.a(x) * torch.tensor(net.a(x).tolist(), dtype=x.dtype))), DETACHED),
    "through float()": (lambda: forwarded(lambda net, x: net.b(net.a(x) * float(x.sum()))), DETACHED),
    "through new_tensor": (lambda: forwarded(
        lambda net, x: net.b(net.a(x) * x.new_tensor([x.sum().item()]))), DETACHED),
    "through a loss's item()": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(x))), lambda out, y:
        F.cross_entropy(out, y) * F.cross_entropy(out, y).item()), DETACHED),
    "inference_mode": (lambda: forwarded(in_inference_mode), "inference_mode"),
    "a loss that reads the module's features": (features_in_loss, "apart from the module"),
    "weights clamped by the forward": (lambda: forwarded(clamping), "changes its own parameters|in-place|in place"),
    "Embedding, scaled by frequency": (lambda: Case(Net(position_table, table=nn.Embedding(6, 4,
        scale_grad_by_freq=True), index=torch.tensor([4, 1, 4]), head=nn.Linear(12, 3)).eval(), torch.rand(1, 3, 4),
        labels()), "second derivative|scale_grad_by_freq"),
    "Embedding, renormalised": (lambda: Case(Net(position_table, table=nn.Embedding(6, 4, max_norm=0.5),
        index=torch.tensor([4, 1, 4]), head=nn.Linear(12, 3)).eval(), torch.rand(1, 3, 4), labels()),
        "changes its own parameters|max_norm|in-place|in place"),
    "torch.sparse.mm": (lambda: Case(
        Net(lambda net, x: net.b(torch.tanh(torch.sparse.mm(net.graph, net.a(x[0])))).view(1,
        -1), a=nn.Linear(4, 3), b=nn.Linear(3, 1), graph=nn.Buffer(torch.eye(3).roll(1, 0).to_sparse())).eval(),
        torch.rand(1, 3, 4), labels()), "sparse|second derivative"),
    "CTCLoss": (lambda: Case(nn.Sequential(nn.Linear(4, 3)), torch.rand(1, 5, 4), torch.tensor([[1, 2]]),
        lambda out, y: F.ctc_loss(out.log_softmax(-1).transpose(0, 1), y, (5,), (2,))), "second derivative"),
    "a compiled function": (lambda: forwarded(lambda net, x: net.b(COMPILED(net.a(x)))), "compile"),
    "sparse embedding": (lambda: Case(Net(position_table, table=nn.Embedding(6, 4, sparse=True), index=torch.tensor([4,
        1, 4]), head=nn.Linear(12, 3)).eval(), torch.rand(1, 3, 4), labels()), "sparse"),
    "traced": (lambda: changed(lambda net: torch.jit.trace(net, torch.rand(1, 5))), "script|trace|jit"),
    "CrossMapLRN2d": (lambda: spatial(nn.CrossMapLRN2d(2), 1, 3, 3),
        "second derivative"),
    "MultiMarginLoss": (lambda: with_loss(nn.MultiMarginLoss(), labels(2)),
        "second derivative"),
    "MultiLabelMarginLoss": (lambda: with_loss(nn.MultiLabelMarginLoss(), torch.tensor([[2, 0, -1]])),
        "second derivative"),
    "Hardsigmoid": (lambda: bounded(nn.Hardsigmoid()), "second derivative"),
    "class weights in float32": (
        lambda: with_loss(nn.CrossEntropyLoss(WEIGHTS.float()), labels(2))._replace(
            meant=(nn.CrossEntropyLoss(WEIGHTS), labels(2))), "dtype|scalar type|float32|Float"),
    "labels int32, plain": (
        lambda: with_loss(F.cross_entropy, labels(2).int())._replace(meant=(F.cross_entropy, labels(2))),
        "int64|Long|Int|int32"),
    "labels (n, 1), plain": (
        lambda: with_loss(F.cross_entropy, labels(2)[:, None])._replace(meant=(F.cross_entropy, labels(2))),
        r"\(n,\)|shape|squeeze"),
}
# fmt: on

# fmt: off
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "straight-through estimator": (lambda: forwarded(lambda net, x: net.b(Round.apply(net.a(x)))),
        DETACHED),
    "once_differentiable": (lambda: forwarded(lambda net, x: net.b(Once.apply(net.a(x)))),
        "once_differentiable|second"),
    "scripted": (lambda: changed(torch.jit.script), "script|jit"),
    "complex weights": (lambda: Case(Net(lambda net, x: net.b((net.a(x + 0j)).abs()), a=nn.Linear(5, 4,
        dtype=torch.complex128), b=nn.Linear(4, 3)).eval(), torch.rand(1, 5), labels()), "complex"),
    "no parameter": (lambda: Case(nn.Tanh(), torch.rand(1, 3), labels()), "no trainable parameter"),
    "all frozen": (lambda: changed(lambda net: net.requires_grad_(False)), "no trainable parameter"),
    "uninitialised lazy layer": (lambda: Case(nn.Sequential(nn.LazyLinear(3)), torch.rand(1, 5), labels()),
        "initiali[sz]ed"),
    "F.dropout": (lambda: forwarded(lambda net, x: net.b(F.dropout(net.a(x), 0.5))), "random"),
    "Dropout in training mode": (lambda: Case(nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3)),
        torch.rand(1, 5), labels()), "eval"),
    "BatchNorm in training mode": (lambda: Case(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        torch.rand(2, 5), labels(2)), "eval"),
    "attention with dropout, training": (lambda: Case(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5,
        batch_first=True), nn.Flatten(), nn.Linear(12, 3)), torch.rand(1, 3, 4), labels()), "eval|random"),
    "LSTM with dropout, training": (lambda: Case(Net(lambda net, x: net.head(net.layer(x)[0].flatten(1)),
        layer=nn.LSTM(3, 3, 2, dropout=0.5, batch_first=True), head=nn.Linear(12, 3)), torch.rand(1, 4, 3), labels()),
        "eval|random"),
    "RReLU in training mode": (lambda: Case(nn.Sequential(nn.Linear(5, 4), nn.RReLU(), nn.Linear(4, 3)), torch.rand(1,
        5), labels()), "eval|random"),
    "a random loss": (lambda: with_loss(lambda out, y: F.cross_entropy(F.dropout(out, 0.5), y), labels()), "random"),
    "noise in the forward": (lambda: forwarded(lambda net, x: net.b(net.a(x) + torch.randn(7))), "random"),
    "FractionalMaxPool2d, random": (lambda: spatial(nn.FractionalMaxPool2d(2, 4), 1, 6, 6), "random"),
    "power iteration in training mode": (lambda: Case(nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)),
        nn.Tanh(), nn.Linear(4, 3)).train(), torch.rand(1, 5), labels()), "eval|random|differ"),
    "a forward that counts": (lambda: forwarded(lambda net, x: net.b(net.a(x)) * next(net.count), count=Counter()),
        "random|differ|two passes"),
    "loss without x": (lambda: forwarded(lambda net, x: net.b(torch.tanh(net.a(torch.ones_like(x))))),
        "depend|∂²L/∂x∂θ is zero|J = 0"),
    "loss without θ": (lambda: forwarded(lambda net, x: x[:, :3].sin()), "depend"),
    "sum of both": (lambda: forwarded(lambda net, x: x.sum() + net.a.weight.square().sum(), lambda out, y: out),
        "∂²L/∂x∂θ is zero"),
    "loss not reduced": (lambda: with_loss(nn.CrossEntropyLoss(reduction="none"), labels(2)), "one number|reduce"),
    "label out of range": (lambda: with_loss(F.cross_entropy, torch.tensor([1, 3])), "3 classes|0 to 2"),
    "negative label": (lambda: with_loss(F.cross_entropy, torch.tensor([-1, 1])), "3 classes|0 to 2"),
    "every label ignored": (lambda: with_loss(F.cross_entropy, torch.tensor([-100, -100])), "NaN|ignore|-100"),
    "x of another width": (lambda: Case(mlp(), torch.rand(1, 4), labels()), "does not fit|shape"),
}
# fmt: on


class Counter:
    """An iterator that a copy shares no count with."""

    def __init__(self):
        self.value = 0

    def __next__(self) -> int:
        self.value += 1
        return self.value


def central(case: Case, h: float = 2e-4) -> tuple[Tensor, Tensor, float]:
    """g and J of the user's own module, by plain backward() and its central differences of fourth order,
        and the relative
    distance of those of second order at h and 2h, which is large where a kink is near."""
    rows, apart = [], 0.0
    for e in torch.eye(case.x.numel(), dtype=case.x.dtype):
        step = h * e.view_as(case.x)
        far, near = ((backward(case, k * step) - backward(case, -k * step)) / (2 * k * h) for k in (2, 1))
        rows.append((4 * near - far) / 3)
        apart = max(apart, float((near - far).norm()))
    J = torch.stack(rows)
    return backward(case), J, apart / float(J.norm().clamp_min(1e-300))


def backward(case: Case, step: Tensor | float = 0.0) -> Tensor:
    """g(x + step) by the textbook, on the very module, whose .grad fields are restored."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    loss, y = case.meant or (case.loss, case.y)
    loss(case.model(case.x + step), y).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    return torch.cat([g.reshape(-1) for g in found]).detach()


def state(model: nn.Module) -> dict[str, Any]:
    """All that an analysis must leave as it was: values, gradients, flags and hooks."""
    modules = list(model.named_modules())
    tensors = [(n, t) for n, t in [*model.named_parameters(), *model.named_buffers()] if not is_lazy(t)]
    return {
        **{f"value {n}": t.detach().clone() for n, t in tensors},
        **{f"grad {n}": copy.deepcopy(p.grad) for n, p in model.named_parameters()},
        **{f"flag {n}": p.requires_grad for n, p in model.named_parameters()},
        **{f"mode {n}": m.training for n, m in modules},
        **{f"hooks {n}": tuple(list(getattr(m, kind)) for kind in HOOKS) for n, m in modules if hasattr(m, HOOKS[0])},
        **{f"own {n}": sorted(vars(m)) for n, m in modules},
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
reference = cache(lambda name: central(build(name)))
