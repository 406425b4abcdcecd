"""Every key with its default, unit and meaning; the other configs are differences from this one.

python -m lm train --config=configs/base.py --workdir=runs/base

Cost: T5 1.1 small takes 1.4e13 FLOPs per update, 8.9e17 in all: at least 15 minutes on one H100 at
    its peak of 989 TFLOP/s. Time: not yet measured.
Score: not yet measured.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return the defaults: T5 1.1 small and T5's optimizer."""
    config = ConfigDict()
    config.name = ""  # the run's role in reports; empty: the stage
    config.stage = "pretrain"  # pretrain, finetune, distill: chooses the loss
    config.seed = 0  # of parameters, order of data, masking and dropout
    config.steps = 65_536  # updates; 0: duration sets them
    config.duration = duration = ConfigDict()  # instead of steps, one of these
    duration.epochs = 0.0
    duration.tokens = 0.0  # padding counted
    # Workdir of a run to start from: its newest parameters; with @best at the end those that are
    # best by its checkpoint.best_metric, with @1200 those of that update.
    config.init_from = ""
    config.log_every_steps = 100  # updates between rows of the log
    config.eval_every_steps = 1000  # updates between held-out evaluations
    # Stop after this many evaluations without a better checkpoint.best_metric; 0: never.
    config.early_stopping_patience = 0

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 1000  # updates between checkpoints
    checkpoint.max_to_keep = 2  # number of newest checkpoints to keep
    checkpoint.keep_period = 0  # also keep those whose update is a multiple of this; 0: none
    # Also keep the best by this held-out metric: nats, or a score of the task, as bleu (with
    # several tasks: task/bleu); empty: none.
    checkpoint.best_metric = ""

    config.model = model = ConfigDict()  # set by a preset of configs/models.py, after a colon
    model.vocab_size = 32_128  # rows of the embedding: pieces + sentinels + padding
    model.d_model = 512
    model.d_ff = 1024
    model.num_heads = 6
    model.num_kv_heads = 6  # fewer: grouped-query attention; 1: multi-query
    model.head_dim = 64
    model.num_encoder_layers = 8
    model.num_decoder_layers = 8
    model.encoder = encoder = ConfigDict()  # the encoder's sizes; 0: the decoder's
    encoder.d_model = 0
    encoder.d_ff = 0
    encoder.num_heads = 0
    encoder.num_kv_heads = 0
    encoder.head_dim = 0
    model.architecture = "encoder_decoder"  # or, without encoder: prefix_lm, language_model
    model.activation = "geglu"  # relu, gelu, geglu, swiglu
    model.shared_params = "embeddings"  # by encoder and decoder; none; or all
    model.attention = attention = ConfigDict()
    attention.scale = 1.0  # of scores (T5 scales the query's initial values); or head_dim ** -0.5
    attention.logits_soft_cap = 0.0  # largest score in nats; 0: no cap
    attention.pattern = "global"  # local, local_global_1_1, local_global_5_1 (repeated over layers)
    attention.window_size = 4096  # a local layer sees tokens at smaller distances than this
    attention.query_key_norm = "none"  # or rms
    attention.implementation = "fast_cpu"  # row by row on a CPU; or einsum, the plain formula
    model.position = position = ConfigDict()
    position.kind = "relative"  # relative_per_layer (umT5), rotary, sinusoidal, none
    position.relative_attention_num_buckets = 32
    position.relative_attention_max_distance = 128  # tokens; farther ones share one bucket
    position.rotary_base = 10_000.0
    model.norm = norm = ConfigDict()
    norm.kind = "rms"  # rms_offset (Gemma: times 1 + scale), layer
    norm.placement = "pre"  # before a sub-layer; post: after the sum; both: before and after
    model.final_logits_soft_cap = 0.0  # largest logit in nats; 0: no cap
    model.lm_head = "untied"  # tied: the embedding, times d_model ** -0.5 (T5 1.0); tied_unscaled
    model.embedding_scale = "none"  # or sqrt_d_model
    model.decoder_start_token_id = 0  # the decoder's first input: pad (T5)
    model.dropout_rate = 0.0  # 0 in pre-training, 0.1 in fine-tuning
    model.dtype = "float32"  # of activations; bfloat16 on accelerators
    model.scan_layers = False  # True: compiles in constant time; the parameters are the same
    # Save memory by recomputing: dots stores the results of matrix products, full stores nothing.
    model.remat_policy = "none"

    config.tokenizer = tokenizer = ConfigDict()
    tokenizer.dir = ""  # empty: that of init_from or of the teacher, else {workdir}/tokenizer
    tokenizer.kind = "unigram"  # bpe; or bytes (ByT5), with vocab_size=259
    tokenizer.vocab_size = 32_000  # pieces of SentencePiece, with 3 special ones and 256 bytes
    tokenizer.num_extra_ids = 100  # sentinels, above the pieces
    tokenizer.normalization = "identity"  # or nmt_nfkc, which loses newlines and runs of spaces
    tokenizer.character_coverage = 0.9995  # of the characters; the rest is spelt in bytes
    tokenizer.max_documents = 200_000  # of the training split, from the first, to train on

    config.data = data = ConfigDict()
    data.task = "pydocs"  # of lm/tasks; or a corpus's directory, with a slash
    # Several tasks instead of data.task, with rates: (("a", 3.0), ("b", 1.0)); with None as every
    # rate they follow the numbers of examples.
    data.mixture = ()
    # Your own tasks by name, with the fields of lm/tasks/task.py; example: configs/own_task.py.
    data.custom_tasks = ConfigDict()
    data.tfds_dir = ""  # TFDS directory; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data.shards_dir = ""  # of token shards; empty: {workdir}/shards
    data.train_split = "train"  # TFDS split, slices allowed; a corpus has train and validation
    data.heldout_split = "validation"  # if missing: the last 1 % of train, or its last row
    data.input_length = 512  # tokens per encoder row
    data.target_length = 128  # tokens per decoder row of pairs; the objective sets it for text
    data.batch_size = 128  # rows per update, over all devices
    # Upper bound of a task's size when rates follow sizes (T5's K); 0: no limit.
    data.max_examples_per_task = 0
    data.mixing_temperature = 1.0  # rates are sizes ** (1 / temperature); large: all equal
    data.packing = "none"  # or first_fit: as many pairs to a row as fit; training only
    data.max_bad_records = 0  # damaged records to skip (their rows stay empty) before stopping
    data.num_workers = 0  # processes that make batches; 0: threads of this one. Same order

    config.objective = objective = ConfigDict()  # how running text becomes a pair; lm/objectives
    # span_corruption, iid_replace, token_masking, mass, drop, gap_sentences, prefix_lm,
    # language_model, deshuffling, ul2
    objective.name = "span_corruption"
    # Fraction of hidden tokens. prefix_lm uses it with placement=end only; language_model and
    # deshuffling (the whole text) and ul2 (its own fractions) do not use it.
    objective.noise_density = 0.15
    objective.mean_noise_span_length = 3.0  # tokens per hidden span; span_corruption only
    # uniform: all positions are equally likely (of the span in mass, of the cut in prefix_lm, of
    # sentences in gap_sentences). span_corruption, ul2: or t5 (hides the last token, never the
    # first); prefix_lm: or end; gap_sentences: or lead, principal.
    objective.placement = "uniform"
    objective.replacement = "mask"  # token_masking: or bert, mask_or_random (not all are masked)
    objective.target = "hidden"  # token_masking: or whole, the original text

    config.loss = loss = ConfigDict()
    loss.z_loss = 1e-4  # times log(Z)^2, added to each token's loss
    loss.label_smoothing = 0.0

    config.lora = lora = ConfigDict()  # train low-rank updates of some kernels only
    lora.rank = 0  # 0: no LoRA
    lora.alpha = 16.0  # the product is multiplied by alpha / rank
    lora.target_pattern = "attention/(query|value)/kernel$"  # a regular expression of kernel paths

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adafactor"  # adamw, adamw_rms (nanoT5's), muon (with adamw), lion
    optimizer.learning_rate = 1e-2  # the peak
    optimizer.schedule = "rsqrt"  # constant, linear, cosine, wsd (warm-up, stable, decay)
    optimizer.warmup = warmup = ConfigDict()  # one of these, or none
    warmup.steps = 10_000
    warmup.percent = 0.0  # of the run
    warmup.epochs = 0.0
    warmup.tokens = 0.0  # padding counted
    optimizer.cooldown = cooldown = ConfigDict()  # the final decay of wsd: one of these
    cooldown.steps = 0
    cooldown.percent = 0.0
    cooldown.epochs = 0.0
    cooldown.tokens = 0.0
    # Of the peak, after the last update (linear, cosine, wsd).
    optimizer.final_learning_rate_fraction = 0.0
    optimizer.grad_clip_norm = 1.0  # global norm over all trained parameters; 0: no clipping
    optimizer.weight_decay = 0.0  # times the learning rate
    # (pattern, multiplier): regular expressions of parameter paths; the first match wins, no match
    # is 1.
    optimizer.weight_decay_multipliers = (("(scale|bias)$", 0.0),)
    # They multiply the decay too; None freezes: (("encoder/", 0.1), ("embed", None)).
    optimizer.learning_rate_multipliers = ()
    optimizer.beta1 = 0.9  # of the first moment or momentum; unused by adafactor
    optimizer.beta2 = 0.98  # of the second moment (lion: the momentum); unused by adafactor
    # Of an exponential moving average of the weights, which is then evaluated, decoded, exported
    # and used as initialization; 0: none.
    optimizer.ema_decay = 0.0

    config.parallel = parallel = ConfigDict()
    parallel.strategy = "pmap"  # replicated; or mesh: sharded over data, fsdp and tensor
    parallel.data = -1  # devices along data; -1: all that remain
    parallel.fsdp = 1  # devices that share parameters and optimizer state (mesh)
    parallel.tensor = 1  # devices that share heads, d_ff and vocabulary (mesh)
    parallel.num_microbatches = 1  # split a batch and add the gradients, to save memory
    # True (pmap): the same bits on any number of CPU devices; attention is then computed for all
    # rows at once.
    parallel.deterministic_reduction = False
    # Shards of a batch that are added in a fixed order; a power of 2, a multiple of the devices.
    parallel.reduction_shards = 8

    config.teacher = teacher = ConfigDict()  # for stage distill
    teacher.workdir = ""  # the teacher's run; @best or @1200 as in init_from
    teacher.student_init = "even"  # the student's initialization; lm/distill/student_init.py
    teacher.loss = ConfigDict()  # {term: {weight, final_weight, options}}; lm/distill/terms.py
    teacher.loss.labels = ConfigDict(dict(weight=0.2, final_weight=placeholder(float)))
    teacher.loss.forward_kl = ConfigDict(dict(weight=0.8, final_weight=placeholder(float)))
    teacher.loss.forward_kl.temperature = 2.0
    teacher.dtype = "float32"  # of its parameters and activations; or bfloat16
    teacher.cache = ""  # directory of a teacher cache; empty: the teacher runs live
    teacher.on_policy = on_policy = ConfigDict()  # learn from the student's own answers
    on_policy.fraction = 0.0  # of the updates
    on_policy.decoding = decoding_section("sample")

    config.guard = guard = ConfigDict()
    guard.max_bad_steps = 5  # consecutive updates, not finite or spikes, that cause a rollback
    guard.max_rollbacks = 3  # after these, training stops with a report
    guard.spike_threshold = 6.0  # robust deviations above the median of recent losses; 0: none
    guard.hang_timeout_seconds = 1800.0  # end the process if an update takes longer; 0: never

    config.evaluate = evaluate = ConfigDict()
    evaluate.max_examples = 2048  # held-out examples for the loss, from the first; 0: all
    evaluate.max_decoded_examples = 512  # held-out examples to decode and score; 0: all
    config.decoding = decoding_section("greedy")
    return config.lock()


def decoding_section(method: str) -> ConfigDict:
    """Return a section for decoding, with the names of transformers' GenerationConfig."""
    decoding = ConfigDict()
    decoding.method = method  # greedy, beam, sample
    decoding.num_beams = 4  # beam
    decoding.length_penalty = 0.6  # beam: exponent; 0 favours short answers
    decoding.length_penalty_kind = "google"  # beam: ((5 + length) / 6); or power: length
    decoding.early_stopping = False  # beam: stop as soon as num_beams answers have ended
    decoding.temperature = 1.0  # sample
    decoding.top_k = 0  # sample; 0: all tokens
    decoding.top_p = 1.0  # sample
    decoding.num_return_sequences = 1  # beam, sample
    decoding.repetition_penalty = 1.0  # 1: none
    decoding.min_length = 0  # tokens, with eos
    decoding.max_length = 0  # tokens, with eos; 0: data.target_length
    return decoding
