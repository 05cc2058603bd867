"""RunConfig: everything one training run needs, as frozen data.

Sections: run, model, data, optim, parallel, engine, train, checkpoint, logging, recipe, backend, comm.
Units are in the field comments; sizes are in elements, tokens or samples, never bytes, unless the name says so.
Cross-field rules that need no torch are checked here, when the object is built; the loader puts the key's path
in front of the message.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from fp4dist.spec.cluster import Order
from fp4dist.spec.communication import CommConfig
from fp4dist.spec.frozen import frozen
from fp4dist.spec.phases import GradNoise
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.shape import Beyond
from fp4dist.spec.training import QRamping
from fp4dist.spec.watching import AutopilotConfig, MonitorConfig, check_rules


@frozen
class RunSection:
    """Where a run lives."""

    name: str
    dir: str | None = None  # run folder; default runs/<name>
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must be in [0, 2**32): it is half of the Philox key")
        if not self.name or self.name.startswith("/") or {"", ".", ".."} & set(self.name.split("/")):
            raise ValueError(f"name = {self.name!r} must name a folder under runs/; to put the run elsewhere set dir")


@frozen
class MoeConfig:
    """Mixture of experts instead of the dense MLP of every layer from `first_dense_layers` on."""

    num_experts: int
    top_k: int = 2  # experts of each token
    ffn_hidden_size: int  # of each expert
    shared_ffn_hidden_size: int = 0  # of the expert that every token passes; 0: none
    first_dense_layers: int = 0  # leading layers that keep the dense MLP
    aux_loss_coeff: float = 1e-2  # of the load-balancing loss; 0 switches it off
    router_dtype: Literal["fp32", "model"] = "fp32"
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    grouped_gemm: bool = True  # all experts of a rank in one grouped GEMM; false: one after the other, the same bits

    def __post_init__(self) -> None:
        for key in ("num_experts", "top_k", "ffn_hidden_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        for key in ("shared_ffn_hidden_size", "first_dense_layers", "aux_loss_coeff"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} = {getattr(self, key)} must not be negative")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} must not exceed num_experts = {self.num_experts}")


@frozen
class ModelConfig:
    """A Llama-style decoder (RMSNorm, SwiGLU, RoPE, GQA), built from Megatron-core layers."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None  # key/value heads; default: as many as query heads
    head_dim: int | None = None  # default hidden_size / num_attention_heads
    vocab_size: int  # logits and embedding rows before padding to the tensor-parallel size
    seq_length: int  # tokens
    tie_embeddings: bool = False
    rope_base: int = 10000
    norm_eps: float = 1e-5
    init_std: float = 0.02
    qk_norm: bool = False
    moe: MoeConfig | None = None
    beyond: Beyond | None = None  # known to the planner alone: a run refuses it

    def __post_init__(self) -> None:
        if self.moe is not None and self.moe.first_dense_layers >= self.num_layers:
            raise ValueError(
                f"moe.first_dense_layers = {self.moe.first_dense_layers} leaves none of num_layers ="
                f" {self.num_layers} to the experts; lower it or drop moe"
            )
        for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "seq_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        for key in ("num_query_groups", "head_dim"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1; leave it out for the default")
        if not (self.rope_base >= 1 and self.norm_eps >= 0 and self.init_std > 0):
            raise ValueError(
                f"rope_base = {self.rope_base} must be at least 1, norm_eps = {self.norm_eps} not negative and init_std"
                f" = {self.init_std} positive; leave them out for the defaults"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of"
                f" num_attention_heads = {self.num_attention_heads}; change one of them or set head_dim"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of"
                f" num_query_groups = {self.query_groups}"
            )

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@frozen
class PrepareConfig:
    """Make the token files from raw text when they are missing (one rank does it, with progress)."""

    sources: tuple[str, ...]  # txt or jsonl, plain or .bz2 .gz .zst; relative to this folder or the shipped configs
    tokenizer: str | None = None  # a tokenizers JSON; None trains a byte-level BPE on the sources
    vocab_size: int = 4096  # of the BPE to train
    jsonl_key: str = "text"
    document_separator: str | None = "<|endoftext|>"  # a line that ends a document in txt files
    eot_token: str = "<|endoftext|>"  # token put after each document; id 0 of a BPE trained here
    valid_fraction: float = 0.0  # share of the documents, chosen by their hash, that go to `<prefix>_valid`

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one txt or jsonl file")
        if self.tokenizer is None and self.vocab_size < 257:
            raise ValueError(
                f"vocab_size = {self.vocab_size} must be at least 257: 256 bytes and the end-of-text token"
            )
        if not 0 <= self.valid_fraction <= 0.5:
            raise ValueError(f"valid_fraction = {self.valid_fraction} must be in [0, 0.5]")


@frozen
class DataConfig:
    """Megatron-core token files (`.bin` + `.idx`), one prefix or a weighted blend."""

    train: tuple[str, ...] = ()  # prefixes, or weight, prefix, weight, prefix ...
    valid: tuple[str, ...] = ()  # empty: `split` cuts the validation part from `train`
    split: str = "969,30,1"  # train, valid, test shares; used when `valid` is empty
    cache_dir: str | None = None  # index caches; default <run folder>/data_cache
    prepare: PrepareConfig | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; give the prefix of a .bin/.idx pair")
        shares = self.split.split(",")
        if len(shares) != 3 or not all(s.strip().replace(".", "", 1).isdigit() for s in shares):
            raise ValueError(f"split = {self.split!r} must be three shares such as '969,30,1'")
        if self.num_workers < 0:
            raise ValueError(f"num_workers = {self.num_workers} must not be negative; 0 reads in a thread")
        if self.prepare is not None:
            self._check_prepare(self.prepare)

    def _check_prepare(self, prepare: PrepareConfig) -> None:
        if len(self.train) != 1:
            raise ValueError(
                f"train = {list(self.train)} must be the one prefix that `prepare` makes; prepare a blend's parts apart"
            )
        made = f"{self.train[0]}_valid"
        if prepare.valid_fraction and made not in self.valid:
            raise ValueError(
                f"prepare.valid_fraction = {prepare.valid_fraction} writes {made!r}; set valid: [{made}] to use it"
            )


@frozen
class OptimConfig:
    """An optimizer with fp32 master weights and a learning-rate schedule.

    Adafactor and SGD are torch's; Adafactor keeps its own beta2 and eps, its factors need whole matrices.
    """

    kind: Literal["adamw", "sgd", "adafactor"] = "adamw"
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2  # share of the run in WSD's decay phase
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9  # of sgd
    eps: float = 1e-8
    clip_grad: float = 1.0  # global L2 norm; 0 switches clipping off

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"lr = {self.lr} and min_lr = {self.min_lr} must satisfy 0 <= min_lr <= lr and lr > 0")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction = {self.decay_fraction} must be in (0, 1]")
        for key in ("warmup_steps", "weight_decay", "clip_grad", "eps"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} = {getattr(self, key)} must not be negative")
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be in [0, 1)")


@frozen
class ParallelConfig:
    """Megatron's process groups. Data parallel = world / (tp * pp * cp); experts are spread over ep of its ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks of each pipeline stage (interleaved schedule)
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    ends_as_layers: bool = False  # embedding and head count as layers: the first and the last chunk have one less
    order: Order = "tp-cp-ep-dp-pp"  # how ranks are numbered, the fastest axis first; ...-pp-dp keeps a copy together

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "vpp", "cp", "ep"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel needs tp > 1: it splits what tensor parallelism replicates")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} needs pp > 1: it interleaves the chunks of pipeline stages")
        if self.ends_as_layers and self.pp == 1:
            raise ValueError("ends_as_layers needs pp > 1: it evens out pipeline stages")


@frozen
class EngineConfig:
    """Who owns gradients and optimizer state: Megatron DDP + distributed optimizer, or DeepSpeed ZeRO."""

    kind: Literal["megatron", "deepspeed"] = "megatron"
    zero_stage: int = 1  # deepspeed only
    overlap: bool = True  # megatron: reduce gradients and gather parameters while computing, where dp > 1
    fp4_param_gather: bool = False  # megatron: gather updated weights as the codes that the recipe needs
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's configuration (ZeRO++, offload)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage = {self.zero_stage} must be 0, 1, 2 or 3")
        if self.kind == "megatron" and self.deepspeed:
            raise ValueError("deepspeed settings need kind: deepspeed; this run uses kind: megatron")
        if self.kind == "deepspeed" and self.fp4_param_gather:
            raise ValueError("fp4_param_gather needs kind: megatron: ZeRO gathers parameters itself")


@frozen
class TrainConfig:
    """How long, how much at a time, in which precision."""

    steps: int
    global_batch_size: int  # samples a step
    micro_batch_size: int  # samples a rank and forward pass
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"  # of what is not FP4; auto: bf16 on a GPU, fp32 on a CPU
    deterministic: bool = False  # the same bits in every run of a layout: no kernel with atomic sums, no autotuning
    # norm, RoPE, SwiGLU, loss by torch.compile; auto: on GPUs, if it works; amax: auto, whose results bring their amax
    fusions: Literal["auto", "amax", "none"] = "auto"
    cuda_graph: Literal["auto", True, False] = "auto"  # of micro-batches; auto: on one GPU, where it can
    recompute: Literal["none", "selective", "full"] = "none"  # of activations in backward; full: every layer
    recompute_modules: tuple[str, ...] = ("mlp",)  # selective: Megatron's names (core_attn, mlp, moe, layernorm ...)
    eval_every: int = 100  # steps; 0: only at the first and last step
    eval_samples: int = 64  # samples in each evaluation, the same ones every time
    max_nonfinite_steps: int = 5  # consecutive skipped steps before the run stops
    stop_after: int | None = None  # end this process after that step, as an interruption would; `steps` is unchanged

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch_size", "micro_batch_size", "max_nonfinite_steps", "stop_after"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        for key in ("eval_every", "eval_samples"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} = {getattr(self, key)} must not be negative")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of"
                f" micro_batch_size = {self.micro_batch_size}"
            )


@frozen
class CheckpointConfig:
    """What is saved when; each checkpoint is published atomically under <run folder>/checkpoints/."""

    every: int = 0  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    load: str | None = None  # start from this checkpoint folder instead of the run's own newest one
    allow_recipe_change: bool = False  # load weights trained with another recipe
    trusted: bool = False  # read files that need full pickle (DeepSpeed's own); only for files you made

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(f"every = {self.every} must not be negative and keep = {self.keep} must be at least 1")


@frozen
class LoggingConfig:
    """Where the numbers go; metrics.jsonl and curves.png are always written."""

    every: int = 10  # steps between console lines; metrics.jsonl has every step
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "fp4dist"
    peak_tflops: float | None = None  # of one device in bf16, for MFU; default by device name, none on a CPU

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every} must be at least 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops = {self.peak_tflops} must be positive; leave it out for the device's own")


@frozen
class BackendConfig:
    """Which kernels run the recipe. Never part of the recipe: all backends give the same bits."""

    kind: Literal["auto", "reference", "triton", "cuda"] = "auto"
    allow_reference: bool = False  # let the slow reference run on a GPU
    strict_exact: bool = False  # skip a step in which FP8 carriers lost elements, not only leave FP8 after it
    fp8_again_after: int = 64  # steps that a GEMM's FP8 carriers would have been exact in, to take them again; 0: never

    def __post_init__(self) -> None:
        if self.fp8_again_after < 0:
            raise ValueError(f"fp8_again_after = {self.fp8_again_after} must be 0 (never), or a number of steps")


@frozen
class RunConfig:
    """One run, complete."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    recipe: Recipe
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    backend: BackendConfig = BackendConfig()
    monitor: MonitorConfig | None = None  # what FP4 does to every linear, looked at now and then; None: never
    autopilot: AutopilotConfig | None = None  # what acts on trouble; None: nobody
    comm: CommConfig | None = None  # what travels compressed between ranks; None: nothing beyond the recipe's gathers

    def __post_init__(self) -> None:
        _check_buildable(self.model)
        if self.autopilot is not None:
            noise = self.monitor is not None and self.monitor.noise and self.engine.kind == "megatron"
            check_rules(
                self.autopilot, checkpoints=bool(self.checkpoint.every), looks=self.monitor is not None, noise=noise,
                nonfinite_steps=self.train.max_nonfinite_steps,
            )  # fmt: skip
        if self.comm is not None:
            _check_comm(self.comm, self.parallel, self.model)
            _check_param_gather(self.comm, self.engine, self.optim, self.recipe)
        _check_tensor_parallel(self.model, self.parallel)
        _check_chunks(self.model, self.parallel)
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps = {self.optim.warmup_steps} must be smaller than train.steps = {self.train.steps}"
            )
        _check_optimizer(self.optim, self.engine, self.parallel, self.recipe)
        _check_phases(self.recipe, self.train.steps, self.engine)
        if self.engine.kind == "deepspeed" and self.parallel.pp > 1 and self.engine.zero_stage >= 2:
            raise ValueError(
                f"engine.zero_stage = {self.engine.zero_stage} with parallel.pp = {self.parallel.pp}: ZeRO 2 and 3"
                " reduce gradients inside every backward, before a pipeline schedule has summed its micro-batches;"
                " use zero_stage 0 or 1, or pp 1"
            )

    @property
    def run_dir(self) -> str:
        """The run folder."""
        return self.run.dir or f"runs/{self.run.name}"


def _check_buildable(model: ModelConfig) -> None:
    """The planner knows more models than the blocks here can build."""
    if model.beyond is not None:
        raise ValueError(
            f"model.beyond: {model.name} has blocks beyond a Llama-style decoder (MLA, Mamba, latent experts ...) that"
            " only `python -m fp4dist.cluster` knows; plan with it, and train a model without `beyond`"
        )


def _check_comm(comm: CommConfig, parallel: ParallelConfig, model: ModelConfig) -> None:
    """A direction that the layout does not have would be asked for in vain."""
    needs = {
        "sp_reduce_scatter": (parallel.sequence_parallel, "parallel.sequence_parallel: true"),
        "pp_forward": (parallel.pp > 1, "parallel.pp above 1"),
        "pp_backward": (parallel.pp > 1, "parallel.pp above 1"),
        "ep_dispatch": (parallel.ep > 1, "parallel.ep above 1"),
        "ep_combine": (parallel.ep > 1, "parallel.ep above 1"),
    }
    for direction, (there, need) in needs.items():
        if comm.wire(direction) is not None and not there:
            raise ValueError(f"comm.{direction}: this run has no such traffic, it needs {need}; leave it out")
    if comm.ep_dispatch is not None and model.moe is not None and model.moe.dispatcher != "alltoall":
        raise ValueError("comm.ep_dispatch needs model.moe.dispatcher: alltoall; the other one gathers all tokens")


def _check_param_gather(comm: CommConfig, engine: EngineConfig, optim: OptimConfig, recipe: Recipe) -> None:
    """It stands between a sharded optimizer and the weights."""
    if comm.wire("param_gather") is None:
        return
    if optim.kind != "adamw" if engine.kind == "megatron" else engine.zero_stage not in (1, 2):
        raise ValueError(
            "comm.param_gather sends the changes of weights that ranks update slices of and all keep: it needs"
            " engine.kind: megatron with optim.kind: adamw, or engine.kind: deepspeed with zero_stage 1 or 2 (3 forgets"
            " what it has gathered)"
        )
    if engine.fp4_param_gather:
        raise ValueError(
            "comm.param_gather sends changes of weights, engine.fp4_param_gather the weights' codes: choose one"
        )
    if recipe.watches_weights or recipe.weights:
        raise ValueError(
            f"comm.param_gather: recipe {recipe.name} acts on weights around the optimizer's step, and a rank's weights"
            " are not the optimizer's own there: leave it out"
        )


def _check_optimizer(optim: OptimConfig, engine: EngineConfig, parallel: ParallelConfig, recipe: Recipe) -> None:
    """What reaches into the optimizer needs its tensors at hand, tensor by tensor."""
    flat = engine.kind == "deepspeed" and engine.zero_stage > 0
    reaching = [b.kind for b in (*recipe.gradients, *recipe.weights)] + ["ema"] * recipe.averages_weights
    if flat and (reaching or recipe.rounds_optimizer_state):
        raise ValueError(
            f"engine.zero_stage = {engine.zero_stage}: recipe {recipe.name} has"
            f" {', '.join(reaching) or 'optimizer_state'}, which work on single tensors, and ZeRO's partitions do not"
            " know where one ends; use engine.kind: megatron, or zero_stage 0"
        )
    if engine.fp4_param_gather and recipe.watches_weights:
        watching = [control.kind for control in recipe.weights] + ["ema"] * recipe.averages_weights
        raise ValueError(
            f"engine.fp4_param_gather: recipe {recipe.name} has {', '.join(watching)}, which looks at whole weights,"
            " and this gather leaves a rank their codes alone; set fp4_param_gather: false"
        )
    if optim.clip_grad > 0 and any(isinstance(control, QRamping) for control in recipe.weights):
        raise ValueError(
            f"optim.clip_grad = {optim.clip_grad}: recipe {recipe.name} has q_ramping, which collects gradients over"
            " several steps and must not have them clipped one by one; set optim.clip_grad: 0"
        )
    if optim.kind == "adafactor" and not (engine.kind == "deepspeed" and engine.zero_stage == 0 and parallel.tp == 1):
        raise ValueError(
            f"optim.kind = adafactor with engine.kind = {engine.kind}"
            f"{f', zero_stage {engine.zero_stage}' if engine.kind == 'deepspeed' else ''}, parallel.tp = {parallel.tp}:"
            " its row and column factors need whole matrices, not flat pieces of them; use engine.kind: deepspeed with"
            " zero_stage 0 and parallel.tp 1"
        )
    if optim.kind != "adamw" and engine.fp4_param_gather:
        raise ValueError(
            f"optim.kind = {optim.kind} with engine.fp4_param_gather: Megatron's distributed optimizer, whose updated"
            " weights it gathers, takes AdamW alone; use adamw, or set fp4_param_gather: false"
        )
    if optim.kind != "adamw" and (recipe.gradients or recipe.weights or recipe.rounds_optimizer_state):
        raise ValueError(
            f"optim.kind = {optim.kind}: recipe {recipe.name} works on AdamW's moments and update; use adamw"
        )


def _check_phases(recipe: Recipe, steps: int, engine: EngineConfig) -> None:
    """What a phase waits for must be measured; its warm-up must fit into what is left of the run."""
    for phase in (p for p in recipe.phases if p.enabled):
        if engine.kind == "deepspeed" and isinstance(phase.trigger, GradNoise):
            raise ValueError(
                f"engine.kind = deepspeed: phase {phase.name} of recipe {recipe.name} waits for the gradient's noise"
                " (trigger: grad_noise), and DeepSpeed reduces gradients into the optimizer's own buffers, which only"
                " its step empties; use engine.kind: megatron, or give the phase a step, last or a manual trigger"
            )
        start, warmup = phase.start(steps), phase.lr.warmup if phase.lr else 0
        if start is not None and start < steps <= start + warmup and warmup >= 1:
            raise ValueError(
                f"phase {phase.name} of recipe {recipe.name} warms the learning rate up for {warmup:g} steps, and"
                f" starts {steps - start} steps before train.steps = {steps}; lower its lr.warmup or start it earlier"
            )


def _check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Every dimension that tensor parallelism splits must divide."""
    for key, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.query_groups),
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
    ):
        if size % parallel.tp:
            raise ValueError(
                f"{key} = {size} is not divisible by parallel.tp = {parallel.tp}; choose a tp that divides it"
            )
    if parallel.sequence_parallel and model.seq_length % parallel.tp:
        raise ValueError(
            f"model.seq_length = {model.seq_length} is not divisible by parallel.tp = {parallel.tp},"
            " which sequence_parallel needs"
        )


def _check_chunks(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Pipeline chunks, context-parallel pieces and experts must come out even."""
    counted = model.num_layers + 2 * parallel.ends_as_layers
    if counted % (parallel.pp * parallel.vpp):
        chunks = f"parallel.pp = {parallel.pp}" + (f" * vpp = {parallel.vpp}" if parallel.vpp > 1 else "")
        ends = " + 2 (parallel.ends_as_layers)" if parallel.ends_as_layers else ""
        raise ValueError(f"model.num_layers = {model.num_layers}{ends} is not divisible by {chunks}")
    if parallel.ends_as_layers and counted == parallel.pp * parallel.vpp:
        raise ValueError(
            f"parallel.ends_as_layers leaves no layer to the first of {counted} chunks; lower parallel.vpp or pp"
        )
    if parallel.cp > 1 and model.seq_length % (2 * parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)):
        raise ValueError(
            f"model.seq_length = {model.seq_length} is not divisible by 2 * parallel.cp = {2 * parallel.cp}"
            f"{f' * tp = {parallel.tp}' if parallel.sequence_parallel else ''}: each context-parallel rank holds an"
            " early and a late piece of the sequence"
        )
    if parallel.ep == 1:
        return
    if model.moe is None:
        raise ValueError(f"parallel.ep = {parallel.ep} needs a model with experts (model.moe)")
    if model.moe.num_experts % parallel.ep:
        raise ValueError(
            f"model.moe.num_experts = {model.moe.num_experts} is not divisible by parallel.ep = {parallel.ep}"
        )
