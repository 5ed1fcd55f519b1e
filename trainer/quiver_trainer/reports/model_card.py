"""The model card (README.md) of an output folder: contents, training data and metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

CARD_FILE = "README.md"
_METRICS = (
    ("validation_loss", "validation loss", "{:.4f}"),
    ("token_accuracy", "token accuracy", "{:.1%}"),
    ("exact_match", "exact match", "{:.1%}"),
    ("rouge_l", "ROUGE-L", "{:.1%}"),
    ("bleu", "BLEU", "{:.1%}"),
    ("train_loss", "training loss", "{:.4f}"),
)
# Of a method's configuration, what is told where it is not empty.
_UNTOLD = ("method", "layer_selection", "rank_pattern", "alpha_pattern")


def model_card(
    name: str, base_name: str, record: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], curve_file: str
) -> str:
    """The card as Markdown. record: the training record. methods: of the adapter; empty for a base."""
    what = f"An adapter ({' + '.join(m['method'] for m in methods)}) for" if methods else "A fine-tuned"
    settings = record["settings"]
    sections = [
        f"---\nbase_model: {base_name}\n---\n\n# {name}\n",
        f"{what} `{base_name}`, {record['num_trainable_parameters']:,} parameters trained by Quiver "
        f"{record['versions']['quiver']} in {record['steps']:,} steps over {record['tokens']:,} tokens "
        f"({record['seconds']:,.0f} s). Base fingerprint `{settings['base']}`.\n",
        "## Measured\n",
        _table(("", ""), _metric_rows(record)),
        f"![learning curve]({curve_file})\n",
        "## Data\n",
        _table(("", "file", "rows", "weight", "SHA-256"), _data_rows(record["data"])),
    ]
    if methods:
        sections += ["## Methods\n", *(_method(method) for method in methods)]
    told = {key: value for key, value in settings.items() if not key.startswith(("adapter.", "data.", "base"))}
    sections += ["## Settings\n", _table(("key", "value"), [(f"`{k}`", f"`{v}`") for k, v in told.items()])]
    return "\n".join(sections)


def _metric_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(title, form.format(record[key])) for key, title, form in _METRICS if record.get(key) is not None]


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (use, f"`{file['file']}`", f"{file['rows']:,}", f"{file['weight']:g}", f"`{file['sha256']}`")
        for use, files in data.items()
        for file in (files if isinstance(files, list) else [files])
    ]


def _method(method: Mapping[str, Any]) -> str:
    told = [f"{key} `{value}`" for key, value in method.items() if key not in _UNTOLD and value not in (None, {})]
    return f"- **{method['method']}**: {', '.join(told)}\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
