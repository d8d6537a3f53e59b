"""Networks of texts, built by name."""

import logging
from typing import Any

import torch

from i2f.core import checks
from i2f.text.extras import extra, quiet
from i2f.text.model import LanguageModel, Transformer
from i2f.text.names import NAMES, SIZES, Size, source
from i2f.text.tokenizer import tokenizer

TASKS = ("classification", "causal")
POSITIONS = 128  # of the networks drawn here


def build(name: str, task: str = "classification", seed: int = 0, activation: str | None = None) -> LanguageModel:
    """A network of texts, in evaluation mode.

    Args:
        name: "bert-tiny", "bert-small", "bert-base", "gpt2-tiny", …: drawn from `seed` with the standard deviation
            0.02·√(768/width), which at the width of the published models is theirs. "minilm": the pretrained encoder
            all-MiniLM-L6-v2 under a head that is drawn. Any other name or folder goes to `from_pretrained`.
        task: "classification", with two classes, or "causal": the next token (GPT-2 only).
        activation: of the network, by `transformers`' name; None: its own.

    The caller's random state is left as it was. Raises: ValueError for a name and task that do not fit;
    ModuleNotFoundError without the extra `text`; FileNotFoundError for a name that is not found.
    """
    checks.one_of("task", task, TASKS)
    if task == "causal" and (name == "minilm" or name.startswith("bert-")):
        raise ValueError(
            f"task='causal' needs a network that sees no later token, and {name} is an encoder: choose a gpt2"
        )
    logging.getLogger("transformers.models.gpt2.modeling_gpt2").addFilter(_no_padding)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if name in NAMES and name != "minilm":
            return LanguageModel(_drawn(name, task, activation))
        return LanguageModel(_pretrained(name, task, activation))


def _drawn(name: str, task: str, activation: str | None) -> Transformer:
    kind, size = name.split("-")
    return _bert(name, SIZES[size], activation) if kind == "bert" else _gpt2(name, SIZES[size], task, activation)


def _bert(name: str, size: Size, activation: str | None) -> Transformer:
    transformers, (layers, width, heads) = extra("transformers"), size
    config = transformers.BertConfig(
        vocab_size=len(tokenizer(name)),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=POSITIONS,
        hidden_act=activation or "gelu",
        **_common(width),
    )
    net: Transformer = transformers.BertForSequenceClassification(config)
    return net


def _gpt2(name: str, size: Size, task: str, activation: str | None) -> Transformer:
    transformers, words, (layers, width, heads) = extra("transformers"), tokenizer(name), size
    config = transformers.GPT2Config(
        vocab_size=len(words),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=POSITIONS,
        num_labels=2,
        activation_function=activation or "gelu_new",
        pad_token_id=words.pad_token_id,
        bos_token_id=words.cls_token_id,
        eos_token_id=words.sep_token_id,
        **_common(width),
    )
    kind = transformers.GPT2LMHeadModel if task == "causal" else transformers.GPT2ForSequenceClassification
    net: Transformer = kind(config)
    return net


def _common(width: int) -> dict[str, Any]:
    deviation = 0.02 * (SIZES["base"].width / width) ** 0.5
    return {"initializer_range": deviation, "attn_implementation": "eager"}


def _pretrained(name: str, task: str, activation: str | None) -> Transformer:
    transformers = extra("transformers")
    kind = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSequenceClassification
    options: dict[str, Any] = {} if task == "causal" else {"num_labels": 2}
    options |= {"hidden_act": activation} if activation else {}
    try:
        net: Transformer = kind.from_pretrained(source(name), attn_implementation="eager", **options)
    except OSError as error:
        near = f"one of {', '.join(NAMES)}, or a name or folder that from_pretrained knows"
        raise FileNotFoundError(f"name={name!r} cannot be loaded ({str(error).splitlines()[0]}): give {near}") from None
    return net


def _no_padding(record: logging.LogRecord) -> bool:
    """Drops the warning that embeddings show no padding: texts here have none."""
    return "padding tokens" not in str(record.msg)
