"""What a tokenizer is: its two files, and the ids and texts they turn into each other."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from lm import objectives, storage

PAD, EOS, UNK = 0, 1, 2
BYTE_VOCAB_SIZE = 3 + 256
MODEL_FILE, METADATA_FILE = "tokenizer.model", "tokenizer.json"
REMEDY = "make it with `python -m lm tokenizer --config=...`."

SURROGATES = re.compile("[\ud800-\udfff]")  # no UTF-8 exists for one, so SentencePiece raises


def padded_rows(size: int, multiple: int = 128) -> int:
    """The rows of an embedding for `size` ids: the next multiple, which splits over devices."""
    return -(-size // multiple) * multiple


# The files. --------------------------------------------------------------------------------------


def write_byte_tokenizer(directory: str | os.PathLike, num_sentinels: int) -> Tokenizer:
    """Write the tokenizer that spells every text in its UTF-8 bytes, with the ids of ByT5.

    They are transformers': 259 pieces, and the sentinels ascending after them.
    """
    facts = {"kind": "bytes", "pieces": BYTE_VOCAB_SIZE, "num_sentinels": num_sentinels}
    facts |= {"normalization": "identity", "sentinel_order": "ascending"}
    return write(directory, byte_model_proto().SerializeToString(), facts)


def write(directory: str | os.PathLike, model: bytes, facts: dict) -> Tokenizer:
    """Make a directory the tokenizer of a SentencePiece model, each file whole or not at all.

    facts: JSON, with pieces, num_sentinels, normalization, and sentinel_order where it is not
    "descending"; size, rows and the fingerprint are added.
    """
    directory = storage.as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    size = facts["pieces"] + facts["num_sentinels"]
    facts = facts | {"size": size, "rows": padded_rows(size)}
    facts["fingerprint"] = fingerprint(model, facts)
    # The facts come last and hold the fingerprint: a crash in between is found when loading.
    storage.write_atomic(directory / MODEL_FILE, model)
    storage.write_atomic(directory / METADATA_FILE, json.dumps(facts, indent=2).encode() + b"\n")
    return Tokenizer(directory)


def fingerprint(model: bytes, facts: dict) -> str:
    """sha256 of all that decides the ids of a text, in hexadecimal."""
    order = facts.get("sentinel_order", "descending")
    ids = b"%d" % facts["num_sentinels"] + (b"" if order == "descending" else order.encode())
    return hashlib.sha256(model + ids).hexdigest()


def read(directory: pathlib.Path) -> tuple[bytes, dict]:
    """A tokenizer's model and facts, checked. Raises ValueError if missing or damaged."""
    try:
        model = (directory / MODEL_FILE).read_bytes()
        facts = json.loads((directory / METADATA_FILE).read_bytes())
        sound = fingerprint(model, facts) == facts["fingerprint"]
        sound = sound and {"pieces", "normalization"} <= facts.keys()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no tokenizer in {directory}; {REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / METADATA_FILE} is damaged ({error}); {REMEDY}") from error
    if not sound:
        raise ValueError(
            f"{MODEL_FILE} and {METADATA_FILE} in {directory} do not belong together or are damaged; {REMEDY}"
        )
    return model, facts


# SentencePiece models made by hand. --------------------------------------------------------------


def empty_model_proto(kind: int, special: dict[str, str]):
    """A SentencePiece ModelProto without pieces, which changes no text.

    kind: TrainerSpec.ModelType of sentencepiece_model.proto. special: role (pad, eos, unk, bos) ->
    piece.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = kind
    for role, name in special.items():
        setattr(model.trainer_spec, f"{role}_piece", name)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def byte_model_proto():
    """ByT5's ids as a SentencePiece model: pad, eos, unk and 256 bytes, to which all falls back."""
    from sentencepiece import sentencepiece_model_pb2

    characters = sentencepiece_model_pb2.TrainerSpec.CHAR
    model = empty_model_proto(characters, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = 2
    model.normalizer_spec.escape_whitespaces = False
    pieces = model.SentencePiece
    named = (("<pad>", pieces.CONTROL), ("</s>", pieces.CONTROL), ("<unk>", pieces.UNKNOWN))
    for name, kind in (*named, *((f"<0x{value:02X}>", pieces.BYTE) for value in range(256))):
        model.pieces.add(piece=name, score=0.0, type=kind)
    return model


# Use. --------------------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer, read from its directory; pickled, it is that directory's name.

    pad, eos, unk: ids. pieces: ids of the SentencePiece model. size: pieces + num_sentinels.
    rows: those of an embedding, padded_rows(size). byte_pieces: int32[..], the ids that stand for
    one byte each. normalization: the name of the model's rule; a key of NORMALIZATIONS if trained
    here. has_prefix: whether a space is put before every text, as T5's pieces want. fingerprint:
    two tokenizers that agree on it give the same ids.
    Raises ValueError if a file is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        import sentencepiece

        self.directory = storage.as_path(directory).absolute()
        model, facts = read(self.directory)
        self._spm = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pad, self.eos, self.unk = self._spm.pad_id(), self._spm.eos_id(), self._spm.unk_id()
        self.pieces = self._spm.vocab_size()
        self.num_sentinels = facts["num_sentinels"]
        self.sentinel_order = facts.get("sentinel_order", "descending")
        self.normalization = facts["normalization"]
        self.size = self.pieces + self.num_sentinels
        self.rows = padded_rows(self.size)
        for name in ("pieces", "size", "rows"):
            if facts.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(
                    f"{self.directory / METADATA_FILE} says {name}={facts[name]}, and the model in it has "
                    f"{getattr(self, name)}; {REMEDY}"
                )
        self.fingerprint = facts["fingerprint"]
        probe = self._spm.normalize("x x")
        self.has_prefix, self._escapes = probe[0] != "x", "▁" in probe
        self._bytes = [self._bytes_of(piece) for piece in range(self.pieces)]
        self._shown = self._bytes + [b""] * self.num_sentinels
        for k in range(self.num_sentinels):
            self._shown[self.sentinel(k)] = b"<extra_id_%d>" % k
        self._shown[self.unk] = "\ufffd".encode()
        ids = range(self.pieces)
        self.byte_pieces = np.array([i for i in ids if self._spm.is_byte(i)], np.int32)

    def __reduce__(self):
        return Tokenizer, (self.directory,)

    def _bytes_of(self, piece: int) -> bytes:
        """The UTF-8 that a piece stands for: none for pad, eos, unk and the like."""
        name = self._spm.id_to_piece(piece)
        if self._spm.is_byte(piece):
            return bytes([int(name[3:5], 16)])  # "<0x0A>"
        if self._spm.is_control(piece) or self._spm.is_unknown(piece):
            return b""
        return self._spaced(name).encode()

    def _spaced(self, text: str) -> str:
        return text.replace("▁", " ") if self._escapes else text

    def sentinel(self, k: int = 0) -> int:
        """The id of sentinel k: descending from the highest id, as in T5 (32099, 32098, ..).

        With sentinel_order "ascending", as transformers' ByT5 has them, up from the first id after
        the pieces (259, 260, ..).
        Raises ValueError if there is no sentinel k: its id would be an ordinary piece's.
        """
        if not 0 <= k < self.num_sentinels:
            raise ValueError(
                f"sentinel {k} is beyond the tokenizer's num_sentinels={self.num_sentinels}; train "
                f"it with --config.tokenizer.num_extra_ids={k + 1} or more."
            )
        return self.pieces + k if self.sentinel_order == "ascending" else self.size - 1 - k

    def names(self) -> list[str]:
        """What each id stands for, by which ids of two tokenizers are matched: no two alike."""
        pieces = [self._spm.id_to_piece(piece) for piece in range(self.pieces)]
        return pieces + [self.decode([place]) for place in range(self.pieces, self.size)]

    @property
    def sentinels(self) -> np.ndarray:
        """int32 [num_sentinels]: the id of sentinel k at k."""
        return np.array([self.sentinel(k) for k in range(self.num_sentinels)], np.int32)

    @functools.cached_property
    def vocabulary(self) -> objectives.Vocabulary:
        """The ids that objectives write and ask about.

        words: the pieces of text. The bytes are not among them, since one alone is no text and
        would betray itself, unless there is nothing else (ByT5).
        ends: the pieces that end in a line's end, or in what ends a sentence in any script, with
        the quotes and brackets that close after it. An id does not know its neighbours: the point
        of 3.14 ends a sentence where it is a piece of its own, a closing quote that is one begins
        the next, and of a mark spelt in bytes only ASCII's are known.
        """
        import regex

        end = regex.compile(r"(?:[\p{Sentence_Terminal}…][\p{Pe}\p{Pf}\p{Pi}\"']*|\n)\s*\Z")
        texts = [data.decode("utf-8", "replace") for data in self._bytes]
        ends = np.zeros(self.size, bool)
        ends[: self.pieces] = [bool(end.search(text)) for text in texts]
        used = [bool(text) and not self._spm.is_unused(i) for i, text in enumerate(texts)]
        words = np.setdiff1d(np.flatnonzero(used), self.byte_pieces).astype(np.int32)
        words = words if len(words) else self.byte_pieces
        return objectives.Vocabulary(self.sentinels, self.eos, words, ends)

    def normalise(self, text: str) -> str:
        """The text as the model sees it: decode(encode(text)) is this, for any text without unk.

        Under "identity" only lone surrogates (to U+FFFD) and U+2581 (to a space) change; with
        bytes for pieces (ByT5), only the former. The space of has_prefix is left out.
        """
        seen = self._spaced(self._spm.normalize(SURROGATES.sub("\ufffd", text)))
        return seen[1:] if self.has_prefix else seen

    def encode(self, text: str) -> np.ndarray:
        """Ids without bos or eos: int32[L]. A special token's name is spelt as ordinary text.

        Only the symbols that a foreign model defines as pieces of text, such as Gemma's
        <start_of_turn>, are what their names say.
        """
        return self._spm.encode_as_numpy(SURROGATES.sub("\ufffd", text))

    def decode(self, ids) -> str:
        """The text of int[L], any ids: a model's too.

        pad and eos vanish, sentinel k reads <extra_id_k>, unk reads U+FFFD (one for a run of
        characters without a piece), an embedding row without an id reads <unused_N>, and bytes
        that are no UTF-8 become U+FFFD. With has_prefix, one space that leads the text is dropped.
        """
        shown, size = self._shown, self.size
        ids = np.asarray(ids).tolist()
        parts = [shown[i] if 0 <= i < size else b"<unused_%d>" % i for i in ids]
        text = b"".join(parts).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.has_prefix else text

    def piece_bytes(self, rows: int) -> np.ndarray:
        """How many UTF-8 bytes of text each of `rows` ids stands for: int32[rows].

        The sum over encode(text) is len(normalise(text).encode()); with has_prefix it is 1 more
        for a text that is not empty. Special ids, sentinels and rows without an id stand for none;
        nor does unk, so that bits per byte is exact only where every character has a piece.
        Raises ValueError if rows < size.
        """
        if rows < self.size:
            raise ValueError(
                f"rows={rows} is fewer than the tokenizer's {self.size} ids; use "
                f"{padded_rows(self.size)}."
            )
        lengths = np.zeros(rows, np.int32)
        lengths[: self.pieces] = [len(data) for data in self._bytes]
        return lengths
