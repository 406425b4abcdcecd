"""A batch as text, and a model as a table of its parameters."""

from __future__ import annotations

from lm import checkpoints, choose, pipeline, run, transformer


def rows(this: run.Run, split: str, count: int) -> str:
    """The first `count` examples of a split: what the encoder sees, what the decoder must say."""
    tokens = run.make_tokenizer(this)
    train, heldout = run.make_examples(this, tokens)
    seed = this.config["seed"]
    makers = {
        "train": lambda: pipeline.train_batches(train, seed),
        "heldout": lambda: pipeline.heldout_batches(heldout, seed, count),
    }
    batch = next(iter(choose.choose(makers, split, "--split")()))
    said = []
    for index in range(min(count, len(batch.inputs))):
        if not batch.targets_segment_ids[index].any():
            break
        for name, ids in (("encoder sees", batch.inputs), ("decoder must say", batch.targets)):
            real = ids[index][ids[index] > 0]
            ended = real[-1] == tokens.eos
            end = ", then eos" if ended else ", cut"
            said.append(f"--- {name} ({len(real) - ended} tokens{end})")
            said.append(tokens.decode(real))
    return "\n".join(said)


def parameters(this: run.Run) -> str:
    """The table of parameters: path, shape, count, share; and FLOPs of one row's forward pass."""
    total = transformer.parameter_count(this.model)
    said = []
    for path, leaf in checkpoints.flatten(transformer.shapes(this.model)).items():
        shape = " ".join(map(str, leaf.shape))
        said.append(f"{path:<50} {shape:>22} {leaf.size:>13,} {leaf.size / total:>7.2%}")
    flops = transformer.forward_flops(this.model, *this.lengths)
    said.append(f"{'total':<50} {'':>22} {total:>13,} {1:>7.2%}")
    said.append(f"forward FLOPs of a row of {' + '.join(map(str, this.lengths))} tokens: {flops:,}")
    return "\n".join(said)
