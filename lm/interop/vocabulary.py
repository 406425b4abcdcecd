"""Vocabularies of transformers in and out: a Tokenizer's directory from theirs, theirs from one.

  read    spiece.model, tokenizer.model   as it is, less the sentinels that some models hold
          tokenizer.json alone            the SentencePiece model it was made of, rebuilt
          ByT5Tokenizer                   a model of 256 byte pieces, sentinels ascending
  write   tokenizer.json, tokenizer_config.json, special_tokens_map.json, spiece.model

SentencePiece is the truth, since the published models were trained with it: where transformers'
own conversion differs from it (mT5's bytes become unk; a mark after a ligature vanishes), ours
does not. What `write` makes gives SentencePiece's ids too, but for four kinds of text, for which
the `tokenizers` library has no means:

  a special token's name ("</s>", "<extra_id_0>") is that token, and not ordinary text;
  a byte's name ("<0x41>") is cut after its "<", which matters where a piece holds "<0";
  under nmt_nfkc, a combining mark on a character that has one, or that the rule rewrites, may be
    composed, ordered or dropped otherwise ("ﬁ" with an acute accent);
  of two segmentations whose scores agree to the last bits of float32, either may be chosen:
    SentencePiece adds up a whole text in float32, tokenizers in float64.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re

from lm import tokenizer

SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE_PIECE = 1, 2, 3, 4, 6  # SentencePiece.Type, there

# What SentencePiece does to spaces, as `tokenizers` says it; a text's own ▁ counts at its end only.
REMOVED_SPACES = (("\\A +", ""), (" +", "▁"), ("▁+\\z", ""))


# In. -----------------------------------------------------------------------------------------


def read(directory: str | os.PathLike, out: str | os.PathLike) -> tokenizer.Tokenizer:
    """The tokenizer of a transformers directory, written as ours into `out`.

    Sentinels are the tokens <extra_id_k>; other tokens added above the pieces are left out. For
    ByT5 they are transformers' ids, 259 and up.
    Raises ValueError if there is no vocabulary, it is damaged, of another kind, or has no pad 0.
    """
    directory = pathlib.Path(directory)
    config = _json(directory / "tokenizer_config.json")
    described = _json(directory / "tokenizer.json")
    files = [directory / name for name in ("spiece.model", "tokenizer.model")]
    files = [path for path in files if path.exists()]
    name = config.get("tokenizer_class", "")
    family = "T5" in name or not name and files and files[0].name == "spiece.model"
    order, usual = "descending", 100 if family else 0
    if name.startswith("ByT5"):
        model, order, usual = tokenizer.byte_model(), "ascending", 125
    elif files:
        model = _parsed(files[0])
    elif described:
        model = _rebuilt(directory, described, config)
    else:
        raise ValueError(
            f"there is no vocabulary in {directory}; it needs a spiece.model, a tokenizer.model, a "
            f"tokenizer.json, or a tokenizer_config.json that names the ByT5Tokenizer."
        )
    held = _take_sentinels(model)
    named = _named_sentinels(config, described)
    count = held or len(named) or config.get("extra_ids", usual)
    facts = {"pieces": len(model.pieces), "num_sentinels": count}
    facts["normalization"] = model.normalizer_spec.name or "identity"
    facts |= {"sentinel_order": order} if order != "descending" else {}
    kept = files and not held and order == "descending"
    data = files[0].read_bytes() if kept else model.SerializeToString()
    _check_model(directory, data)
    made = tokenizer.write(out, data, facts)
    _check_sentinels(directory, made, named)
    return made


def _json(path: pathlib.Path) -> dict:
    """A JSON object; an empty one where there is no such file."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object); copy it again.")
    return found


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
        raise ValueError(
            f"SentencePiece refuses the vocabulary in {directory} ({error}); copy it again."
        ) from error
    if model.pad_id() != 0 or model.eos_id() < 0:
        raise ValueError(
            f"the vocabulary in {directory} has pad {model.pad_id()} and eos {model.eos_id()}; it "
            f"needs pad 0 and an eos, as those of the T5 family and Gemma have."
        )


def _take_sentinels(model) -> int:
    """Remove the sentinels that end a model's own pieces, highest k first; returns how many.

    mT5's model and every tokenizer.json of a T5Tokenizer hold them.
    """
    count = 0
    while count < len(model.pieces):
        found = SENTINEL.fullmatch(model.pieces[-1 - count].piece)
        if not found or int(found[1]) != count:
            break
        count += 1
    del model.pieces[len(model.pieces) - count :]
    return count


def _named_sentinels(config: dict, described: dict) -> dict[int, int | None]:
    """{k: id} of the tokens <extra_id_k> in the files; None where they do not say the id."""
    names = [(None, token) for token in config.get("additional_special_tokens") or []]
    names += [(None, token) for token in config.get("extra_special_tokens") or []]
    names += [(int(place), t) for place, t in config.get("added_tokens_decoder", {}).items()]
    names += [(token["id"], token) for token in described.get("added_tokens", [])]
    found = {}
    for place, token in names:
        if match := SENTINEL.fullmatch(_content(token)):
            found[int(match[1])] = place
    return found


def _content(token) -> str:
    """The text of a token that a file gives as its text or as an object; "" for none."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def _check_sentinels(directory, made: tokenizer.Tokenizer, named: dict[int, int | None]) -> None:
    """Refuse a directory whose sentinels have other ids than ours."""
    for k, place in named.items():
        if k >= made.num_sentinels or place not in (None, made.sentinel(k)):
            here = made.sentinel(k) if k < made.num_sentinels else "no id"
            raise ValueError(
                f"{directory} gives <extra_id_{k}> the id {place}, where {made.num_sentinels} "
                f"{made.sentinel_order} sentinels over {made.pieces} pieces give {here}; remove "
                f"its added tokens but the sentinels, and number those without a gap."
            )


# Models made here. ---------------------------------------------------------------------------


def _rebuilt(directory: pathlib.Path, described: dict, config: dict):
    """The SentencePiece model that a tokenizer.json was made of: pieces, scores, types, rule.

    Byte pieces mean byte fallback, though transformers' T5Tokenizer forgets it.
    Raises ValueError if the file's steps are not those of a T5 or Gemma tokenizer.
    """
    vocabulary = described.get("model", {})
    if vocabulary.get("type") not in ("Unigram", "BPE") or "vocab" not in vocabulary:
        raise ValueError(
            f"{directory} has no SentencePiece file, and its tokenizer.json is of kind "
            f"{vocabulary.get('type')}, not Unigram or BPE; add the spiece.model."
        )
    kind = UNIGRAM if vocabulary["type"] == "Unigram" else BPE
    pieces = [tuple(p) for p in vocabulary["vocab"]] if kind == UNIGRAM else _bpe_scores(vocabulary)
    names = {role: _content(config.get(f"{role}_token")) for role in ("pad", "eos", "unk", "bos")}
    names = {role: name for role, name in names.items() if name in dict(pieces)}
    model = tokenizer.blank(kind, names)
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


def _bpe_scores(vocabulary: dict) -> list[tuple[str, float]]:
    """Pieces by id, each scored by the rank of the first merge that makes it; the others last."""
    ranks = {}
    for rank, merge in enumerate(vocabulary["merges"]):
        whole = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(whole, rank)
    last = len(vocabulary["merges"])
    names = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    return [(name, -float(ranks.get(name, last))) for name in names]


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
                spec.precompiled_charsmap = base64.b64decode(charsmap)
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
    model = _parsed(tokens.directory / tokenizer.MODEL)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sentinels = [f"<extra_id_{k}>" for k in range(tokens.num_sentinels)]
    config = _special_names(tokens, model) | {"additional_special_tokens": sentinels}
    files = {}
    if [piece.piece for piece in model.pieces] == [
        piece.piece for piece in tokenizer.byte_model().pieces
    ]:
        config |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": tokens.num_sentinels}
    else:
        files["spiece.model"] = (tokens.directory / tokenizer.MODEL).read_bytes()
        files["tokenizer.json"] = _backend(tokens, model).to_str(pretty=True).encode()
        files["special_tokens_map.json"] = _encoded(config)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    for name, data in (files | {"tokenizer_config.json": _encoded(config)}).items():
        tokenizer.write_whole(directory / name, data)


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
        options = dict(unk_id=tokens.unk, byte_fallback=trained.byte_fallback)
        made = tokenizers.Tokenizer(models.Unigram(scores, **options))
    else:
        ids = {piece.piece: place for place, piece in enumerate(model.pieces)}
        options = dict(unk_token=names["unk_token"], byte_fallback=trained.byte_fallback)
        made = tokenizers.Tokenizer(models.BPE(ids, _merges(model), fuse_unk=True, **options))
    made.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    if trained.model_type == UNIGRAM and trained.byte_fallback:
        name = tokenizers.Regex("<(?=0x[0-9A-F]{2}>)")  # or the text <0x41> would become an A
        made.pre_tokenizer = pre_tokenizers.Split(name, "merged_with_previous")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if tokens.has_prefix else []
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
    names = [tokens.decode([place]) for place in range(tokens.pieces, tokens.size)]
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
