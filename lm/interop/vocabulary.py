"""Vocabularies of transformers in and out.

  read    spiece.model, tokenizer.model   as it is, without the sentinels that some models contain
          tokenizer.json alone            the SentencePiece model that it was made from, rebuilt
          ByT5Tokenizer                   a model of 256 byte pieces, sentinels ascending
  write   tokenizer.json, tokenizer_config.json, special_tokens_map.json, spiece.model

SentencePiece is the reference, since the published models were trained with it; transformers'
conversion differs from it (mT5's bytes become unk; a mark after a ligature vanishes). Files that
`write` writes give SentencePiece's ids, except for four cases that `tokenizers` cannot express:

  the name of a special token ("</s>", "<extra_id_0>") in a text is that token, not text;
  the name of a byte ("<0x41>") is cut after its "<", which matters if a piece has "<0";
  under nmt_nfkc, a combining mark on a character that has one, or that the rule rewrites, may be
    composed, ordered or dropped differently ("ﬁ" with an acute accent);
  between segmentations whose scores agree to the last bits of float32, either may be chosen:
    SentencePiece sums the scores of a text in float32, tokenizers in float64.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import pathlib
import re
from collections.abc import Callable

from lm import tokenizer

SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE_PIECE = 1, 2, 3, 4, 6  # SentencePiece.Type, there

# Errors on reading a JSON file that does not have the structure of transformers.
FORMAT_ERRORS = (LookupError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError)
FORMAT_ERRORS += (binascii.Error,)

# SentencePiece's rewriting of spaces in `tokenizers`; a ▁ of the text is removed at its end only.
REMOVED_SPACES = (("\\A +", ""), (" +", "▁"), ("▁+\\z", ""))


# In. -----------------------------------------------------------------------------------------


def read(directory: str | os.PathLike, out: str | os.PathLike) -> tokenizer.Tokenizer:
    """Write the tokenizer of a transformers directory as ours into `out`, and return it.

    Sentinels are the tokens <extra_id_k>; ByT5's have transformers' ids, 259 and up.
    Raises ValueError if there is no vocabulary, it is damaged or of another kind, pad is not 0, or
    there are added tokens besides sentinels.
    """
    directory = pathlib.Path(directory)
    tokenizer_json, config_json = directory / "tokenizer.json", directory / "tokenizer_config.json"
    added = _added_tokens(directory)
    sentinels = {int(m[1]): i for text, i in added.items() if (m := SENTINEL.fullmatch(text))}
    class_name = _json(config_json, lambda config: _as(str, config.get("tokenizer_class") or ""))
    files = map(directory.joinpath, ("spiece.model", "tokenizer.model"))
    files = [path for path in files if path.exists()]
    is_t5 = "T5" in class_name or not class_name and files and files[0].name == "spiece.model"
    order, default_count = "descending", 100 if is_t5 else 0
    if class_name.startswith("ByT5"):
        model, default_count = tokenizer.byte_model_proto(), 125
        is_ascending = sentinels.get(0) in (None, tokenizer.BYTE_VOCAB_SIZE)
        order = "ascending" if is_ascending else "descending"
    elif files:
        model = _parsed(files[0])
    elif tokenizer_json.exists():
        config = _json(config_json, dict)
        model = _json(tokenizer_json, lambda content: _rebuild_model(directory, content, config))
    else:
        files = "spiece.model, tokenizer.model or tokenizer.json, or the ByT5Tokenizer's config"
        raise ValueError(f"there is no vocabulary in {directory}; it needs a {files}.")
    num_removed = _remove_sentinels(model)
    _check_added(directory, added, {piece.piece for piece in model.pieces})
    extra_ids = _json(config_json, lambda config: _as(int, config.get("extra_ids", default_count)))
    count = num_removed or len(sentinels) or max(0, extra_ids)
    metadata = {"pieces": len(model.pieces), "num_sentinels": count}
    metadata["normalization"] = model.normalizer_spec.name or "identity"
    metadata |= {"sentinel_order": order} if order != "descending" else {}
    is_unchanged = files and not num_removed and order == "descending"
    data = files[0].read_bytes() if is_unchanged else model.SerializeToString()
    _check_model(directory, data)
    tokens = tokenizer.write(out, data, metadata)
    _check_sentinels(directory, tokens, sentinels)
    return tokens


def _json(path: pathlib.Path, parse: Callable):
    """parse(a file's JSON object, {} without a file); ValueError if the file is malformed."""
    try:
        return parse(_as(dict, json.loads(path.read_bytes()) if path.exists() else {}))
    except FORMAT_ERRORS as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy it again.") from error


def _as(kind: type, value):
    """The value; TypeError if it is of another type."""
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _added_tokens(directory: pathlib.Path) -> dict[str, int | None]:
    """{text: id} of all tokens that the files add or name; the id is None if no file has it."""
    files = ["special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"]
    pairs = [pair for name in files for pair in _json(directory / name, _tokens)]
    pairs += _json(directory / "added_tokens.json", lambda by: [(t, _as(int, by[t])) for t in by])
    return dict(sorted(pairs, key=lambda pair: pair[1] is not None))


def _tokens(content: dict) -> list[tuple[str, int | None]]:
    tokens = [content.get(f"{role}_token") for role in ROLES]
    tokens += _as(list, content.get("additional_special_tokens") or [])
    extra = content.get("extra_special_tokens") or []
    tokens += extra.values() if isinstance(extra, dict) else _as(list, extra)
    decoder = _as(dict, content.get("added_tokens_decoder", {}))
    added = _as(list, content.get("added_tokens", []))
    pairs = [(token, None) for token in tokens]
    pairs += [(token, _as(int, json.loads(key))) for key, token in decoder.items()]
    pairs += [(token, _as(int, token["id"])) for token in added]
    return [(text, token_id) for token, token_id in pairs if (text := _content(token))]


def _parsed(path: pathlib.Path):
    """The SentencePiece ModelProto in a file."""
    from google.protobuf import message
    from sentencepiece import sentencepiece_model_pb2

    try:
        return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"{path} is no SentencePiece model ({error}); copy it again.") from error


def _check_model(directory: pathlib.Path, data: bytes) -> None:
    """Raise ValueError for a model that SentencePiece cannot read, or whose pad is not 0."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"SentencePiece refuses {directory} ({error}); copy it again.") from error
    if model.pad_id() != 0 or model.eos_id() < 0:
        ids = f"pad {model.pad_id()} and eos {model.eos_id()}"
        raise ValueError(f"the vocabulary in {directory} has {ids}; it needs pad 0 and an eos.")


def _remove_sentinels(model) -> int:
    """Remove the sentinels at the end of a model's pieces, highest k first; return their number.

    mT5's model and every tokenizer.json of a T5Tokenizer have them.
    """
    matches = (SENTINEL.fullmatch(piece.piece) for piece in reversed(model.pieces))
    others = (k for k, match in enumerate(matches) if not match or int(match[1]) != k)
    count = next(others, len(model.pieces))
    del model.pieces[len(model.pieces) - count :]
    return count


def _content(token) -> str:
    """The text of a token, which may be a string or an object; "" for null."""
    return _as(str, token["content"] if isinstance(token, dict) else token or "")


def _check_added(directory, added: dict[str, int | None], pieces: set[str]) -> None:
    """Raise ValueError for added tokens that are no sentinels: our tokenizer would split them."""
    others = [pair for pair in added.items() if not SENTINEL.fullmatch(pair[0])]
    above = [(t, i) for t, i in others if t not in pieces and (i is None or i >= len(pieces))]
    if above:
        listed = ", ".join(f"{t!r} ({'no id' if i is None else i})" for t, i in above[:5])
        raise ValueError(
            f"{directory} adds tokens to its {len(pieces)} pieces and the sentinels, {len(above)} "
            f"in all: {listed}{', ..' * (len(above) > 5)}; name a directory without them, such as "
            f"the original model's, by --config.tokenizer.dir=DIR (their rows then stay unused)."
        )


def _check_sentinels(directory, tokens: tokenizer.Tokenizer, ids: dict[int, int | None]) -> None:
    """Raise ValueError if the directory's sentinels {k: id} have other ids than ours."""
    for k, expected in ids.items():
        actual = tokens.sentinel(k) if k < tokens.num_extra_ids else "no id"
        if actual == "no id" or expected not in (None, actual):
            raise ValueError(
                f"{directory} gives <extra_id_{k}> the id {expected}, but the ids of "
                f"{tokens.num_extra_ids} {tokens.sentinel_order} sentinels after "
                f"{tokens.vocab_size} pieces give {actual}; remove its added tokens but the "
                f"sentinels, and number those without a gap."
            )


# Models rebuilt from tokenizer.json. ----------------------------------------------------------


def _rebuild_model(directory: pathlib.Path, content: dict, config: dict):
    """The SentencePiece model that a tokenizer.json was made from: pieces, scores, types, rule.

    Byte pieces imply byte fallback, which transformers' T5Tokenizer does not write down.
    Raises ValueError if the file is not of a T5 or Gemma tokenizer.
    """
    table = content.get("model", {})
    kind = {"Unigram": UNIGRAM, "BPE": BPE}.get(table.get("type"))
    if kind is None:
        fault = f"its tokenizer.json is of kind {table.get('type')}, not Unigram or BPE"
        raise ValueError(f"{directory} has no SentencePiece file, and {fault}; add spiece.model.")
    pieces = _bpe_scores(table) if kind == BPE else [(p[0], 0.0 + p[1]) for p in table["vocab"]]
    present = {name for name, _ in pieces}
    names = {role: _content(config.get(f"{role}_token")) for role in ("pad", "eos", "unk", "bos")}
    names = {role: name for role, name in names.items() if name in present}
    model = tokenizer.empty_model_proto(kind, names)
    _set_normalizer(directory, model.normalizer_spec, content)
    added = {token["content"] for token in content.get("added_tokens", [])}
    for token_id, (name, score) in enumerate(pieces):
        if name == names.get("unk"):
            piece_type, model.trainer_spec.unk_id = UNKNOWN, token_id
        elif name in names.values():
            piece_type = CONTROL
        elif kind == BPE and name == "\t" and "<0x09>" not in present:
            name, piece_type = "<0x09>", BYTE_PIECE  # transformers writes Gemma's so
        elif BYTE.fullmatch(name):
            piece_type = BYTE_PIECE
        else:
            is_user_defined = name in added and not SENTINEL.fullmatch(name)
            piece_type = USER_DEFINED if is_user_defined else NORMAL
        model.pieces.add(piece=name, score=score, type=piece_type)
    model.trainer_spec.byte_fallback = any(piece.type == BYTE_PIECE for piece in model.pieces)
    return model


def _bpe_scores(table: dict) -> list[tuple[str, float]]:
    """Pieces by id, each scored by the rank of the first merge that makes it; the others last."""
    ranks, last = {}, len(table["merges"])
    for rank, merge in enumerate(table["merges"]):
        piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(piece, rank)
    names = {token_id: name for name, token_id in table["vocab"].items()}
    ordered = [names[token_id] for token_id in range(len(table["vocab"]))]
    return [(name, -float(ranks.get(name, last))) for name in ordered]


def _steps(step: dict | None) -> list[dict]:
    """The steps of a tokenizer.json's normalizer or pre_tokenizer, in order."""
    if not step:
        return []
    steps = step.get("normalizers", step.get("pretokenizers"))
    return [step] if steps is None else [x for child in steps for x in _steps(child)]


def _set_normalizer(directory: pathlib.Path, spec, content: dict) -> None:
    """Fill in a NormalizerSpec from the steps of a T5 or Gemma tokenizer.json."""
    for step in [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]:
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
                spec.precompiled_charsmap = base64.b64decode(charsmap.encode(), validate=True)
                spec.name = "precompiled"
            case {"type": "Metaspace"}:
                spec.add_dummy_prefix = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip" | "WhitespaceSplit"}:
                spec.remove_extra_whitespaces = True
            case {"type": "Replace", "content": "▁"}:
                pass  # SentencePiece writes spaces as ▁ by itself
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # Gemma's texts have no spaces after the replacement
            case _:
                raise ValueError(
                    f"{directory} has no SentencePiece file, and tokenizer.json has the step "
                    f"{step.get('type')}, unknown to SentencePiece; add spiece.model."
                )


# Out. ----------------------------------------------------------------------------------------


def write(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Write our tokenizer in `source` for transformers' AutoTokenizer, into `directory`.

    The ids are ours except for the cases in the module's docstring. eos is appended to a text and
    no bos added, as in our training (transformers' T5Gemma does the reverse). unk is decoded as
    <unk>, and each byte that is no UTF-8 as U+FFFD, or by ByT5 dropped.
    Raises ValueError if the model is neither unigram nor BPE nor ByT5's bytes.
    """
    tokens = tokenizer.Tokenizer(source)
    model = _parsed(tokens.directory / tokenizer.MODEL_FILE)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sentinels = tokens.names()[tokens.vocab_size :]
    config = _special_names(tokens, model) | {"additional_special_tokens": sentinels}
    files = {}
    if model.pieces == tokenizer.byte_model_proto().pieces:
        by_id = enumerate(sentinels, tokens.vocab_size)
        config["added_tokens_decoder"] = {i: {"content": t, "special": True} for i, t in by_id}
        config |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": tokens.num_extra_ids}
    else:
        files["spiece.model"] = (tokens.directory / tokenizer.MODEL_FILE).read_bytes()
        files["tokenizer.json"] = _backend(tokens, model).to_str(pretty=True).encode()
        files["special_tokens_map.json"] = _encoded(config)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}  # T5 has no token types
    for name, data in (files | {"tokenizer_config.json": _encoded(config)}).items():
        (directory / name).write_bytes(data)


def _encoded(value: dict) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _special_names(tokens: tokenizer.Tokenizer, model) -> dict[str, str]:
    """{"pad_token": "<pad>", ..}: the model's special pieces; bos is optional."""
    ids = {"pad_token": tokens.pad, "eos_token": tokens.eos, "unk_token": tokens.unk}
    names = {role: model.pieces[token_id].piece for role, token_id in ids.items()}
    bos = model.trainer_spec.bos_piece
    if any(piece.piece == bos and piece.type == CONTROL for piece in model.pieces):
        names["bos_token"] = bos
    return names


def _backend(tokens: tokenizer.Tokenizer, model):
    """The `tokenizers` Tokenizer that tokenizes as SentencePiece does with the model."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    trained, names = model.trainer_spec, _special_names(tokens, model)
    if trained.model_type not in (UNIGRAM, BPE) or trained.treat_whitespace_as_suffix:
        raise ValueError(
            f"the model in {tokens.directory} is of kind {trained.model_type} or puts spaces after "
            f"words; only unigram ({UNIGRAM}) and BPE ({BPE}) models with spaces before can be "
            f"exported."
        )
    if trained.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        backend = tokenizers.Tokenizer(models.Unigram(scores, tokens.unk, trained.byte_fallback))
    else:
        ids = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
        options = dict(unk_token=names["unk_token"], byte_fallback=trained.byte_fallback)
        backend = tokenizers.Tokenizer(models.BPE(ids, _merges(model), fuse_unk=True, **options))
    backend.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    if trained.model_type == UNIGRAM and trained.byte_fallback:
        name = tokenizers.Regex("<(?=0x[0-9A-F]{2}>)")  # otherwise the text <0x41> became A
        backend.pre_tokenizer = pre_tokenizers.Split(name, "merged_with_previous")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if tokens.adds_dummy_prefix else []
    backend.decoder = decoders.Sequence(undo)
    _add_tokens(backend, tokens, model)
    end = names["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, tokens.eos)]
    )
    return backend


def _merges(model) -> list[tuple[str, str]]:
    """The pairs that a SentencePiece BPE model merges, in order."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ranked = sorted(scores, key=lambda name: -scores[name])  # stable: equal scores by id
    pairs = ((name[:i], name[i:]) for name in ranked for i in range(1, len(name)))
    return [(head, tail) for head, tail in pairs if head in scores and tail in scores]


def _normalizers(spec) -> list:
    """SentencePiece's normalization of a text, in steps of `tokenizers`.

    Precompiled rewrites single graphemes by their first match, so NFC runs before it (Korean and
    Indic letters) and after it (halfwidth kana with voicing marks).
    """
    from tokenizers import Regex, normalizers

    steps = []
    if spec.precompiled_charsmap:
        rule = normalizers.Precompiled(spec.precompiled_charsmap)
        steps += [normalizers.NFC(), rule, normalizers.NFC()]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(text), new) for text, new in REMOVED_SPACES]
    else:
        steps += [normalizers.Replace(" ", "▁")]
    return steps + ([normalizers.Prepend("▁")] if spec.add_dummy_prefix else [])


def _add_tokens(backend, tokens: tokenizer.Tokenizer, model) -> None:
    """Add the special tokens, and the sentinels' names in the order of their ids."""
    from tokenizers import AddedToken

    for piece in model.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            has_space = "▁" in piece.piece  # matches normalized text only
            special = piece.type != USER_DEFINED
            token = AddedToken(piece.piece, normalized=has_space, special=special)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
    names = tokens.names()[tokens.vocab_size :]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
