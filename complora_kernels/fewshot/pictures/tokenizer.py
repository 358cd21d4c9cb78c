"""The tokenizer of the pictures model: pieces of words, so that names it has never read are still told apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from complora_kernels.common.files import write_atomically

PAD, START, END = "<pad>", "<start>", "<end>"


class PictureTokenizer:
    """Byte-pair encoding of lower-cased text, a file of the library `tokenizers`.

    `<pad>` is 0 and `<end>` the largest id, where open_clip pools.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length
        self.end = tokenizer.token_to_id(END)
        if tokenizer.token_to_id(PAD) != 0 or self.end != self.vocab_size - 1:
            raise ValueError(f"tokenizer: expected {PAD} as id 0 and {END} as the largest of {self.vocab_size}")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Tokenize one text or several.

        A text that is longer than `context_length`, by default that of the model, is truncated before its `<end>`.

        Returns:
            int64 [N, context_length], padded with zeros.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = self.context_length if context_length is None else context_length
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, encoding in zip(tokens, self._tokenizer.encode_batch(texts), strict=True):
            ids = [*encoding.ids[: length - 1], self.end] if len(encoding.ids) > length else encoding.ids
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def __str__(self) -> str:
        return self._tokenizer.to_str()

    def save(self, path: Path) -> None:
        """Write the file of the library, as a whole."""
        write_atomically(path, f"{self}\n")


def load_tokenizer(path: Path, context_length: int) -> PictureTokenizer:
    """Load a tokenizer that `PictureTokenizer.save` wrote."""
    from tokenizers import Tokenizer

    return PictureTokenizer(Tokenizer.from_file(str(path)), context_length)


def train_tokenizer(corpus: Iterable[str], vocab_size: int, context_length: int) -> PictureTokenizer:
    """Learn the pieces of a corpus."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    def parts(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    trained = parts(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 3, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: number for number, piece in enumerate([PAD, START, *pieces, END])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = parts(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([PAD, START, END])
    special = [(START, vocabulary[START]), (END, vocabulary[END])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    return PictureTokenizer(tokenizer, context_length)
