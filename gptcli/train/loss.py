"""Cross entropy of the unembedding, in chunks: the logits of a whole batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcli.core.model import Transformer
from gptcli.core.score import LOGIT_CHUNKS, target_nats
from gptcli.train.data import IGNORED


class Objective(nn.Module):
    """What training makes small: the summed cross entropy of a transformer's next-token predictions."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        """``dtype`` is what the matrices are multiplied in; the weights, norms and the softmax stay float32."""
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """The sum over targets, in nats, float32, of ids and targets ``[B, T]`` (``IGNORED`` ones add nothing)."""
        model = self.transformer
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            final = model.norm(model.residual_stream(ids, documents=documents))  # [B, T, C]
        return cross_entropy(final.flatten(0, 1).to(self.dtype), model.unembedding.weight, targets.flatten())


def cross_entropy(vectors: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy (nats, float32) of ``softmax(vectors @ unembedding.T)``, chunk by chunk.

    Equals ``F.cross_entropy(vectors @ unembedding.T, targets, reduction="sum", ignore_index=IGNORED)``. The gradient is
    made along with the loss, while a chunk's logits are at hand, so nothing of size ``[N, V]`` is kept or made again.

    Args:
        vectors: ``[N, C]``, whose dtype is that of the products.
        unembedding: ``[V, C]``.
        targets: ``[N]`` int64; ``IGNORED`` where nothing is to be learnt.
    """
    if not torch.is_grad_enabled():  # as ``gptcli score`` does it
        wanted, matrix = targets != IGNORED, unembedding.to(vectors.dtype)
        return target_nats(vectors[wanted], lambda part: part @ matrix.t(), len(matrix), targets[wanted]).sum()
    loss: Tensor = _ChunkedCrossEntropy.apply(vectors, unembedding, targets)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
        matrix = unembedding.to(vectors.dtype)
        to_vectors = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        # Summed over chunks, so in float32.
        to_matrix = torch.zeros_like(matrix, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = vectors.new_zeros((), dtype=torch.float32)
        size = max(1, LOGIT_CHUNKS.get(vectors.device.type, LOGIT_CHUNKS["cpu"]) // len(matrix))
        every = bool((targets != IGNORED).all())  # asked once: the answer takes a GPU as long as all that is before
        for start in range(0, len(vectors), size):
            part = slice(start, start + size)
            learnt = (targets[part] != IGNORED)[:, None]  # [N, 1]
            target = targets[part, None].clamp(min=0)
            logprobs = (vectors[part] @ matrix.t()).float().log_softmax(-1)  # [N, V]
            loss -= (logprobs.gather(1, target) * learnt).sum()
            if to_vectors is None and to_matrix is None:
                continue
            # The gradient of the loss with respect to the logits: the probabilities, less 1 at the target.
            gradient = logprobs.exp_().scatter_add_(1, target, target.new_full(target.shape, -1, dtype=torch.float32))
            gradient = (gradient if every else gradient * learnt).to(matrix.dtype)
            if to_vectors is not None:
                torch.mm(gradient, matrix, out=to_vectors[part])
            if to_matrix is not None:
                to_matrix += gradient.t() @ vectors[part]
        ctx.save_for_backward(to_vectors, to_matrix)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_vectors, to_matrix = ctx.saved_tensors
        scale = gradients[0]
        return (
            # Not in the vectors' type, to which a GPU rounds the scale: it would be off for all of them alike.
            None if to_vectors is None else (to_vectors.float() * scale).to(to_vectors.dtype),
            None if to_matrix is None else to_matrix * scale,
            None,
        )
