"""Distributed validation, and greedy decoding of a tensor-parallel base."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from quiver_peft.model import T5, AnyModel
from quiver_peft.parallel.mesh import Mesh
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.batching import BatchLimits, sorted_by_length
from quiver_trainer.data.dataset import Dataset
from quiver_trainer.data.span_corruption import SpanCorruptor
from quiver_trainer.loop.metrics import GeneratedMetrics, ValidationMetrics, compare_texts
from quiver_trainer.loop.predict import predict_tokens
from quiver_trainer.loop.validation import Validator
from quiver_trainer.parallel.rows import pad_prompts, pad_rows, shard_rows, with_start
from quiver_trainer.recipe.config import EvaluationSection


class ParallelValidator(Validator):
    """A `Validator` that shards samples over the data-parallel group."""

    def __init__(
        self,
        settings: EvaluationSection,
        data: Dataset,
        mender: SpanCorruptor | None,
        limits: BatchLimits,
        num_steps: int,
        mesh: Mesh,
    ) -> None:
        super().__init__(settings, data, mender, limits, num_steps)
        self._mesh = mesh

    @torch.no_grad()
    def loss_metrics(self, model: AnyModel) -> ValidationMetrics:
        """Teacher-forced metrics over all ranks, without dropout."""
        sums = torch.zeros(3, dtype=torch.float64)
        was_training = model.training
        model.eval()
        for batch in sorted_by_length(shard_rows(self.loss_samples, self._mesh), self.limits):
            rows = pad_rows(batch, model, self._mesh)
            hidden = model.hidden(*rows.inputs).flatten(0, 1).index_select(0, rows.positions)
            logits = model.base.logits(hidden).float()
            loss = F.cross_entropy(logits, rows.targets, reduction="sum").item()
            sums += torch.tensor([loss, (logits.argmax(-1) == rows.targets).sum().item(), len(logits)])
        model.train(was_training)
        sums = sums.to(self._mesh.device)
        dist.all_reduce(sums, group=self._mesh.data)
        loss, right, count = sums.tolist()
        return ValidationMetrics(loss / count, right / count)

    def generation_metrics(self, model: AnyModel, tokenizer: Tokenizer) -> GeneratedMetrics:
        """Metrics of greedy answers over all ranks."""
        longest = self.max_new_tokens
        if longest is None:
            longest = max(len(sample.tokens) - sample.num_prompt_tokens for sample in self.match_samples)
        mine = shard_rows(self.match_samples, self._mesh)
        answers = greedy_answers(model, [s.tokens[: s.num_prompt_tokens] for s in mine], longest, self._mesh)
        texts = [
            (tokenizer.decode(answer), tokenizer.decode(sample.tokens[sample.num_prompt_tokens :]))
            for answer, sample in zip(answers, mine, strict=True)
        ]
        of_all: list[list[tuple[str, str]]] = [[] for _ in range(self._mesh.data_size)]
        dist.all_gather_object(of_all, texts, group=self._mesh.data)
        pairs = [pair for own in of_all for pair in own]
        return compare_texts([ours for ours, _ in pairs], [theirs for _, theirs in pairs], overlap=self.overlap)


def greedy_answers(
    model: AnyModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, mesh: Mesh
) -> list[list[int]]:
    """The greedy continuation of each prompt, the same on every tensor-parallel rank.

    An unsharded base decodes as a server does. A sharded one runs whole forward passes: enough for the few samples of a
    validation, not for serving.
    """
    if not prompts:
        return []
    if mesh.tensor_size == 1:
        return predict_tokens(model, prompts, max_new_tokens=max_new_tokens)
    was_training = model.training
    model.eval()
    written: list[list[int]] = [[] for _ in prompts]
    waiting = {i for i in range(len(prompts)) if _room(model, prompts[i]) > 0}
    while waiting:
        rows = sorted(waiting)
        tokens = _next_tokens(model, [prompts[i] for i in rows], [written[i] for i in rows], mesh)
        for i, token in zip(rows, tokens, strict=True):
            if token not in model.base.config.eos_token_ids:
                written[i].append(token)
                if len(written[i]) < min(max_new_tokens, _room(model, prompts[i])):
                    continue
            waiting.remove(i)
    model.train(was_training)
    return written


def _room(model: AnyModel, prompt: Sequence[int]) -> int:
    """How many new tokens fit into the context."""
    return 1 << 30 if model.max_tokens is None else model.max_tokens - len(prompt)


@torch.no_grad()
def _next_tokens(
    model: AnyModel, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], mesh: Mesh
) -> list[int]:
    """The argmax token after each answer so far."""
    if isinstance(model, T5):
        rows = [with_start(row, model.base) for row in written]
        source = pad_prompts(prompts, model.num_virtual_in("encoder"), mesh)
        target = pad_prompts(rows, model.num_virtual_in("decoder"), mesh)
        hidden = model.hidden(source, target, torch.tensor([len(prompt) for prompt in prompts], device=mesh.device))
    else:
        rows = [[*prompt, *row] for prompt, row in zip(prompts, written, strict=True)]
        hidden = model.hidden(pad_prompts(rows, model.num_virtual_in(""), mesh))
    last = torch.tensor([len(row) - 1 for row in rows], device=mesh.device)
    return model.base.logits(hidden[torch.arange(len(rows), device=mesh.device), last]).argmax(-1).tolist()
