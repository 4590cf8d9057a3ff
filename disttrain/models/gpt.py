"""A small GPT: a decoder of pre-norm blocks that predicts the next token."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError


class GPT(nn.Module):
    """Embeddings, `num_layers` blocks of attention and MLP, and logits by the embedding's own weights.

    Initialised as GPT-2 is (normal, std 0.02; what a block adds to the residual stream smaller by the square root of
    their number) from torch's global generator. `positions` is "rotary" (Su et al., "RoFormer", 2021) or "learned".
    Raises ConfigurationError for sizes that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dim: int = 128,
        dropout: float = 0.0,
        positions: str = "rotary",
        tie_weights: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size, context_length, num_layers, num_heads, dim, dropout, positions)
        self.context_length, self.head_dim = context_length, dim // num_heads
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(context_length, dim) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        # Tied, they are one parameter under one name, not two modules that share it: saved, clipped and decayed once.
        self.head = None if tie_weights else nn.Linear(dim, vocab_size, bias=False)
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                is_residual = name.endswith(("attention.out.weight", "mlp.out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if is_residual else 0.02)

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the next token, (B, T, vocab_size).

        `tokens`: (B, T) int64, T up to context_length. With `documents`, (B, T) of any integers, a token attends to
        those of its own document alone. Raises ConfigurationError for a longer T.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ConfigurationError(
                f"model.options.context_length: the model takes {self.context_length} tokens, and got {length}; make "
                "it as long as that of the data."
            )
        x, rotation = self.token_embedding(tokens), None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions_in(documents, tokens))
        else:  # distances are the same wherever in the row a document begins
            rotation = rotation_of(length, self.head_dim, x)
        x = self.dropout(x)
        mask = None if documents is None else document_mask(documents)
        for block in self.blocks:
            x = block(x, rotation, mask)
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return functional.linear(self.norm(x), weight)


class Block(nn.Module):
    """Attention and an MLP, each added to what its normalised input was made from."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T, dim) of (B, T, dim)."""
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        added: torch.Tensor = self.mlp(self.mlp_norm(x))
        return x + added


class Attention(nn.Module):
    """Causal self-attention with `num_heads` heads."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T, dim) of (B, T, dim); `mask` as in `document_mask`, None: every earlier token is seen."""
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: torch.Tensor = self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return functional.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, with GELU."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) of (B, T, dim)."""
        out: torch.Tensor = self.dropout(self.out(functional.gelu(self.up(x))))
        return out


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom, (B, 1, T, T) bool: each token to itself and to the earlier ones of its document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def positions_in(documents: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Where in its document each token is, (B, T) int64; without documents, where in its row."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if documents is None:
        return places
    begins = documents != documents.roll(1, dims=1)
    return places - torch.where(begins & (places > 0), places, 0).cummax(dim=1).values


def rotation_of(length: int, dim: int, like: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of the angles by which the first `length` positions are turned, (2, length, dim / 2).

    In float32, or float64 `like` the model: made anew each time, since a buffer would be rounded with the model.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    places, pairs = (torch.arange(num, dtype=dtype, device=like.device) for num in (length, dim // 2))
    angles = places[:, None] * 10_000.0 ** (-2 * pairs / dim)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Queries or keys (..., T, head_dim), turned by their positions: scores then depend on distances alone."""
    cosine, sine = rotation.to(heads.dtype)
    even, odd = heads.chunk(2, dim=-1)
    return torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)


def _check_sizes(
    vocab_size: int, context_length: int, num_layers: int, num_heads: int, dim: int, dropout: float, positions: str
) -> None:
    sizes = {
        "vocab_size": vocab_size,
        "context_length": context_length,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "dim": dim,
    }
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigurationError(f"model.options.{name}: {size!r} is not a whole number of 1 or more.")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ConfigurationError(f"model.options.dropout: {dropout!r} is not a number of at least 0 and below 1.")
    if positions not in ("rotary", "learned"):
        raise ConfigurationError(f'model.options.positions: {positions!r} is neither "rotary" nor "learned".')
    if dim % num_heads or (positions == "rotary" and dim // num_heads % 2):
        even = " of an even size each" if positions == "rotary" else ""
        raise ConfigurationError(
            f"model.options.dim: {dim} cannot be divided into num_heads = {num_heads} heads{even}; change one of them."
        )
