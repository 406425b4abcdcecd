"""Vocabularies of transformers in and out: a Tokenizer's directory from theirs, theirs from one.

  read    spiece.model, tokenizer.model   as it is, less the sentinels that some models hold
          tokenizer.json alone            the SentencePiece model it was made of, rebuilt
          ByT5Tokenizer                   a model of 256 byte pieces, sentinels ascending
  write   tokenizer.json, tokenizer_config.json, special_tokens_map.json, spiece.model

SentencePiece is the reference: the published models were trained with it. Where transformers'
conversion differs (mT5's bytes become unk; a mark after a ligature vanishes), ours does not.
`write` gives SentencePiece's ids too, except for four kinds of text `tokenizers` cannot express:

  a special token's name ("</s>", "<extra_id_0>") is that token, and not ordinary text;
  a byte's name ("<0x41>") is cut after its "<", which matters where a piece holds "<0";
  under nmt_nfkc, a combining mark on a character that has one, or that the rule rewrites, may be
    composed, ordered or dropped otherwise ("ﬁ" with an acute accent);
  of two segmentations whose scores agree to the last bits of float32, either may be chosen:
    SentencePiece adds up a whole text in float32, tokenizers in float64.
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

# What reading a JSON file provokes that is not shaped as transformers shapes it.
ODD = (LookupError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError, binascii.Error)

# What SentencePiece does to spaces, as `tokenizers` says it; a text's own ▁ counts at its end only.
REMOVED_SPACES = (("\\A +", ""), (" +", "▁"), ("▁+\\z", ""))


# In. -----------------------------------------------------------------------------------------


def read(directory: str | os.PathLike, out: str | os.PathLike) -> tokenizer.Tokenizer:
    """The tokenizer of a transformers directory, written as ours into `out`.

    Sentinels are the tokens <extra_id_k>. For ByT5 they are transformers' ids, 259 and up.
    Raises ValueError if there is no vocabulary, it is damaged, of another kind, has no pad 0, or
    has tokens of its own above the pieces.
    """
    directory = pathlib.Path(directory)
    described, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    added = _added_tokens(directory)
    named = {int(m[1]): i for text, i in added.items() if (m := SENTINEL.fullmatch(text))}
    name = _json(settings, lambda config: _as(str, config.get("tokenizer_class") or ""))
    files = map(directory.joinpath, ("spiece.model", "tokenizer.model"))
    files = [path for path in files if path.exists()]
    family = "T5" in name or not name and files and files[0].name == "spiece.model"
    order, usual = "descending", 100 if family else 0
    if name.startswith("ByT5"):
        model, usual = tokenizer.byte_model_proto(), 125
        order = "ascending" if named.get(0) in (None, tokenizer.BYTE_VOCAB_SIZE) else "descending"
    elif files:
        model = _parsed(files[0])
    elif described.exists():
        config = _json(settings, dict)
        model = _json(described, lambda found: _rebuilt(directory, found, config))
    else:
        raise ValueError(
            f"there is no vocabulary in {directory}; it needs a spiece.model, a tokenizer.model, a "
            f"tokenizer.json, or a tokenizer_config.json that names the ByT5Tokenizer."
        )
    held = _take_sentinels(model)
    _check_added(directory, added, {piece.piece for piece in model.pieces})
    extra_ids = _json(settings, lambda config: _as(int, config.get("extra_ids", usual)))
    count = held or len(named) or max(0, extra_ids)
    facts = {"pieces": len(model.pieces), "num_sentinels": count}
    facts["normalization"] = model.normalizer_spec.name or "identity"
    facts |= {"sentinel_order": order} if order != "descending" else {}
    kept = files and not held and order == "descending"
    data = files[0].read_bytes() if kept else model.SerializeToString()
    _check_model(directory, data)
    made = tokenizer.write(out, data, facts)
    _check_sentinels(directory, made, named)
    return made


def _json(path: pathlib.Path, parse: Callable):
    """What `parse` makes of a JSON object, empty without a file; ValueError where it stumbles."""
    try:
        return parse(_as(dict, json.loads(path.read_bytes()) if path.exists() else {}))
    except ODD as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy it again.") from error


def _as(kind: type, value):
    """The value; a TypeError if it is of another kind."""
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _added_tokens(directory: pathlib.Path) -> dict[str, int | None]:
    """{text: id} of all tokens that the files add or name; None where none of them says the id."""
    files = ["special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"]
    pairs = [pair for name in files for pair in _json(directory / name, _tokens)]
    pairs += _json(directory / "added_tokens.json", lambda by: [(t, _as(int, by[t])) for t in by])
    return dict(sorted(pairs, key=lambda pair: pair[1] is not None))


def _tokens(found: dict) -> list[tuple[str, int | None]]:
    named = [found.get(f"{role}_token") for role in ROLES]
    named += _as(list, found.get("additional_special_tokens") or [])
    extra = found.get("extra_special_tokens") or []
    named += extra.values() if isinstance(extra, dict) else _as(list, extra)
    decoder = _as(dict, found.get("added_tokens_decoder", {}))
    added = _as(list, found.get("added_tokens", []))
    pairs = [(token, None) for token in named]
    pairs += [(token, _as(int, json.loads(place))) for place, token in decoder.items()]
    pairs += [(token, _as(int, token["id"])) for token in added]
    return [(text, place) for token, place in pairs if (text := _content(token))]


def _parsed(path: pathlib.Path):
    """The SentencePiece ModelProto in a file."""
    from google.protobuf import message
    from sentencepiece import sentencepiece_model_pb2

    try:
        return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"{path} is no SentencePiece model ({error}); copy it again.") from error


def _check_model(directory: pathlib.Path, data: bytes) -> None:
    """Refuse a model that SentencePiece cannot read, or whose padding is not id 0."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"SentencePiece refuses {directory} ({error}); copy it again.") from error
    if model.pad_id() != 0 or model.eos_id() < 0:
        raise ValueError(
            f"the vocabulary in {directory} has pad {model.pad_id()} and eos {model.eos_id()}; it "
            f"needs pad 0 and an eos, as those of the T5 family and Gemma have."
        )


def _take_sentinels(model) -> int:
    """Remove the sentinels that end a model's own pieces, highest k first; returns how many.

    mT5's model and every tokenizer.json of a T5Tokenizer hold them.
    """
    found = (SENTINEL.fullmatch(piece.piece) for piece in reversed(model.pieces))
    others = (k for k, match in enumerate(found) if not match or int(match[1]) != k)
    count = next(others, len(model.pieces))
    del model.pieces[len(model.pieces) - count :]
    return count


def _content(token) -> str:
    """The text of a token that a file gives as its text or as an object; "" for none."""
    return _as(str, token["content"] if isinstance(token, dict) else token or "")


def _check_added(directory, added: dict[str, int | None], pieces: set[str]) -> None:
    """Refuse tokens above the pieces that are no sentinels: here their texts would be cut up."""
    others = [pair for pair in added.items() if not SENTINEL.fullmatch(pair[0])]
    above = [(t, i) for t, i in others if t not in pieces and (i is None or i >= len(pieces))]
    if above:
        shown = ", ".join(f"{t!r} ({'no id' if i is None else i})" for t, i in above[:5])
        raise ValueError(
            f"{directory} adds tokens to its {len(pieces)} pieces and the sentinels, {len(above)} "
            f"in all: {shown}{', ..' * (len(above) > 5)}; name a directory without them, such as "
            f"the original model's, by --config.tokenizer.dir=DIR (their rows then stay unused)."
        )


def _check_sentinels(directory, made: tokenizer.Tokenizer, named: dict[int, int | None]) -> None:
    """Refuse a directory whose sentinels have other ids than ours."""
    for k, place in named.items():
        if k >= made.num_extra_ids or place not in (None, made.sentinel(k)):
            here = made.sentinel(k) if k < made.num_extra_ids else "no id"
            raise ValueError(
                f"{directory} gives <extra_id_{k}> the id {place}, where {made.num_extra_ids} "
                f"{made.sentinel_order} sentinels over {made.vocab_size} pieces give "
                f"{here}; remove "
                f"its added tokens but the sentinels, and number those without a gap."
            )


# Models made here. ---------------------------------------------------------------------------


def _rebuilt(directory: pathlib.Path, described: dict, config: dict):
    """The SentencePiece model that a tokenizer.json was made of: pieces, scores, types, rule.

    Byte pieces mean byte fallback, though transformers' T5Tokenizer forgets it.
    Raises ValueError if the file's steps are not those of a T5 or Gemma tokenizer.
    """
    table = described.get("model", {})
    kind = {"Unigram": UNIGRAM, "BPE": BPE}.get(table.get("type"))
    if kind is None:
        raise ValueError(
            f"{directory} has no SentencePiece file, and its tokenizer.json is of kind "
            f"{table.get('type')}, not Unigram or BPE; add the spiece.model."
        )
    pieces = [(p[0], 0.0 + p[1]) for p in table["vocab"]] if kind == UNIGRAM else _bpe_scores(table)
    names = {role: _content(config.get(f"{role}_token")) for role in ("pad", "eos", "unk", "bos")}
    names = {role: name for role, name in names.items() if name in dict(pieces)}
    model = tokenizer.empty_model_proto(kind, names)
    _describe_rule(directory, model.normalizer_spec, described)
    added = {token["content"] for token in described.get("added_tokens", [])}
    for place, (name, score) in enumerate(pieces):
        if kind == BPE and name == "\t" and "<0x09>" not in dict(pieces):
            name = "<0x09>"  # transformers writes Gemma's so
        model.pieces.add(piece=name, score=score, type=_type_of(name, names, added))
        if name == names.get("unk"):
            model.trainer_spec.unk_id = place
    model.trainer_spec.byte_fallback = any(piece.type == BYTE_PIECE for piece in model.pieces)
    return model


def _bpe_scores(table: dict) -> list[tuple[str, float]]:
    """Pieces by id, each scored by the rank of the first merge that makes it; the others last."""
    ranks, last = {}, len(table["merges"])
    for rank, merge in enumerate(table["merges"]):
        whole = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(whole, rank)
    names = {place: name for name, place in table["vocab"].items()}
    ordered = [names[place] for place in range(len(table["vocab"]))]
    return [(name, -float(ranks.get(name, last))) for name in ordered]


def _type_of(name: str, special: dict[str, str], added: set[str]) -> int:
    if name == special.get("unk"):
        return UNKNOWN
    if name in special.values():
        return CONTROL
    if BYTE.fullmatch(name):
        return BYTE_PIECE
    return USER_DEFINED if name in added and not SENTINEL.fullmatch(name) else NORMAL


def _flat(step: dict | None) -> list[dict]:
    """The steps of a tokenizer.json's normalizer or pre_tokenizer, in order."""
    if not step:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [s for part in inner for s in _flat(part)]


def _describe_rule(directory: pathlib.Path, spec, described: dict) -> None:
    """Fill a NormalizerSpec in from a tokenizer.json's steps: T5's, or Gemma's, which has none."""
    steps = [*_flat(described.get("normalizer")), *_flat(described.get("pre_tokenizer"))]
    for step in steps:
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
                spec.precompiled_charsmap = base64.b64decode(charsmap.encode(), validate=True)
                spec.name = "precompiled"
            case {"type": "Metaspace"}:
                spec.add_dummy_prefix = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip" | "WhitespaceSplit"}:
                spec.remove_extra_whitespaces = True
            case {"type": "Replace", "content": "▁"}:
                pass  # the space is written ▁, as SentencePiece does by itself
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # which Gemma's steps never find, being after the former
            case _:
                raise ValueError(
                    f"{directory} has no SentencePiece file, and its tokenizer.json has a step "
                    f"{step.get('type')} that SentencePiece does not know; add the spiece.model."
                )


# Out. ----------------------------------------------------------------------------------------


def write(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Write our tokenizer in `source` for transformers' AutoTokenizer, into `directory`.

    The ids are ours but for what the module's docstring lists. A text gets eos at its end and no
    bos, as models are trained here; transformers' own T5Gemma has it the other way. Decoded, unk
    reads <unk>, and each byte that is no UTF-8 is a U+FFFD of its own, or for ByT5 left out.
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
        placed = enumerate(sentinels, tokens.vocab_size)
        config["added_tokens_decoder"] = {i: {"content": t, "special": True} for i, t in placed}
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
    """{"pad_token": "<pad>", ..}: the special pieces that the model has, bos only if it has one."""
    ids = {"pad_token": tokens.pad, "eos_token": tokens.eos, "unk_token": tokens.unk}
    names = {role: model.pieces[place].piece for role, place in ids.items()}
    bos = model.trainer_spec.bos_piece
    if any(piece.piece == bos and piece.type == CONTROL for piece in model.pieces):
        names["bos_token"] = bos
    return names


def _backend(tokens: tokenizer.Tokenizer, model):
    """The `tokenizers` Tokenizer that does what SentencePiece does with the model."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    trained, names = model.trainer_spec, _special_names(tokens, model)
    if trained.model_type not in (UNIGRAM, BPE) or trained.treat_whitespace_as_suffix:
        raise ValueError(
            f"the model in {tokens.directory} is of kind {trained.model_type} or puts spaces after "
            f"words; only unigram ({UNIGRAM}) and BPE ({BPE}) models with spaces before can be "
            f"written for transformers."
        )
    if trained.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        made = tokenizers.Tokenizer(models.Unigram(scores, tokens.unk, trained.byte_fallback))
    else:
        ids = {piece.piece: place for place, piece in enumerate(model.pieces)}
        options = dict(unk_token=names["unk_token"], byte_fallback=trained.byte_fallback)
        made = tokenizers.Tokenizer(models.BPE(ids, _merges(model), fuse_unk=True, **options))
    made.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    if trained.model_type == UNIGRAM and trained.byte_fallback:
        name = tokenizers.Regex("<(?=0x[0-9A-F]{2}>)")  # or the text <0x41> would become an A
        made.pre_tokenizer = pre_tokenizers.Split(name, "merged_with_previous")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if tokens.adds_dummy_prefix else []
    made.decoder = decoders.Sequence(undo)
    _add_tokens(made, tokens, model)
    end = names["eos_token"]
    made.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, tokens.eos)]
    )
    return made


def _merges(model) -> list[tuple[str, str]]:
    """The pairs that a SentencePiece BPE model joins, first the pairs that it joins first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ranked = sorted(scores, key=lambda name: -scores[name])  # stable, so equal scores go by id
    cuts = ((name[:i], name[i:]) for name in ranked for i in range(1, len(name)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]


def _normalizers(spec) -> list:
    """SentencePiece's rule for a text, in steps of `tokenizers`.

    Precompiled sees a grapheme at a time and keeps its first match, so what a rule composes is
    composed before (Korean and Indic letters) and after it (halfwidth kana with voicing marks).
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


def _add_tokens(made, tokens: tokenizer.Tokenizer, model) -> None:
    """Tell `tokenizers` which ids are special, and the sentinels' names in the order of ids."""
    from tokenizers import AddedToken

    for piece in model.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            spaced = "▁" in piece.piece  # found only in a text whose spaces are written so
            special = piece.type != USER_DEFINED
            token = AddedToken(piece.piece, normalized=spaced, special=special)
            (made.add_special_tokens if special else made.add_tokens)([token])
    names = [tokens.decode([place]) for place in range(tokens.vocab_size, tokens.size)]
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
