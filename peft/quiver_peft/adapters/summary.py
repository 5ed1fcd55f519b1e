"""One line for people about an adapter's weights: each method, its size and where it acts."""

import re
from collections.abc import Iterable

from quiver_peft.adapters.weights import AdapterWeights


def summary(weights: AdapterWeights) -> str:
    """Such as "lora rank 8 on attention.qkv, mlp.down, canonical width 32 after attention, mlp"."""
    parts: list[str] = []
    for method in weights.methods:
        if method == "prefix":
            parts.append(f"prefix of {weights.num_prefix_tokens} tokens")
        elif method in ("ptuning", "prompt_tuning"):
            parts.append(f"{method} of {weights.num_prompt_tokens} tokens")
        elif method == "lora":
            kind = "dora" if any(item.magnitude is not None for item in weights.lora) else "lora"
            ranks = _range(item.a.shape[0] for item in weights.lora)
            parts.append(f"{kind} rank {ranks} on {_places(item.target.site for item in weights.lora)}")
        elif method == "ia3":
            parts.append(f"ia3 on {_places(item.target.site for item in weights.ia3)}")
        else:
            widths = _range(item.at_site.down.shape[0] for item in weights.bottlenecks)
            parts.append(f"{method} width {widths} after {_places(item.site for item in weights.bottlenecks)}")
    return ", ".join(parts)


def _range(sizes: Iterable[int]) -> str:
    """One number where all are alike."""
    found = sorted(set(sizes))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _places(sites: Iterable[str]) -> str:
    """Names of sites without the numbers of their layers, each once, in the order of the base."""
    return ", ".join(dict.fromkeys(re.sub(r"layers\.\d+\.", "", site) for site in sites))
