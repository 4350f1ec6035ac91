"""Floating-point operations on paper: a token forward, a token of training, a prompt.

Counted are the matrices that multiply (two operations a weight: times, plus) and attention (two for a score, two for a
weighted value) to the tokens that a layer's window, if it has one, lets see. Not counted are norms, softmax,
activations, biases, residual sums, tables that are only looked up, and the optimizer: together well below a hundredth
in any but a toy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.spec.config import ModelConfig
from gptcli.spec.params import grouped


@dataclass(frozen=True)
class Flops:
    """What a model computes with a context of ``context`` tokens (T).

    Attributes:
        parameters: the N of the rules of thumb, 2 N forward and 6 N in training: all that is stored.
        block_parameters: in the matrices of the blocks.
        unembedding_parameters: ``V C``, tied or not.
        attention_per_pair: ``4 L H D``, of one token that looks at one token.
        layers: L.
        windows: of layers whose tokens see only so many back, themselves the last.
    """

    context: int
    parameters: int
    block_parameters: int
    unembedding_parameters: int
    attention_per_pair: int
    layers: int
    windows: tuple[int, ...] = ()

    @property
    def multiplied_parameters(self) -> int:
        """In all matrices that multiply: the unembedding once, tied or not; tables that are looked up not at all."""
        return self.block_parameters + self.unembedding_parameters

    @property
    def matrices(self) -> int:
        """Forward, one token, without attention: twice the weights."""
        return 2 * self.multiplied_parameters

    def attention(self, seen: float) -> float:
        """Forward, one token with ``seen`` tokens to look at, itself among them."""
        return self._attention([min(seen, window) for window in self.windows], seen)

    @property
    def attention_causal(self) -> float:
        """Forward, one token on average, where the t-th of a context has t tokens to look at."""
        return self.prefill_attention / self.context

    def _attention(self, within: Sequence[float], without: float) -> float:
        """Of what a token looks at in each layer with a window, and in every one without."""
        pairs = (self.layers - len(within)) * without + sum(within)
        return self.attention_per_pair // self.layers * pairs

    @property
    def forward(self) -> float:
        """One token that has the whole context to look at: also what decoding costs at the end of it."""
        return self.matrices + self.attention(self.context)

    @property
    def forward_causal(self) -> float:
        """One token on average, where the t-th of a context has t tokens to look at."""
        return self.matrices + self.attention_causal

    @property
    def prefill(self) -> float:
        """A whole context at once: each token looks at those up to itself, and only the last needs logits."""
        return 2 * (self.context * self.block_parameters + self.unembedding_parameters) + self.prefill_attention

    @property
    def prefill_attention(self) -> float:
        """Attention's part in ``prefill``: a whole number, and exactly that."""
        without = _looks(self.context, self.context)
        return self._attention([_looks(self.context, window) for window in self.windows], without)


def _looks(context: int, window: int) -> int:
    """The sum of min(t, window) over the tokens t = 1 ... context."""
    near = min(context, window)
    return near * (near + 1) // 2 + (context - near) * near


def count_flops(config: ModelConfig, context: int | None = None) -> Flops:
    """The operations of a model over ``context`` tokens; None is the model's own context."""
    tensors = grouped(config).items()
    return Flops(
        context=config.context if context is None else context,
        parameters=sum(count * tensor.parameters for tensor, count in tensors),
        block_parameters=sum(count * tensor.parameters for tensor, count in tensors if tensor.is_block_matrix),
        unembedding_parameters=config.vocab_size * config.width,
        attention_per_pair=4 * config.layers * config.heads * config.head_dim,
        layers=config.layers,
        windows=tuple(window for window in config.windows[: config.layers] if window is not None),
    )


def flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Floating-point operations of training on one token, forward and backward: ``6 N + 12 L H D T``.

    The backward pass computes twice what the forward pass does: a gradient of the input and one of the weight. N counts
    the matrices that multiply (``Flops.multiplied_parameters``); the second term is attention over T tokens, as if
    every token saw all of them. Half of that is masked away, yet the whole is what PaLM, nanoGPT and others divide by,
    so utilisation here compares with theirs. What checkpointing computes again does not count. Source: Chowdhery et
    al. 2022 (PaLM), appendix B; 6 N is Kaplan et al. 2020, 2.1.
    """
    return 3.0 * count_flops(config, context).forward
