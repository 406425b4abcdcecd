"""Every key with its default, unit and meaning; the other configs are differences from this one."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: T5 1.1 small and T5's optimizer. Lengths in tokens, times in updates."""
    config = ConfigDict()
    config.name = ""  # the run's role in reports; empty: the stage
    config.stage = "pretrain"  # pretrain, finetune, distill: chooses the loss
    config.seed = 0  # of parameters, order of data, masking and dropout
    config.steps = 65_536  # updates; 0: duration says how many
    config.duration = ""  # instead of steps: "3 epochs" or "34e9 tokens" (padding counted)
    config.init_from = ""  # workdir of a run to start from: its newest parameters; at the end @best
    # (by its checkpoint.best_metric) or @1200: those of that update

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
    attention.implementation = "fast_cpu"  # on a CPU row by row; or einsum, as on accelerators
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
    model.remat_policy = (
        "none"  # save memory, recompute: dots (keeps their results), full (nothing)
    )

    config.tokenizer = tokenizer = ConfigDict()
    tokenizer.dir = ""  # empty: that of init_from or of the teacher, else {workdir}/tokenizer
    tokenizer.kind = "unigram"  # bpe; or bytes (ByT5), with pieces=259
    tokenizer.vocab_size = 32_000  # of SentencePiece, 3 special ones and 256 bytes included
    tokenizer.num_extra_ids = 100  # ids above the pieces
    tokenizer.normalization = "identity"  # or nmt_nfkc, which loses newlines and runs of spaces
    tokenizer.character_coverage = 0.9995  # of the characters; the rest is spelt in bytes
    tokenizer.max_documents = 200_000  # of the training split, from the first, to learn from

    config.data = data = ConfigDict()
    data.task = "pydocs"  # of lm/tasks; a corpus's directory with a slash; a,b or a=3,b=1: mixed
    data.custom_tasks = (
        ConfigDict()
    )  # your own, by name, in the words of lm/tasks/task.py; an example:
    # configs/own_task.py
    data.tfds_dir = ""  # TFDS directory; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data.shards_dir = ""  # where token shards lie; empty: {workdir}/shards
    data.train_split = (
        "train"  # TFDS split, slices allowed; a corpus has train and validation, whole
    )
    data.heldout_split = "validation"  # if there is none, the last 1 % of train, or its last row
    data.input_length = 512  # tokens per encoder row
    data.target_length = 128  # tokens per decoder row of pairs; the objective sets it for text
    data.batch_size = 128  # rows per update, over all devices
    data.max_examples_per_task = (
        0  # rows that count at most for a task's share of a mixture (T5's K); 0: all
    )
    data.mixing_temperature = 1.0  # shares are sizes ** (1 / temperature); large: all equal
    data.packing = "none"  # or first_fit: as many pairs to a row as fit; training only
    data.max_bad_records = 0  # damaged records to leave out (their rows stay empty) before stopping
    data.num_workers = (
        0  # processes that make batches; 0: threads of this one. The order is the same
    )

    config.objective = objective = ConfigDict()  # how running text becomes a pair; lm/objectives
    objective.name = "span_corruption"  # or iid_replace, token_masking, mass, drop, gap_sentences,
    # prefix_lm, language_model, deshuffling, ul2
    objective.noise_density = 0.15  # share that is hidden; of prefix_lm: where placement is end;
    # not read by language_model and deshuffling (the whole text), nor by ul2 (shares of its own)
    objective.mean_noise_span_length = 3.0  # tokens per hidden span; read by span_corruption alone
    objective.placement = "uniform"  # every place (of mass: of the span; of prefix_lm: of the cut;
    # of gap_sentences: order of sentences) alike; or, of span_corruption and ul2: t5 (never the
    # first token, always the last); of prefix_lm: end; of gap_sentences: lead, principal
    objective.replacement = "mask"  # token_masking: or bert, mask_or_random (not all are masked)
    objective.target = "hidden"  # token_masking: or whole, the text as it was

    config.loss = loss = ConfigDict()
    loss.z_loss = 1e-4  # times log(Z)^2, added to each token's loss
    loss.label_smoothing = 0.0  # label smoothing, a share

    config.lora = lora = ConfigDict()  # train two thin factors of some kernels, nothing else
    lora.rank = 0  # of the factors' product; 0: no LoRA
    lora.alpha = 16.0  # the product counts alpha / rank times
    lora.target_pattern = (
        "attention/(query|value)/kernel$"  # a regular expression of the kernels' paths
    )

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adafactor"  # adamw, adamw_rms (nanoT5's), muon (with adamw), lion
    optimizer.learning_rate = 1e-2  # learning rate
    optimizer.schedule = "rsqrt"  # constant, linear, cosine, wsd (warm-up, stable, decay)
    optimizer.warmup = 10_000  # updates; 0: none, or as warmup_duration says
    optimizer.warmup_duration = ""  # "2 percent", "0.5 epochs", "1e9 tokens", "100 updates"
    optimizer.cooldown = 0  # updates of wsd's last, falling part; 0: as cooldown_duration says
    optimizer.cooldown_duration = ""  # in the same words
    optimizer.final_learning_rate_fraction = (
        0.0  # share of peak after the last update (linear, cosine, wsd)
    )
    optimizer.grad_clip_norm = 1.0  # of the gradient of all that is trained; 0: none
    optimizer.weight_decay = 0.0  # times the learning rate
    optimizer.weight_decay_multipliers = (
        "(scale|bias)$=0"  # multipliers of weight_decay by a regular expression of
    )
    # the parameter's path, space between; the first match wins, no match is 1
    optimizer.learning_rate_multipliers = (
        ""  # multipliers of the learning rate (the decay's too), in the same words:
    )
    # "encoder/=0.1 embed=none"; none freezes
    optimizer.beta1 = 0.9  # of the first moment or momentum; not read by adafactor
    optimizer.beta2 = 0.98  # of the second moment (lion: the momentum); not read by adafactor
    optimizer.ema_decay = 0.0  # decay of a running average of the weights, which is what is
    # evaluated, decoded, exported and started from; 0: none

    config.parallel = parallel = ConfigDict()
    parallel.strategy = "pmap"  # replicated; or mesh: sharded over data, fsdp and tensor
    parallel.data = -1  # devices along data; -1: all that remain
    parallel.fsdp = 1  # devices that share parameters and optimizer state (mesh)
    parallel.tensor = 1  # devices that share heads, d_ff and vocabulary (mesh)
    parallel.num_microbatches = 1  # parts a batch is taken in, to save memory
    parallel.reduction = "fast"  # or fixed (pmap): the same bits on any number of CPU devices; it
    # makes attention whole
    parallel.reduction_shards = (
        8  # parts that fixed adds in one order; devices must divide it; a power of 2
    )

    config.teacher = teacher = ConfigDict()
    teacher.workdir = ""  # of the run that teaches (distill)
    teacher.student_init = "even"  # where the student starts from: the teacher's layers, or random
    teacher.loss = "labels weight=0.2, forward_kl weight=0.8 temperature=2"  # lm/distill/terms.py
    teacher.dtype = "float32"  # of its parameters and activations; or bfloat16
    teacher.cache = ""  # directory of what it said (teacher-cache); empty: it runs beside
    teacher.on_policy = ""  # learn from the student's own answers, in words, as
    # "share=0.5 sample temperature=1"; empty: never

    config.log_every_steps = 100  # updates between rows of the log
    config.eval_every_steps = 1000  # updates between held-out evaluations
    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 1000  # updates between checkpoints
    checkpoint.max_to_keep = 2  # the newest checkpoints that are kept
    checkpoint.keep_period = 0  # also keep those whose update is a multiple of this; 0: none
    checkpoint.best_metric = (
        ""  # also keep the best by this held-out figure, as nats, or a score of
    )
    # the task, as bleu (with several tasks: task/bleu); empty: none
    config.early_stopping_patience = 0  # stop after this many evaluations without a better
    # checkpoint.best_metric; 0: never

    config.guard = guard = ConfigDict()
    guard.max_bad_steps = 5  # updates in a row, not finite or spikes, after which it is rolled back
    guard.max_rollbacks = 3  # as often; then training stops with a report
    guard.spike_threshold = (
        6.0  # robust deviations above the median of recent losses; 0: no loss is a spike
    )
    guard.hang_timeout_seconds = (
        1800.0  # seconds without an update's end after which the process ends; 0: never
    )

    config.evaluate = evaluate = ConfigDict()
    evaluate.max_examples = 2048  # held-out examples for the loss, from the first; 0: all
    evaluate.max_decoded_examples = 512  # held-out examples to decode and score; 0: all
    evaluate.decoding = "greedy"  # or "beam width=4 alpha=0.6", "sample top_p=0.9"; lm/decoding
    return config.lock()
