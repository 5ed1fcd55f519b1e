"""Which token is drawn: against an independent numpy implementation, and against the distribution itself."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.sequences import sequence

from quiver_server.engine.sampler import NOT_FINITE, logprobs_of, sample, uniform

VOCAB = 12
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.2, -0.3, 0.0, 2.5, -2.0, 1.0, 0.1, -0.7])
LEAST = 2.0**-149  # of float32 above 0
Params = Mapping[str, float]
SEEDS = (0, 2**63 + 1, 2**63 + 2, 2**64 - 1)  # the latter ones are equal as floats


def numpy_distribution(
    logits: NDArray[np.float64], prompt: list[int], generated: list[int], params: Params
) -> NDArray[np.float64]:
    """The distribution to draw from, token by token and without sorting tricks."""
    values = logits.copy()
    repetition = params.get("repetition_penalty", 1.0)
    for token in set(prompt) | set(generated):
        values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
    for token in set(generated):
        values[token] -= params.get("presence_penalty", 0.0)
        values[token] -= params.get("frequency_penalty", 0.0) * generated.count(token)
    values = values / params["temperature"]
    if top_k := int(params.get("top_k", 0)):
        values[values < np.sort(values)[-min(top_k, VOCAB)]] = -np.inf
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    kept = np.zeros(VOCAB, dtype=bool)
    mass = 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if mass >= params.get("top_p", 1.0) or probabilities[token] < params.get("min_p", 0.0) * probabilities.max():
            break
        kept[token] = True
        mass += probabilities[token]
    result = np.where(kept, probabilities, 0.0)
    return result / result.sum()


def draw(num: int, prompt: list[int], generated: list[int], **params: float) -> NDArray[np.float64]:
    """How often each token comes over `num` seeds."""
    counts = np.zeros(VOCAB)
    for seed in range(num):
        item = sequence(prompt, params={**params, "seed": seed})
        item.generated = list(generated)
        counts[sample(LOGITS[None], [item])[0]] += 1
    return counts / num


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.4},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 1.0, "presence_penalty": 1.5},
        {"temperature": 1.0, "frequency_penalty": -0.8},
        {"temperature": 1.2, "repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_distribution(params: dict[str, float]) -> None:
    prompt, generated = [0, 1, 7], [3, 3, 4]
    expected = numpy_distribution(LOGITS.double().numpy(), prompt, generated, params)
    found = draw(2000, prompt, generated, **params)
    assert not found[expected == 0].any(), "what is cut away never comes"
    assert np.abs(found - expected).max() < 0.05


@given(
    st.lists(st.floats(-4, 4, width=16), min_size=VOCAB, max_size=VOCAB, unique=True),
    st.floats(-1.9, 1.9),
    st.floats(-1.9, 1.9),
    st.floats(0.5, 2.0),
)
def test_greedy_takes_the_most_likely_after_penalties(
    logits: list[float], presence: float, frequency: float, repetition: float
) -> None:
    params = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    item = sequence([1, 2], params=params)
    item.generated = [3, 3, 5]
    expected = numpy_distribution(np.array(logits), [1, 2], [3, 3, 5], {**params, "temperature": 1.0})
    token = sample(torch.tensor([logits]), [item])[0]
    assert expected[token] == pytest.approx(expected.max(), rel=1e-4)


def test_min_new_tokens_forbids_every_end() -> None:
    item = sequence([1], min_new_tokens=1, eos_ids=frozenset({3}), stop_ids=frozenset({7}))
    assert sample(LOGITS[None], [item]) == [0]
    item.generated = [0]
    assert sample(LOGITS[None], [item]) == [3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_token_and_harms_no_other(value: float) -> None:
    logits = torch.stack([LOGITS, LOGITS, LOGITS.roll(1)])
    logits[1] = value
    for params in ({}, {"temperature": 1.0}, {"repetition_penalty": 1.2}):
        items = [sequence([1], params=params) for _ in range(3)]
        tokens = sample(logits, items)
        assert tokens[1] == NOT_FINITE
        assert [tokens[0], tokens[2]] == sample(logits[[0, 2]], [items[0], items[2]])


@given(
    st.floats(LEAST, 2.0**127, width=32),
    st.floats(LEAST, 2.0**127, width=32),
    st.floats(LEAST, 1.0, width=32),
    st.floats(0.0, 1.0, width=32),
    st.integers(0, 2**32 - 1),
)
def test_no_parameter_of_a_float_overflows(
    temperature: float, repetition: float, top_p: float, min_p: float, top_k: int
) -> None:
    """Those that the wire lets through: all of float32."""
    params = {"temperature": temperature, "repetition_penalty": repetition, "top_p": top_p, "min_p": min_p}
    item = sequence([0, 5, 8], params=params, top_k=top_k)
    assert 0 <= sample(LOGITS[None], [item])[0] < VOCAB
    item = sequence([0, 5, 8], params={**params, "temperature": 0.0})
    assert 0 <= sample(LOGITS[None], [item])[0] < VOCAB


def test_the_least_temperature_is_greedy() -> None:
    assert sample(LOGITS[None], [sequence([1], temperature=LEAST)]) == sample(LOGITS[None], [sequence([1])])


def test_rows_do_not_see_one_another() -> None:
    items = [sequence([1], temperature=1.0, seed=seed) for seed in range(6)]
    logits = torch.stack([LOGITS.roll(shift) for shift in range(6)])
    before = logits.clone()
    together = sample(logits, items)
    assert together == [sample(logits[i : i + 1], [item])[0] for i, item in enumerate(items)]
    assert torch.equal(logits, before), "log-probabilities are read from the same logits afterwards"


def test_uniform_depends_on_its_arguments_alone() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    values = [
        uniform(seed, index, place)
        for seed in (0, 2**63 + 1, 2**63 + 2, 2**64 - 1)
        for index in range(3)
        for place in range(100)
    ]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert abs(float(np.mean(values)) - 0.5) < 0.05


def test_logprobs() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    expected = torch.log_softmax(logits, -1)
    items = logprobs_of(logits, [4, 5], 3)
    assert [item.logprob for item in items] == pytest.approx([float(expected[0, 4]), float(expected[1, 5])])
    assert [token for token, _ in items[0].top] == [3, 7, 0]
    assert [value for _, value in items[0].top] == pytest.approx(expected[0, [3, 7, 0]].tolist())
    assert logprobs_of(logits, [4, 5], 0)[0].top == ()
    assert len(logprobs_of(logits, [4, 5], 100)[0].top) == VOCAB
