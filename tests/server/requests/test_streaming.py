"""Answers in pieces and whole: streams, cancellation, what ends an answer, and candidates."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from support.live_server import eventually
from support.server_fixture import ENDURING, LLAMA_ADAPTERS, ServerFixture
from support.tiny import EOS

from quiver import Client, FinishReason, Generation, Piece
from quiver.request_messages import GenerateOptions, generate_request
from quiver.v1.generation_pb2_grpc import GenerationServiceStub
from quiver_peft.tokenizer import Tokenizer

PROMPT = "Please send the order number"
SAMPLED: GenerateOptions = {"temperature": 1.0, "seed": 11, "max_new_tokens": 60, "ignore_eos": True}


def sampled(client: Client, **changes: object) -> Generation:
    """A varied text: tiny models repeat themselves when they are greedy."""
    return client.generate(PROMPT, **{**SAMPLED, **changes})  # pyright: ignore[reportArgumentType]


def assert_same_answer(pieces: Sequence[Piece], answer: Generation) -> None:
    """A stream, put together, is the unary answer."""
    for candidate in answer.candidates:
        own = [piece for piece in pieces if piece.index == candidate.index]
        assert "".join(piece.text for piece in own) == candidate.text
        assert tuple(token for piece in own for token in piece.token_ids) == candidate.token_ids
        assert tuple(item for piece in own for item in piece.logprobs) == candidate.logprobs
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason is candidate.finish_reason
    assert pieces[0].adapter == answer.adapter
    assert pieces[0].request_id
    assert all(piece.usage is None for piece in pieces[:-1])
    assert pieces[-1].usage == answer.usage
    assert pieces[-1].timing is not None


@pytest.mark.parametrize("adapter_id", ["", "all-r2"])
@pytest.mark.parametrize("num_candidates", [1, 3])
def test_pieces_make_the_unary_answer(client: Client, adapter_id: str, num_candidates: int) -> None:
    options: GenerateOptions = {**SAMPLED, "adapter": adapter_id, "n": num_candidates, "logprobs": True}
    assert_same_answer(list(client.stream(PROMPT, **options)), client.generate(PROMPT, **options))


def test_pieces_come_one_by_one(client: Client) -> None:
    pieces = list(client.stream(PROMPT, max_new_tokens=12, ignore_eos=True))
    assert [len(piece.token_ids) for piece in pieces] == [1] * 12


def test_text_is_the_decoded_tokens(client: Client, llama: ServerFixture) -> None:
    answer = sampled(client)
    assert answer.text == Tokenizer(llama.base).decode(answer.token_ids)


def test_usage_timing_and_request_id(client: Client, llama: ServerFixture) -> None:
    answer = client.generate(PROMPT, adapter="one-r1", max_new_tokens=9, ignore_eos=True, request_id="mine")
    assert answer.request_id == "mine"
    assert answer.usage.prompt_tokens == len(Tokenizer(llama.base).encode(PROMPT))
    assert answer.usage.generated_tokens == 9
    assert 0 <= answer.timing.queue_seconds <= answer.timing.time_to_first_token_seconds <= answer.timing.total_seconds
    assert answer.adapter is not None
    assert (answer.adapter.id, answer.adapter.methods) == ("one-r1", ("lora",))


def generated(bench: ServerFixture, adapter_id: str) -> float:
    return bench.server.metric("quiver_generated_tokens_total", adapter=adapter_id)


def test_leaving_a_stream_frees_its_row(enduring: ServerFixture) -> None:
    with enduring.server.client() as client:
        client.generate(PROMPT, adapter="keys-r16", max_new_tokens=1)
        before = generated(enduring, "keys-r16")
        stream = client.stream(PROMPT, **{**ENDURING, "adapter": "keys-r16"})
        next(stream)
        assert client.get_adapter("keys-r16").running == 1
        stream.close()
        eventually(lambda: client.get_adapter("keys-r16").running == 0, seconds=2)
    eventually(lambda: enduring.server.metric("quiver_running_sequences") == 0, seconds=2)
    eventually(lambda: enduring.server.metric("quiver_requests_total", adapter="keys-r16", code="CANCELLED") >= 1)
    assert generated(enduring, "keys-r16") - before < 8000, "it ran on to its end"
    assert enduring.server.metric("quiver_kv_usage_ratio") == 0


def test_cancelling_a_unary_call_frees_its_rows(enduring: ServerFixture) -> None:
    with enduring.server.client() as client:
        client.generate(PROMPT, adapter="keys-r16", max_new_tokens=1)
        before = generated(enduring, "keys-r16")
        request = generate_request(PROMPT, **{**ENDURING, "adapter": "keys-r16", "n": 8, "temperature": 1.0, "seed": 1})
        with grpc.insecure_channel(enduring.server.target) as channel:
            call = GenerationServiceStub(channel).Generate.future(request)
            eventually(lambda: enduring.server.metric("quiver_running_sequences") == 8)
            call.cancel()
            eventually(lambda: enduring.server.metric("quiver_running_sequences") == 0, seconds=2)
        eventually(lambda: client.get_adapter("keys-r16").running == 0, seconds=2)
    assert generated(enduring, "keys-r16") - before < 8 * 8000


def test_a_missed_deadline_frees_the_row(enduring: ServerFixture) -> None:
    with Client(enduring.server.target, timeout_seconds=0.1) as hurried:
        with pytest.raises(Exception, match="did not answer within timeout_seconds"):
            hurried.generate(PROMPT, **{**ENDURING, "n": 8, "temperature": 1.0})
        eventually(lambda: enduring.server.metric("quiver_running_sequences") == 0, seconds=2)


def split_stop(client: Client) -> tuple[Generation, str, int]:
    """A sampled answer, and a string in it whose characters come from different tokens, with its place."""
    answer = sampled(client)
    end = 0
    for piece in list(client.stream(PROMPT, **SAMPLED))[:-5]:
        end += len(piece.text)
        stop = answer.text[end - 1 : end + 2]
        if end > 15 and len(stop) == 3 and stop.isascii() and piece.text:
            return answer, stop, answer.text.index(stop)
    raise AssertionError(f"choose another seed: {answer.text!r}")


def test_stop_string_across_tokens(client: Client) -> None:
    answer, stop, place = split_stop(client)
    stopped = sampled(client, stop=["never to be seen", stop])
    assert stopped.finish_reason is FinishReason.STOP_STRING
    assert stopped.text == answer.text[:place]
    assert stopped.token_ids == answer.token_ids[: len(stopped.token_ids)]
    assert 0 < len(stopped.token_ids) < len(answer.token_ids)
    pieces = list(client.stream(PROMPT, **{**SAMPLED, "stop": stop}))
    assert_same_answer(pieces, sampled(client, stop=stop))


def test_include_stop_string(client: Client) -> None:
    answer, stop, place = split_stop(client)
    stopped = sampled(client, stop=stop, include_stop_string=True)
    assert stopped.text == answer.text[: place + len(stop)]
    assert stopped.finish_reason is FinishReason.STOP_STRING


def test_an_unfinished_stop_string_is_shown_at_the_end(client: Client) -> None:
    answer = sampled(client)
    again = sampled(client, stop=answer.text[-2:] + "\N{SNOWMAN}")
    assert (again.text, again.finish_reason) == (answer.text, FinishReason.LENGTH)


def test_stop_token(client: Client) -> None:
    answer = sampled(client)
    token = answer.token_ids[10]
    place = answer.token_ids.index(token)
    stopped = sampled(client, stop_token_ids=[token, 319])
    assert stopped.finish_reason is FinishReason.STOP_TOKEN
    assert stopped.token_ids == answer.token_ids[: place + 1]
    assert answer.text.startswith(stopped.text)


def test_end_of_sequence_ignore_eos_and_min_new_tokens(client: Client) -> None:
    options: GenerateOptions = {"temperature": 2.0, "seed": 5, "n": 16, "max_new_tokens": 100}
    answer = client.generate(PROMPT, **options)
    ended = [c for c in answer.candidates if c.finish_reason is FinishReason.EOS]
    assert ended, "choose another seed"
    for candidate in ended:
        assert candidate.token_ids.index(EOS) == len(candidate.token_ids) - 1
        assert "<|eos|>" not in candidate.text
    first = min(ended, key=lambda candidate: len(candidate.token_ids))
    on = client.generate(PROMPT, **{**options, "ignore_eos": True}).candidates[first.index]
    assert on.token_ids[: len(first.token_ids)] == first.token_ids
    assert (len(on.token_ids), on.finish_reason) == (100, FinishReason.LENGTH)
    later = client.generate(PROMPT, **{**options, "min_new_tokens": 100}).candidates[first.index]
    assert (len(later.token_ids), EOS in later.token_ids) == (100, False)


def test_seeded_sampling_does_not_depend_on_company(client: Client, llama: ServerFixture) -> None:
    options: GenerateOptions = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3, "max_new_tokens": 40}
    names = ["", *LLAMA_ADAPTERS] * 3

    def ask(name: str) -> tuple[int, ...]:
        return client.generate(PROMPT, **{**options, "adapter": name}).token_ids

    alone = {name: ask(name) for name in set(names)}
    assert len(set(alone.values())) == len(alone)
    with ThreadPoolExecutor(len(names)) as threads:
        busy = list(threads.map(ask, names))
    assert busy == [alone[name] for name in names]


def test_candidates_differ_and_do_not_depend_on_their_number(client: Client) -> None:
    four = sampled(client, n=4)
    assert [candidate.index for candidate in four.candidates] == [0, 1, 2, 3]
    assert len({candidate.token_ids for candidate in four.candidates}) == 4
    assert sampled(client, n=2).candidates == four.candidates[:2]
    assert sampled(client).token_ids == four.token_ids
    assert four.usage.generated_tokens == 240


def test_without_a_seed_answers_differ(client: Client) -> None:
    answers = {client.generate(PROMPT, temperature=1.0, max_new_tokens=20).token_ids for _ in range(3)}
    assert len(answers) == 3
