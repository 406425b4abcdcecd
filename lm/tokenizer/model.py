"""The tokenizer on disk (two files), and the class that encodes and decodes with it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm import objectives, storage

PAD, EOS, UNK = 0, 1, 2
BYTE_VOCAB_SIZE = 3 + 256  # pad, eos, unk and the bytes
MODEL_FILE, METADATA_FILE = "tokenizer.model", "tokenizer.json"
REMEDY = "make it with `python -m lm tokenizer --config=...`."

SURROGATES = re.compile("[\ud800-\udfff]")  # not encodable as UTF-8; SentencePiece raises on one


def padded_rows(size: int, multiple: int = 128) -> int:
    """The embedding rows for `size` ids: the next multiple, which divides over devices."""
    return -(-size // multiple) * multiple


# The files. --------------------------------------------------------------------------------------


def write_byte_tokenizer(directory: str | os.PathLike, num_extra_ids: int) -> Tokenizer:
    """Write the tokenizer that encodes every text as its UTF-8 bytes, with the ids of ByT5.

    As in transformers: 259 pieces, and the sentinels ascending after them.
    """
    metadata = {"kind": "bytes", "pieces": BYTE_VOCAB_SIZE, "num_sentinels": num_extra_ids}
    metadata |= {"normalization": "identity", "sentinel_order": "ascending"}
    return write(directory, byte_model_proto().SerializeToString(), metadata)


def write(directory: str | os.PathLike, model: bytes, metadata: dict) -> Tokenizer:
    """Write a serialized SentencePiece model and its metadata, each file atomically.

    metadata: JSON with pieces, num_sentinels, normalization, and sentinel_order unless it is
    "descending"; size, rows and the fingerprint are added.
    """
    directory = storage.as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    size = metadata["pieces"] + metadata["num_sentinels"]
    metadata = metadata | {"size": size, "rows": padded_rows(size)}
    metadata["fingerprint"] = fingerprint(model, metadata)
    # The metadata comes last and has the fingerprint, so that `read` detects a crash in between.
    storage.write_atomic(directory / MODEL_FILE, model)
    storage.write_atomic(directory / METADATA_FILE, json.dumps(metadata, indent=2).encode() + b"\n")
    return Tokenizer(directory)


def fingerprint(model: bytes, metadata: dict) -> str:
    """The sha256, in hexadecimal, of everything that decides the ids of a text."""
    order = metadata.get("sentinel_order", "descending")
    suffix = f"{metadata['num_sentinels']:d}" + ("" if order == "descending" else order)
    return hashlib.sha256(model + suffix.encode()).hexdigest()


def read(directory: pathlib.Path) -> tuple[bytes, dict]:
    """A tokenizer's model and metadata, verified. Raises ValueError if missing or damaged."""
    try:
        model = (directory / MODEL_FILE).read_bytes()
        metadata = json.loads((directory / METADATA_FILE).read_bytes())
        is_valid = fingerprint(model, metadata) == metadata["fingerprint"]
        is_valid = is_valid and {"pieces", "normalization"} <= metadata.keys()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no tokenizer in {directory}; {REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / METADATA_FILE} is damaged ({error}); {REMEDY}") from error
    if not is_valid:
        raise ValueError(
            f"{MODEL_FILE} and {METADATA_FILE} in {directory} do not belong together or are "
            f"damaged; {REMEDY}"
        )
    return model, metadata


# Untrained SentencePiece models. -----------------------------------------------------------------


def empty_model_proto(model_type: int, special_pieces: dict[str, str]) -> Any:
    """A SentencePiece ModelProto without pieces, whose normalizer changes nothing.

    model_type: a TrainerSpec.ModelType. special_pieces: role (pad, eos, unk, bos) -> piece.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model_type
    for role, name in special_pieces.items():
        setattr(model.trainer_spec, f"{role}_piece", name)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def byte_model_proto() -> Any:
    """ByT5's ids as a SentencePiece ModelProto: pad, eos, unk and 256 bytes with byte fallback."""
    from sentencepiece import sentencepiece_model_pb2

    characters = sentencepiece_model_pb2.TrainerSpec.CHAR
    model = empty_model_proto(characters, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = UNK
    model.normalizer_spec.escape_whitespaces = False
    pieces = {"<pad>": "CONTROL", "</s>": "CONTROL", "<unk>": "UNKNOWN"}
    pieces |= {f"<0x{value:02X}>": "BYTE" for value in range(256)}
    for name, kind in pieces.items():
        model.pieces.add(piece=name, score=0.0, type=getattr(model.SentencePiece, kind))
    return model


# Use. --------------------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer, read from its directory. It pickles as the name of that directory.

    Attributes:
      pad, eos, unk: ids.
      vocab_size: ids of the SentencePiece model.
      num_extra_ids: sentinels.
      size: all ids, vocab_size + num_extra_ids.
      rows: rows of an embedding, padded_rows(size).
      byte_ids: int32 [..], the ids that stand for one byte each.
      normalization: the model's normalization rule; a key of NORMALIZATIONS if trained here.
      adds_dummy_prefix: whether a space is put before every text, as in T5.
      fingerprint: tokenizers with equal fingerprints give equal ids.
    Raises ValueError if a file is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        import sentencepiece

        self.directory = storage.as_path(directory).absolute()
        model, metadata = read(self.directory)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pad, self.eos = self._model.pad_id(), self._model.eos_id()
        self.unk = self._model.unk_id()
        self.vocab_size = self._model.vocab_size()
        self.num_extra_ids = metadata["num_sentinels"]
        self.sentinel_order = metadata.get("sentinel_order", "descending")
        self.normalization = metadata["normalization"]
        self.size = self.vocab_size + self.num_extra_ids
        self.rows = padded_rows(self.size)
        sizes = {"pieces": self.vocab_size, "size": self.size, "rows": self.rows}
        for name, value in sizes.items():
            if metadata.get(name, value) != value:
                raise ValueError(
                    f"{self.directory / METADATA_FILE} says {name}={metadata[name]}, but the model "
                    f"has {value}; {REMEDY}"
                )
        self.fingerprint = metadata["fingerprint"]
        probe = self._model.normalize("x x")
        self.adds_dummy_prefix, self._escapes_spaces = probe[0] != "x", "▁" in probe
        self._piece_bytes = [self._bytes_of(piece) for piece in range(self.vocab_size)]
        self._id_bytes = self._piece_bytes + [b""] * self.num_extra_ids  # what `decode` shows
        for k in range(self.num_extra_ids):
            self._id_bytes[self.sentinel(k)] = b"<extra_id_%d>" % k
        self._id_bytes[self.unk] = "\ufffd".encode()
        byte_ids = [i for i in range(self.vocab_size) if self._model.is_byte(i)]
        self.byte_ids = np.array(byte_ids, np.int32)

    def __reduce__(self):
        return Tokenizer, (self.directory,)

    def _bytes_of(self, piece: int) -> bytes:
        """The UTF-8 bytes that a piece stands for; none for pad, eos, unk and other controls."""
        name = self._model.id_to_piece(piece)
        if self._model.is_byte(piece):
            return bytes([int(name[3:5], 16)])  # "<0x0A>"
        if self._model.is_control(piece) or self._model.is_unknown(piece):
            return b""
        return self._unescape(name).encode()

    def _unescape(self, text: str) -> str:
        return text.replace("▁", " ") if self._escapes_spaces else text

    def sentinel(self, k: int = 0) -> int:
        """The id of sentinel k, counted down from the highest id as in T5 (32099, 32098, ..).

        With sentinel_order "ascending", as in transformers' ByT5, counted up from the first id
        after the pieces (259, 260, ..).
        Raises ValueError if there is no sentinel k: its id would be an ordinary piece's.
        """
        if not 0 <= k < self.num_extra_ids:
            raise ValueError(
                f"sentinel {k} is beyond the tokenizer's num_extra_ids={self.num_extra_ids}; train "
                f"it with --config.tokenizer.num_extra_ids={k + 1} or more."
            )
        return self.vocab_size + k if self.sentinel_order == "ascending" else self.size - 1 - k

    def names(self) -> list[str]:
        """A unique name for each id, by which the ids of two tokenizers can be matched."""
        pieces = [self._model.id_to_piece(piece) for piece in range(self.vocab_size)]
        return pieces + [self.decode([i]) for i in range(self.vocab_size, self.size)]

    @property
    def sentinels(self) -> np.ndarray:
        """int32 [num_extra_ids]: the id of sentinel k at index k."""
        return np.array([self.sentinel(k) for k in range(self.num_extra_ids)], np.int32)

    @functools.cached_property
    def vocabulary(self) -> objectives.Vocabulary:
        """The ids that objectives need: sentinels, eos, words and sentence ends.

        words: the pieces of text. Byte ids are excluded, because a single byte is easy to tell from
        text, unless there are no other pieces (ByT5).
        ends: the pieces that end in a newline, or in a mark that ends a sentence in any script with
        the quotes and brackets after it. An id does not know its neighbours: a piece "." ends a
        sentence even within 3.14, a piece that is only a closing quote starts the next one, and of
        the marks encoded as bytes only ASCII's are recognized.
        """
        import regex

        end = regex.compile(r"(?:[\p{Sentence_Terminal}…][\p{Pe}\p{Pf}\p{Pi}\"']*|\n)\s*\Z")
        texts = [data.decode("utf-8", "replace") for data in self._piece_bytes]
        ends = np.zeros(self.size, bool)
        ends[: self.vocab_size] = [bool(end.search(text)) for text in texts]
        used = [bool(text) and not self._model.is_unused(i) for i, text in enumerate(texts)]
        words = np.setdiff1d(np.flatnonzero(used), self.byte_ids).astype(np.int32)
        words = words if len(words) else self.byte_ids
        return objectives.Vocabulary(self.sentinels, self.eos, words, ends)

    def normalize(self, text: str) -> str:
        """The text that the model sees: equals decode(encode(text)) for any text without unk.

        Under "identity" only lone surrogates (to U+FFFD) and U+2581 (to a space) change; with byte
        pieces (ByT5), only the former. The space that adds_dummy_prefix adds is not included.
        """
        normalized = self._unescape(self._model.normalize(SURROGATES.sub("\ufffd", text)))
        return normalized[1:] if self.adds_dummy_prefix else normalized

    def encode(self, text: str) -> np.ndarray:
        """Ids without bos or eos: int32 [L]. The name of a special token is encoded as plain text.

        Exceptions are the user-defined symbols of another codebase's model, as <start_of_turn>.
        """
        return self._model.encode_as_numpy(SURROGATES.sub("\ufffd", text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids, int [L], including ids that only a model produces.

        pad and eos become nothing, sentinel k <extra_id_k>, unk U+FFFD (one for a run of unknown
        characters), an embedding row without an id <unused_N>, and bytes that are not UTF-8 U+FFFD.
        With adds_dummy_prefix, one leading space is dropped.
        """
        id_bytes, size = self._id_bytes, self.size
        ids = np.asarray(ids).tolist()
        pieces = [id_bytes[i] if 0 <= i < size else b"<unused_%d>" % i for i in ids]
        text = b"".join(pieces).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_dummy_prefix else text

    def piece_bytes(self, rows: int) -> np.ndarray:
        """The number of UTF-8 bytes of text that each of `rows` ids stands for: int32 [rows].

        The sum over encode(text) is len(normalize(text).encode()), or 1 more for a text that is not
        empty with adds_dummy_prefix. Special ids, sentinels, unk and rows without an id count 0, so
        that bits per byte are exact only if every character has a piece.
        Raises ValueError if rows < size.
        """
        if rows < self.size:
            raise ValueError(
                f"rows={rows} is fewer than the tokenizer's {self.size} ids; use "
                f"{padded_rows(self.size)}."
            )
        lengths = np.zeros(rows, np.int32)
        lengths[: self.vocab_size] = [len(data) for data in self._piece_bytes]
        return lengths
