"""What a model takes in memory, by its configuration alone: nothing is loaded. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slm_pipeline.models import architectures

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STREAMED_BYTES = 8 << 30  # of states that go up together the stack of a model whose blocks stay on disk
MAX_LOGITS = 1 << 26  # float32 logits at a time: 256 MB
_TIED = ("gemma", "gemma2", "gemma3_text", "opt")  # whose head is the embedding unless config.json says otherwise


@dataclass(frozen=True)
class Sizes:
    """A model and the text that it is shown, in numbers.

    Attributes:
        layers, hidden, neurons, vocabulary: as config.json has them.
        queries, keys: width of all query heads, and of all key heads, together.
        inputs: projections that lead into the hidden neurons: 2 where they are gated.
        is_tied: whether the head is the embedding.
        item_bytes: of a weight.
        num_samples, seq_len: of the calibration text.
        streams: whether two blocks at a time are in memory.
        positions: rows of a table of learned positions.
        removed: layers that the dense model has beside these.
        on_host: whether the weights lie in main memory.
    """

    layers: int
    hidden: int
    neurons: int
    vocabulary: int
    queries: int
    keys: int
    inputs: int
    is_tied: bool
    item_bytes: int
    num_samples: int
    seq_len: int
    streams: bool = False
    positions: int = 0
    removed: int = 0
    on_host: bool = False

    @classmethod
    def of(cls, description: Mapping[str, Any], dtype: str, **more: Any) -> Sizes:
        """From config.json's content, ``model.dtype``, and the other fields."""
        architecture = architectures.find(description)
        heads, hidden = int(description["num_attention_heads"]), int(description["hidden_size"])
        head_dim = int(description.get("head_dim") or hidden // heads)
        fused = architecture.mlp_inputs == ("mlp.gate_up_proj",)
        tied = description.get("tie_word_embeddings")
        model_type = str(description["model_type"]).removeprefix(architectures.PRUNED)
        return cls(
            layers=int(description["num_hidden_layers"]),
            hidden=hidden,
            neurons=int(description.get(architecture.intermediate_size) or 4 * hidden),
            vocabulary=int(description["vocab_size"]),
            queries=heads * head_dim,
            keys=int(description.get("num_key_value_heads") or heads) * head_dim,
            inputs=2 if fused else len(architecture.mlp_inputs),
            is_tied=model_type in _TIED if tied is None else bool(tied),
            item_bytes=ITEM_BYTES[dtype],
            positions=int(description.get("max_position_embeddings") or 0) if architecture.learned_positions else 0,
            **more,
        )

    def with_layers(self, number: int | None) -> Sizes:
        """Those of what is left of this model when so many layers are; the same for None."""
        return self if number is None else replace(self, layers=number, removed=self.layers - number)

    @property
    def dense(self) -> Sizes:
        """Those of the model that layers were removed from."""
        return replace(self, layers=self.layers + self.removed, removed=0)

    @property
    def block_matrices(self) -> int:
        """Parameters of a block's linear layers."""
        return self.block_parameters - 2 * self.hidden

    @property
    def block_parameters(self) -> int:
        """Without biases, which are a thousandth."""
        return self.hidden * (2 * self.queries + 2 * self.keys + (self.inputs + 1) * self.neurons + 2)

    @property
    def outer_parameters(self) -> int:
        """Embedding, final norm and head, and positions where they are learned."""
        return self.hidden * (self.vocabulary * (1 if self.is_tied else 2) + self.positions + 1)

    @property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.outer_parameters

    @property
    def weights(self) -> int:
        """Bytes of what is loaded at a time."""
        blocks = min(2, self.layers) if self.streams else self.layers
        return self.item_bytes * (blocks * self.block_parameters + self.outer_parameters)

    @property
    def tokens(self) -> int:
        """Of the calibration text."""
        return self.num_samples * self.seq_len

    def batch_tokens(self, most: int) -> int:
        """Tokens of a batch of whole samples that has at most so many, or one sample."""
        return min(self.num_samples, max(1, most // self.seq_len)) * self.seq_len

    def states(self, tokens: int, number: int = 1) -> int:
        """Bytes of ``number`` residual streams."""
        return tokens * self.hidden * self.item_bytes * number

    def running(self, tokens: int) -> int:
        """Bytes at the most in a block that so many tokens go through, without gradients: in its feed-forward network
        what enters, the hidden neurons of both projections, the activated ones and their product."""
        return tokens * self.item_bytes * (2 * self.hidden + (self.inputs + 2) * self.neurons)

    def backward(self, tokens: int) -> int:
        """Bytes that so many tokens keep for the way back through all blocks, in the weights' type: in each block the
        states around its norms, in float32 too, queries, keys and values, and the hidden neurons; then logits, in
        float32 as well, their logarithms and their gradient."""
        inner = (self.inputs + 2) * self.neurons + 3 * self.queries + 2 * self.keys
        block = tokens * (4 * 4 * self.hidden + self.item_bytes * (inner + 2 * self.hidden))
        return self.layers * block + tokens * self.vocabulary * (2 * self.item_bytes + 12)

    def passing(self, most: int) -> int:
        """Bytes of the states behind all layers of a batch of at most so many tokens, twice where another batch
        follows; of a model that streams, of as many batches as go up together."""
        tokens = self.batch_tokens(most)
        whole = self.states(self.tokens, self.layers + 1)
        if self.streams:
            return min(whole, max(STREAMED_BYTES, self.states(tokens, self.layers + 1)))
        return min(whole, 2 * self.states(tokens, self.layers + 1))

    def walking(self, candidates: int) -> int:
        """Bytes in a walk of so many candidates up the stack: all dense states, three states of each candidate for the
        tokens of a batch, a part of them in a block, and pieces of logits."""
        tokens = self.batch_tokens(min(2048, self.tokens // 8))
        if self.streams:
            tokens = max(tokens, min(self.tokens, STREAMED_BYTES // self.states(3 * candidates)))
        dense, walking = self.states(self.tokens, self.layers + 1), self.states(tokens, 3 * candidates)
        pieces = (self.item_bytes + 8) * min(MAX_LOGITS, tokens * self.vocabulary)
        return dense + walking + max(pieces, self.running(min(8192, tokens * candidates)))

    @property
    def tokens_at_once(self) -> int:
        """That go through a block at a time, as `slm_pipeline.engine.blocks.rows_at_once` has it."""
        return self.batch_tokens(512 if self.on_host else 8192)

    def fitting(self, tokens: int, at_once: int, *, grams: int = 1, inverses: int = 0) -> int:
        """Bytes in a walk up the stack that fits last projections by least squares.

        Counted are four states of each token, a narrower block and the module that it runs in, and the most of three.
        Solving, for the widest last projection with n inputs, in float64: the Gram matrices [n, n], the factor of one,
        and four [hidden, n] (moment, prior, both together, solution). The sums while tokens come in: the matrices, a
        batch's part of one in float32, and in float64 too in main memory, the moment, and ``at_once`` tokens that go
        through a block, with what enters the projection twice in float32, and five states so. At the top, logits of
        both models in float32 and three more of their size, of ``at_once`` tokens but `MAX_LOGITS` at a time. Text held
        out of the fit has no matrices.

        Args:
            tokens: that are fitted to, and that are held out.
            grams: Gram matrices that are summed.
            inverses: as many matrices more, while one is inverted.
        """
        inputs = max(self.neurons, self.queries)
        gram, weight = 8 * inputs**2, 8 * inputs * self.hidden
        batch = at_once * (inputs * (self.item_bytes + 8) + 5 * 4 * self.hidden)
        parts = gram // 2 + (gram if self.on_host else 0)
        solving = (grams + 1 + inverses) * gram + 4 * weight
        summing = grams * gram + parts + weight + max(batch, self.running(at_once))
        comparing = 5 * 4 * min(MAX_LOGITS, at_once * self.vocabulary)
        blocks = 2 * self.item_bytes * self.block_matrices
        return self.states(tokens, 4) + blocks + max(solving, summing, comparing)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of so many tokens, in the weights' type."""
        return tokens * self.vocabulary * self.item_bytes
