"""The project's own map: its notebooks, the verdicts they reached, and where each part of the paper is found again."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from i2f.paper import claims
from i2f.paper.claims import Claim

ROOT = Path(__file__).resolve().parents[2]

# What of the paper -> the experiment that repeats it, and what is different here.
PAPER = {
    "I²F and its lower bound against the error of the attack, by model, data set and attack (Gaussian noise)": (
        "influence_vs_attack",
        "a second-order attacker beside the first-order ones; fewer images by default; one unit on both axes",
    ),
    "The lower bound in place of I²F": (
        "lower_bound",
        "the bound beside the exact value, which LeNet-size networks allow",
    ),
    "Cost of I_lb against cost of the attack": (
        "efficiency",
        "in gradient evaluations, seconds beside them; a ResNet20 beside LeNet",
    ),
    "The damping ε (sweep over 0.1, 1, 10)": (
        "damping",
        "a grid over the whole spectrum, and an attacker with the prior that ε stands for",
    ),
    "Noise along eigenvectors (Fig. 5)": (
        "eigenvectors",
        "directions over the whole spectrum, and noise within the linear regime as well",
    ),
    "Unequal protection of samples and classes": (
        "fairness",
        "digits by the hundred; the law's own regime as well as the paper's variance",
    ),
    "Initialisation (Fig. 7)": (
        "initialization",
        "E[I²] by its formula; biases drawn where the released code draws weights twice",
    ),
    "Gradient pruning (Fig. 13)": (
        "pruning",
        "an attacker who reads the mask from the zeros, beside the paper's",
    ),
    "Stages of training": (
        "training",
        "LeNet on the 1,000 bundled digits; noise in proportion to the gradient as well",
    ),
    "No counterpart: several images behind one gradient": (
        "batch_size",
        "the paper attacks one image at a time",
    ),
    "ResNet152 on ImageNet: the lower bound of networks too large for I²F": (
        "deep_networks",
        "damped I²F and its average, by products alone; a ResNet152 of drawn weights in the benchmark",
    ),
    "No counterpart: depth, width and smoothness of the network": (
        "smoothness",
        "one family, four activations, the attack that converges",
    ),
    "Language: ROUGE, BLEU and feature MSE against the lower bound (BERT, GPT-2)": (
        "language",
        "tokens read without a search, and a second-order attacker; exact I²F on small networks, a pretrained encoder",
    ),
    "Outlook: examine the risk before a gradient is shared": (
        "audited",
        "an audit of any model, its predictions held against attacks",
    ),
    "Outlook: spend noise where it protects": (
        "designed_noise",
        "the covariance that protects the worst direction most, what it gives away itself, and its cost to training",
    ),
    "Outlook: optimise privacy together with the task": (
        "joint",
        "penalties on λ_max and the Bayes error, beside local differential privacy",
    ),
    "No counterpart: other measures of risk": (
        "rivals",
        "eight on the same problems, identities among them named",
    ),
    "The assumption that the noiseless attack is perfect (section 3)": (
        "leakage",
        "tested, with an attacker that converges",
    ),
}

# The claims that the README shows first: the paper's own, in the order of its sections, then what they leave out.
HEADLINES = (
    "leakage-mnist-image",
    "influence_vs_attack-mnist-accuracy",
    "influence_vs_attack-mnist-accuracy-box",
    "lower_bound-mnist-tight",
    "efficiency-mnist-bound-dgl",
    "damping-mnist-paper",
    "damping-mnist-pull",
    "eigenvectors-mnist-slope",
    "pruning-mnist-mask-50",
    "fairness-mnist-samples",
    "initialization-mnist-riskiest-gauss-newton",
    "training-mnist-relative",
    "batch_size-mnist-hides",
    "deep_networks-products",
    "smoothness-mnist-smooth-softplus",
    "smoothness-mnist-kinks",
    "smoothness-mnist-depth",
    "language-minilm-read",
    "language-bert-tiny-accuracy",
    "language-bert-tiny-flat",
    "audit-mnist-psnr",
    "designed-mnist-gain",
    "designed-mnist-told-linear",
    "joint-mnist-bound",
    "rivals-mnist-lenet-uniform-influence",
    "rivals-mnist-lenet-uniform-fisher",
)


def runs() -> dict[str, dict]:
    """The default profile's runs, by key."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["runs"]


def notebooks() -> dict[str, tuple[str, list[str]]]:
    """File name -> (its question, the keys of its runs), in reading order; without the index."""
    import nbformat

    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        keys = [key for key, entry in runs().items() if entry["notebook"] == path.stem]
        if path.stem != "00_index":
            found[path.name] = (title, keys)
    return found


def contents() -> pd.DataFrame:
    """A row a notebook: its question and how its claims came out."""
    rows = []
    for name, (title, keys) in notebooks().items():
        verdicts = Counter(c.verdict for key in keys for c in _claims(key))
        said = ", ".join(f"{verdicts[v]} {v}" for v in claims.VERDICTS if verdicts[v])
        rows.append({"notebook": name, "question": title, "claims": said or "–"})
    return pd.DataFrame(rows)


def _claims(key: str) -> list[Claim]:
    path = ROOT / "results" / key / "claims.json"
    return claims.load(path) if path.exists() else []


def thumbnails(width: int = 460) -> None:
    """Show every run's main figure in small, under its notebook's question."""
    from IPython.display import HTML, SVG, Image, Markdown, display

    for name, (title, keys) in notebooks().items():
        for key in keys:
            for path in sorted((ROOT / "results" / key).glob("overview.*")):
                display(Markdown(f"**[{title}]({name})** — {key}"))
                if path.suffix == ".png":
                    display(Image(str(path), width=width))
                else:
                    fit = "<style>.small svg {width: 100%; height: auto}</style>"
                    display(HTML(f'<div class="small" style="width: {width}px">{SVG(str(path)).data}</div>{fit}'))


def markdown(path: Path = ROOT / "results" / "claims.json") -> str:
    """The claims as the README shows them: the headlines, and every one in a table that opens."""
    found = claims.load(path)
    first = [c for name in HEADLINES for c in found if c.id == name]
    counted = Counter(c.verdict for c in found)
    said = ", ".join(f"{counted[v]} {v}" for v in claims.VERDICTS if counted[v])
    return (
        f"{_rows(first)}\n\n<details><summary>All {len(found)} claims: {said}</summary>\n\n{_rows(found)}\n\n</details>"
    )


def _rows(found: Sequence[Claim]) -> str:
    lines = ["| claim | attacker | measured [95% interval] | holds when | verdict |", "|---|---|---|---|---|"]
    for c in found:
        number = claims.interval((c.value, c.low, c.high))
        within = f" {c.condition}: {claims.interval(c.within)}" if c.conditional else ""
        note = f" <br><sub>{c.note}</sub>" if c.note else ""
        lines.append(
            _row(
                f"{c.statement} <br>*{c.id}*", c.attacker, f"{c.statistic}: {number}, {c.sample}{note}", c.holds_when,
                f"**{c.verdict}**{within}",
            )
        )  # fmt: skip
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def paper() -> pd.DataFrame:
    """Each experiment of the paper: the notebook, its claims' verdicts, our deviations."""
    books = {entry["experiment"]: entry["notebook"] for entry in runs().values()}
    rows = []
    for what, (experiment, different) in PAPER.items():
        if experiment in books:
            keys = [key for key, entry in runs().items() if entry["experiment"] == experiment]
            counted = Counter(c.verdict for key in keys for c in _claims(key))
            said = ", ".join(f"{counted[v]} {v}" for v in claims.VERDICTS if counted[v])
            rows.append(
                {"of the paper": what, "notebook": books[experiment], "claims": said, "different here": different}
            )
    return pd.DataFrame(rows)
