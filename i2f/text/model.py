"""A transformer as a function of its token embeddings, so that J, I²F and every attack apply to texts.

The input is x₀ = E[tokens], (1, length, width); positions, and for BERT the token type 0, are added inside. LayerNorm
removes each token's mean, so that J Jᵀ loses one dimension per token, and that of a language model its last token:
influence, error and convergence are meant modulo that null space (`spectrum.rank`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.core.gradient import Loss
from i2f.text.extras import extra

CELLS = 2**24  # numbers in one pass of many short texts


class Transformer(Protocol):
    """What is used of a `transformers` model."""

    config: Any

    def set_attn_implementation(self, name: str) -> None: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Linear: ...
    def eval(self) -> Self: ...
    def __call__(self, **inputs: Any) -> Any: ...


class LanguageModel(nn.Module):
    """A `transformers` model with its embeddings as the input: (n, length, width) -> logits.

    Args:
        net: a model for sequence classification or causal language modelling that takes `inputs_embeds`. Its attention
            is switched to the eager implementation, since fused kernels have no second derivative.

    The embedding matrix (and a head tied to it) is not part of θ, since its gradient is not a function of x. A client
    may withhold or share it all the same: `embedding_gradient`.

    Raises: ValueError for a network that takes no embeddings, or has no eager attention.
    """

    net: Transformer

    def __init__(self, net: Transformer):
        super().__init__()
        try:
            net.set_attn_implementation("eager")
            net.get_input_embeddings().weight.requires_grad_(False)
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"net={type(net).__name__} is no transformers model with token embeddings and eager attention, which "
                f"alone has a second derivative ({error})"
            ) from error
        self.net = net.eval()
        self.causal = type(net).__name__.endswith("LMHeadModel") or "CausalLM" in type(net).__name__

    @property
    def embeddings(self) -> Tensor:
        """E, (vocabulary, width)."""
        return self.net.get_input_embeddings().weight

    @property
    def loss(self) -> Loss:
        """Of the task: (logits, labels) -> the mean cross-entropy. For "causal", labels are the text's own tokens,
        (n, length), each of them predicted at the place before it."""
        return next_token if self.causal else F.cross_entropy

    @property
    def options(self) -> dict[str, bool]:
        """Of every call of the network."""
        return {"use_cache": False} if self.causal else {}

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(x.shape[1])
        if x.shape[1] > positions:
            raise ValueError(f"x has {x.shape[1]} tokens and the network {positions} positions: give a shorter text")
        logits: Tensor = self.net(inputs_embeds=x, **self.options).logits
        return logits

    def positions(self, default: int) -> int:
        """The longest text that the network takes; `default` where it does not say."""
        return int(getattr(self.net.config, "max_position_embeddings", default))

    def embed(self, tokens: Tensor) -> Tensor:
        """x₀ = E[tokens], (n, length) -> (n, length, width).

        Raises: ValueError for an empty text, one longer than the positions, or tokens of another vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give (n, length) with at least one token a text")
        if int(tokens.max()) >= len(self.embeddings):
            raise ValueError(
                f"token {int(tokens.max())} is outside this network's vocabulary of {len(self.embeddings)}: its "
                "tokenizer is another"
            )
        positions = self.positions(tokens.shape[1])
        if tokens.shape[1] > positions:
            raise ValueError(f"the text has {tokens.shape[1]} tokens and the network {positions} positions: cut it")
        return F.embedding(tokens.to(self.embeddings.device), self.embeddings).detach()

    def nearest(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """The tokens whose embeddings have the largest cosine with x, (n, length, width) -> (n, length). Means are
        removed first, since LayerNorm hides them. among: candidate tokens; None: all."""
        table = self.embeddings if among is None else self.embeddings[among]
        x, table = (F.normalize(v - v.mean(-1, keepdim=True), dim=-1) for v in (x.to(table), table))
        best = (x @ table.T).argmax(-1)
        return best if among is None else among.to(best.device)[best]

    def entering(self, places: Sequence[int], tokens: Tensor) -> dict[int, Tensor]:
        """What the first linear layers receive for each token at each place, (len(tokens), width): embedding, position
        and LayerNorm, before tokens mix."""
        layers = self.first_layers()
        found: dict[int, list[Tensor]] = {place: [] for place in places}
        length = max(places) + 1
        with torch.no_grad():
            for some in tokens.split(max(1, CELLS // (length * self.embeddings.shape[1]))):
                x = self.embed(some[:, None].expand(-1, length))
                seen = _seen(self, x, stop=True)[layers[0]]
                for place in places:
                    found[place].append(seen[:, place])
        return {place: torch.cat(parts) for place, parts in found.items()}

    def first_layers(self) -> list[str]:
        """The names of the weights of the first linear layers (queries, keys, values): those with the same input."""
        with torch.no_grad():
            seen = _seen(self, self.embeddings[:1][None].detach())
        first = next(iter(seen.values()))
        return [name for name, entering in seen.items() if entering is first]


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each token, predicted from those before it: the last place carries no loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def embedding_gradient(model: LanguageModel, tokens: Tensor, y: Tensor) -> Tensor:
    """∇_E L at a text, (vocabulary, width), which a client that trains its embeddings sends too.

    Each token of the text has a row; every other row is zero, unless the head is tied to E. It is not a function of x,
    so that it is not part of J.
    """
    weight = model.net.get_input_embeddings().weight
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model.net(input_ids=tokens, **model.options).logits
            (gradient,) = torch.autograd.grad(model.loss(logits, y), weight)
            return gradient
    finally:
        weight.requires_grad_(False)


class _FirstLayerReached(Exception):
    """Ends a pass of which only the first linear layer's input is wanted."""


def _seen(model: LanguageModel, x: Tensor, stop: bool = False) -> dict[str, Tensor]:
    """The input of every linear layer at x, by the name of its weight, in the order of the pass; `stop`: of the first
    alone."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, entering: tuple[Tensor, ...]) -> None:
            seen[name] = entering[0]
            if stop:
                raise _FirstLayerReached

        return keep

    handles = [layer.register_forward_pre_hook(hook(f"{name}.weight")) for name, layer in _linear(model)]
    try:
        model(x)
    except _FirstLayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of both kinds: GPT-2's hold their weight transposed, (in, out)."""
    transposed = extra("transformers.pytorch_utils").Conv1D
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, transposed)))


def is_transposed(model: LanguageModel, name: str) -> bool:
    """Whether this weight of a linear layer is stored as (in, out), as GPT-2's are."""
    return not isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)
