"""lm: text in, model out.  Read in this order.

sources pydocs tokenizer tasks corpus objectives pipeline    text  -> batch
attention layers transformer                                 batch -> logits
losses optimizers steps origin distill                       logits -> update
decoding metrics evaluate                                    model -> text -> score
parallel checkpoints logs run train show report              the loop and what it stands on
interop                                                      checkpoints of others, in and out

batch holds the legend of axes, choose the one lookup, door the commands.
"""
