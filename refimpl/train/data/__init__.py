"""Text to tokens, tokens to packed shards, shards to batches (R 4.1)."""

from .altering import Altering, Splitter, cut_in_three, plain, psm, truncated
from .building import Build, Progress, build
from .documents import SPLITS, Place, documents
from .order import Permutation
from .packing import PACKINGS, Piece, best_fit, concatenate, lay_out
from .reader import Batch, Cursor, Reader, random_generator, random_state
from .shards import Shard, Shards
from .tokenizer import SENTINELS, Bpe, Bytes, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "PACKINGS",
    "SENTINELS",
    "SPLITS",
    "Altering",
    "Batch",
    "Bpe",
    "Build",
    "Bytes",
    "Cursor",
    "Permutation",
    "Piece",
    "Place",
    "Progress",
    "Reader",
    "Shard",
    "Shards",
    "Splitter",
    "Tokenizer",
    "best_fit",
    "build",
    "concatenate",
    "cut_in_three",
    "documents",
    "lay_out",
    "load_tokenizer",
    "plain",
    "psm",
    "random_generator",
    "random_state",
    "train_tokenizer",
    "truncated",
]
