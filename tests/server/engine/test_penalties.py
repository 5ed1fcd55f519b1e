"""Penalties over the wire, against transformers' own; and seeds with every option reproduce in any company."""

from concurrent.futures import ThreadPoolExecutor

import torch
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture
from support.tiny import PAD, random_tokens

from quiver import Client
from quiver.request_messages import GenerateOptions

PENALTY = 1.8


def hf_penalised(llama: ServerFixture, adapter_id: str, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    tokens = torch.tensor([prompt])
    out = llama.oracles[adapter_id].generate(  # pyright: ignore[reportCallIssue]
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=num_tokens,
        repetition_penalty=PENALTY,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return tuple(out[0, len(prompt) :].tolist())


def test_repetition_penalty_is_that_of_transformers(llama: ServerFixture, client: Client) -> None:
    prompt = random_tokens(20, seed=3).tolist()
    for adapter_id in ("", "mlp-r8"):
        options: GenerateOptions = {"adapter": adapter_id, "max_new_tokens": 24, "ignore_eos": True}
        answer = client.generate(prompt, **{**options, "repetition_penalty": PENALTY})
        assert answer.token_ids == hf_penalised(llama, adapter_id, prompt, 24)
        assert answer.token_ids != client.generate(prompt, **options).token_ids, "it must matter"


def test_a_high_frequency_penalty_keeps_greedy_answers_from_repeating(client: Client) -> None:
    options: GenerateOptions = {"max_new_tokens": 40, "ignore_eos": True}
    plain = client.generate([5, 6], **options).token_ids
    penalised = client.generate([5, 6], **{**options, "frequency_penalty": 2.0, "presence_penalty": 2.0}).token_ids
    assert len(set(plain)) < len(set(penalised))


def test_every_option_with_a_seed_reproduces_in_any_company(client: Client) -> None:
    options: GenerateOptions = {
        "temperature": 1.1,
        "top_k": 50,
        "top_p": 0.97,
        "min_p": 0.001,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "seed": 12,
        "n": 3,
        "max_new_tokens": 30,
    }
    names = ["", *LLAMA_ADAPTERS] * 2

    def ask(name: str) -> list[tuple[int, ...]]:
        answer = client.generate(random_tokens(17, seed=2).tolist(), **{**options, "adapter": name})
        return [candidate.token_ids for candidate in answer.candidates]

    alone = {name: ask(name) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(ask, names)) == [alone[name] for name in names]
    assert len({candidate for answer in alone.values() for candidate in answer}) == 3 * len(alone)
