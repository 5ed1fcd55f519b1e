"""T5 span corruption: masked spans are removed from the source and form the target.

    thank you for inviting me  ->  source: thank you <x> me <eos>   target: <x> for inviting <y> <eos>

Raffel et al. 2020, section 3.1.4 (i.i.d. spans whose number and total length are fixed): as `random_spans_noise_mask`
of Google's text-to-text-transfer-transformer draws them.
"""

import random
from collections.abc import Sequence

from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.jsonl import Sample
from quiver_trainer.errors import DataError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """The sentinel tokens, in order. Raises DataError if the tokenizer has none."""
    found: list[int] = []
    while (token := tokenizer.id_of(f"<extra_id_{len(found)}>")) is not None:
        found.append(token)
    if len(found) < 2:
        raise DataError("rows of a `text` need a tokenizer with <extra_id_0>, <extra_id_1>, ...: this base's has none")
    return found


class SpanCorruptor:
    """Draws new spans in each epoch, deterministically by seed. Raises DataError."""

    def __init__(self, tokenizer: Tokenizer, eos: int, seed: int) -> None:
        self._sentinels = sentinel_ids(tokenizer)
        self._eos = eos
        self._seed = seed

    def __call__(self, sample: Sample, place: int, epoch: int) -> Sample:
        """Raw text as a source and a target; other samples unchanged."""
        if sample.num_prompt_tokens:
            return sample
        generator = random.Random(f"seed {self._seed}, epoch {epoch}, sample {place}")
        return corrupt_spans(sample.tokens, self._sentinels, self._eos, generator)


def corrupt_spans(tokens: Sequence[int], sentinels: Sequence[int], eos: int, generator: random.Random) -> Sample:
    """Source and target of a text of at least two tokens."""
    num_missing = min(max(round(len(tokens) * NOISE_DENSITY), 1), len(tokens) - 1)
    # The last sentinel ends the target.
    num_spans = min(max(round(num_missing / MEAN_SPAN_LENGTH), 1), len(tokens) - num_missing, len(sentinels) - 1)
    missing = _segments(num_missing, num_spans, generator)
    kept = _segments(len(tokens) - num_missing, num_spans, generator)
    source: list[int] = []
    target: list[int] = []
    place = 0
    for sentinel, num_kept, length in zip(sentinels, kept, missing, strict=False):
        source += [*tokens[place : place + num_kept], sentinel]
        place += num_kept
        target += [sentinel, *tokens[place : place + length]]
        place += length
    source.append(eos)
    target += [sentinels[num_spans], eos]
    return Sample(source + target, len(source))


def _segments(total: int, count: int, generator: random.Random) -> list[int]:
    """`total` split at random into non-empty parts."""
    cuts = sorted(generator.sample(range(1, total), count - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
