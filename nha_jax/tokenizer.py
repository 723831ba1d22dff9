"""Text to token ids and back: bytes (default), or a model of the `tokenizers` library.

One class serves both, with the three things a language model needs beyond a bare
encoder: the ids that open and close a document, a JSON text that restores the very same
tokenizer (a checkpoint carries it), and the number of UTF-8 bytes each token stands for,
so that losses of different tokenizers compare in bits per byte.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Int64, Integer

if TYPE_CHECKING:
    import tokenizers

_FORMAT = "nha-tokenizer-1"
_NUM_BYTES = 256
MIN_BPE_SIZE = _NUM_BYTES + 2  # with BOS and EOS
_BPE_PREFIX = "bpe:"
_BPE_BOS = "<|bos|>"
_BPE_EOS = "<|eos|>"
# Names under which published tokenizers keep the two ids, tried in this order.
_BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>")
_EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")


class Tokenizer:
    """A tokenizer with document boundaries.

    Build one with `Tokenizer.bytes()`, `Tokenizer.from_json(text)`,
    `Tokenizer.train_bpe(texts, vocab_size)` or `load_tokenizer(path)`.

    Attributes:
      vocab_size: number of ids; a model's vocabulary must be at least as large.
      bos_id: id that opens a document.
      eos_id: id that closes a document (may equal `bos_id`).
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(
        self,
        model: "tokenizers.Tokenizer | None" = None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ):
        """Wraps `model`, a `tokenizers.Tokenizer`; None is the byte-level tokenizer.

        Args:
          model: the encoder. None: one id per byte, then BOS = 256 and EOS = 257.
          bos_token: the token that opens a document; None: looked up among usual names.
          eos_token: the token that closes a document; None: looked up among usual names.

        Raises:
          ValueError: the model has no such token.
        """
        self._model = model
        if model is None:
            self.bos_id, self.eos_id = _NUM_BYTES, _NUM_BYTES + 1
            self.vocab_size = _NUM_BYTES + 2
            return
        # Text that spells "<s>" is text, not a document boundary.
        model.encode_special_tokens = True
        model.no_padding()
        model.no_truncation()
        self._bos_token = bos_token or _find_special(model, "bos_token", _BOS_NAMES)
        self._eos_token = eos_token or _find_special(model, "eos_token", _EOS_NAMES)
        self.bos_id = _special_id(model, "bos_token", self._bos_token)
        self.eos_id = _special_id(model, "eos_token", self._eos_token)
        # Ids may have gaps, so the largest id counts, not the number of tokens.
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The byte-level tokenizer: 256 bytes, BOS, EOS."""
        return cls()

    @classmethod
    def from_json(
        cls, text: str, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> "Tokenizer":
        """Restores a tokenizer from `to_json`, or from a `tokenizers` JSON file's text.

        Args:
          text: the JSON.
          bos_token: overrides the token that opens a document (`tokenizers` files only).
          eos_token: overrides the token that closes a document (`tokenizers` files only).

        Raises:
          ValueError: the text is neither of the two.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"tokenizer: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"tokenizer: expected a JSON object, found {type(data).__name__}")
        if data.get("format") == _FORMAT:
            if data.get("kind") == "bytes":
                return cls()
            fields = ("bos_token", "eos_token", "model")
            if data.get("kind") != "tokenizers" or any(name not in data for name in fields):
                raise ValueError(f"tokenizer: of an unknown kind, {data.get('kind')!r}")
            bos_token, eos_token, data = (data[name] for name in fields)
        if "model" not in data:
            raise ValueError(
                "tokenizer: the JSON has no 'model'; expected a file of the tokenizers library"
                f" (found keys {sorted(data)[:8]})"
            )
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:
            raise ValueError(f"tokenizer: the tokenizers library refuses it: {error}") from None
        return cls(model, bos_token=bos_token, eos_token=eos_token)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
    ) -> "Tokenizer":
        """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

        Args:
          texts: the training text, one document an item.
          vocab_size: number of ids with BOS and EOS; at least 258.
          show_progress: let the library draw its own progress bar.

        Raises:
          ValueError: `vocab_size` cannot hold the 256 bytes, BOS and EOS.
        """
        if vocab_size < MIN_BPE_SIZE:
            raise ValueError(
                f"tokenizer: a BPE of {vocab_size} ids cannot hold 256 bytes, BOS and EOS;"
                f" give at least {MIN_BPE_SIZE}"
            )
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_BPE_BOS, _BPE_EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        )
        model.train_from_iterator(texts, trainer=trainer)
        return cls(model, bos_token=_BPE_BOS, eos_token=_BPE_EOS)

    def to_json(self) -> str:
        """The tokenizer as a JSON text that `from_json` restores exactly."""
        if self._model is None:
            return json.dumps({"format": _FORMAT, "kind": "bytes"})
        return json.dumps(
            {
                "format": _FORMAT,
                "kind": "tokenizers",
                "bos_token": self._bos_token,
                "eos_token": self._eos_token,
                "model": json.loads(self._model.to_str()),
            },
            ensure_ascii=False,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS."""
        if self._model is None:
            return list(text.encode("utf-8"))
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[Integer[np.ndarray, " _"]]:
        """The documents `BOS tokens EOS`, one array of `dtype` per text."""
        if self._model is None:
            bodies: list[Any] = [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]
        else:
            # The library encodes a batch on all cores.
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
            bodies = [encoding.ids for encoding in encodings]
        documents = []
        for body in bodies:
            document = np.empty(len(body) + 2, self.dtype)
            document[0], document[1:-1], document[-1] = self.bos_id, body, self.eos_id
            documents.append(document)
        return documents

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; BOS, EOS and other special tokens are left out.

        Bytes that are not UTF-8, as a text cut inside a character has, become U+FFFD.
        """
        if self._model is None:
            return bytes(i for i in map(index, ids) if i < _NUM_BYTES).decode("utf-8", "replace")
        return self._model.decode([index(i) for i in ids], skip_special_tokens=True)

    @property
    def has_words(self) -> bool:
        """Whether an id may stand for several characters; False for bytes."""
        return self._model is not None

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def byte_lengths(self) -> Int64[np.ndarray, " {self.vocab_size}"]:
        """UTF-8 bytes per id, `[vocab_size]`; 0 for special tokens and unused ids.

        Tokenizers that put a space before the text (SentencePiece) count it, and
        those that normalise text count the normalised text.

        Raises:
          ValueError: the bytes of such a tokenizer's tokens cannot be counted.
        """
        return self._byte_lengths.copy()

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        if self._model is None:
            lengths[:_NUM_BYTES] = 1
            return lengths
        count = _byte_counter(json.loads(self._model.to_str()).get("decoder"))
        added = self._model.get_added_tokens_decoder()
        for token, token_id in self._model.get_vocab(with_added_tokens=True).items():
            if token_id in added:
                content = added[token_id]
                lengths[token_id] = 0 if content.special else len(content.content.encode("utf-8"))
            else:
                lengths[token_id] = count(token)
        lengths[[self.bos_id, self.eos_id]] = 0
        return lengths

    def token_bytes(self, ids: Iterable[SupportsIndex]) -> int:
        """Number of UTF-8 bytes the ids stand for; special tokens count 0."""
        return int(self._byte_lengths[np.fromiter(map(index, ids), np.int64)].sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and json.loads(self.to_json()) == json.loads(
            other.to_json()
        )

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> str:
        return self.to_json()

    def __setstate__(self, state: str) -> None:
        self.__dict__ = Tokenizer.from_json(state).__dict__


def bpe_size(name: str) -> int | None:
    """N of "bpe:N", a byte-level BPE with N ids that is to be trained.

    Returns:
      None for the name of another tokenizer.

    Raises:
      ValueError: N is no number of ids that a BPE can have.
    """
    if not name.startswith(_BPE_PREFIX):
        return None
    size = name.removeprefix(_BPE_PREFIX)
    if not size.isdecimal() or int(size) < MIN_BPE_SIZE:
        raise ValueError(f"tokenizer {name!r}: expected {_BPE_PREFIX}N, N at least {MIN_BPE_SIZE}")
    return int(size)


def load_tokenizer(
    path: str | os.PathLike[str], *, bos_token: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """Reads a tokenizer from a JSON file: one of ours or of the `tokenizers` library.

    Args:
      path: the file, or a folder holding `tokenizer.json`; "bytes": the byte-level tokenizer.
      bos_token: see `Tokenizer.from_json`.
      eos_token: see `Tokenizer.from_json`.

    Raises:
      ValueError: no such file, or not a tokenizer.
    """
    if path == "bytes":
        return Tokenizer.bytes()
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: cannot read {path}: {error}") from None
    try:
        return Tokenizer.from_json(text, bos_token=bos_token, eos_token=eos_token)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _find_special(model: "tokenizers.Tokenizer", what: str, names: Sequence[str]) -> str:
    for name in names:
        if model.token_to_id(name) is not None:
            return name
    raise ValueError(
        f"tokenizer: no {what} among {', '.join(names)}; name the tokenizer's own with --{what}"
    )


def _special_id(model: "tokenizers.Tokenizer", what: str, name: str) -> int:
    token_id = model.token_to_id(name)
    if token_id is None:
        raise ValueError(f"tokenizer: {what}={name!r} is not in its vocabulary")
    return token_id


def _decoder_kinds(decoder: Any) -> set[str]:
    """The kinds of decoder in a decoder's JSON, a sequence's members included."""
    if not isinstance(decoder, dict):
        return set()
    kinds = {decoder["type"]}
    for inner in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(inner)
    return kinds


def _byte_counter(decoder: Any):
    """The function token -> UTF-8 bytes that belongs to a decoder's JSON."""
    kinds = _decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return len  # Its alphabet writes each byte as one character.
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece_bytes
    raise ValueError(
        "tokenizer: bytes per token are known for byte-level and SentencePiece tokenizers"
        f" only; this one decodes with {sorted(kinds) or 'nothing'}"
    )


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode("utf-8"))
