"""lm: encoder-decoder language models from scratch.  Read the training path first, in this order.

batch        the record that passes from data to model, and the legend of axes
attention    masks, distances, and the weighted sum
layers       norms, attention, feed-forward, relative bias
transformer  config, blocks, encoder and decoder, KV cache, LoRA
losses       cross-entropy and divergences as (total, weight)
optimizers   clipping, direction, weight decay, schedule
steps        pure train and eval steps: (state, batch) -> (state, metrics)
distill      losses that compare a student with its teacher
pipeline     token shards to batches, a function of (seed, step)
parallel     pmap and mesh: where state and batches lie, how a step is compiled
train        the only training loop

Then what surrounds it:

cpu_kernels                                        the same functions, faster on a CPU
sources tokenizer tasks objectives shards corpus   text to token shards
decoding inference metrics evaluate                model to text to scores
runs checkpoints logs initialization               a run's config, state and record
interop                                            checkpoints of transformers and T5X
preflight show report cli                          tools and commands
lookup storage exits                               tables by name, files, exit codes
extensions                                         entries that a config file adds to the tables
"""
