"""The whole configuration of a run: one frozen tree of sections, and the rules between them.

Every field has its unit and meaning in the string below it. Rules that join several sections are
the small functions `_check_*` at the end; each raises `ConfigError` with the field, the values, the
rule and the remedy. Files and overrides are read in `lclm.config_file`.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Packing = Literal["exact", "concat", "best-fit"]


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names field, value, rule and remedy."""


class Section(BaseModel):
    """Base of all sections: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """Where a run lives."""

    dir: str
    """Run folder: resolved config, metrics, checkpoints, tensorboard."""


class RopeScaling(Section):
    """Frequency scaling of the rotary embedding that a model was trained with."""

    type: Literal["llama3", "linear", "ntk", "yarn"]
    """`llama3`: Llama-3.1's smooth band scaling. `linear`: position interpolation. `ntk`: a base
    raised so that the slowest frequency is `factor` times slower. `yarn`: band scaling by pair,
    with sharper attention (arXiv 2309.00071)."""
    factor: float = Field(gt=1.0)
    """How many times slower the scaled frequencies turn."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3` only: wavelengths above original_length / low_freq_factor are scaled in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3` only: wavelengths below original_length / high_freq_factor are left alone."""
    original_length: int = Field(default=8192, gt=0)
    """`llama3`, `yarn`: context length in tokens of the unscaled model."""
    beta_fast: float = Field(default=32.0, gt=0)
    """`yarn` only: frequencies that turn more often over original_length are left alone."""
    beta_slow: float = Field(default=1.0, gt=0)
    """`yarn` only: frequencies that turn less often over original_length are scaled in full."""


class ModelConfig(Section):
    """Architecture. The sizes are those of `config.json` in a Hugging Face Llama folder."""

    family: Literal["llama"] = "llama"
    """Model family; decides names and layout in conversion."""
    num_layers: int = Field(gt=0)
    """Transformer layers."""
    hidden_size: int = Field(gt=0)
    """Width D of the residual stream."""
    ffn_hidden_size: int = Field(gt=0)
    """Width F of the SwiGLU feed-forward."""
    num_attention_heads: int = Field(gt=0)
    """Query heads N."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads K; divides num_attention_heads."""
    head_dim: int = Field(default=0, ge=0)
    """Head size H; 0 means hidden_size / num_attention_heads."""
    vocab_size: int = Field(gt=0)
    """Rows V of the embedding; at least the tokenizer's vocabulary."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon inside the RMS norms."""
    tie_embeddings: bool = False
    """Whether the output layer is the transposed input embedding."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights (norms start at one)."""
    init_from: str = ""
    """Checkpoint folder whose weights (only) start this run; empty: random initial weights."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequency scaling; none for Llama 2 and Llama 3."""

    @property
    def head_size(self) -> int:
        """Head size H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def recorded_fields(self) -> dict[str, Any]:
        """The fields that a checkpoint records: all but `init_from`."""
        return self.model_dump(exclude={"init_from"})

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        qkv = (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_size
        attention = self.hidden_size * (qkv + self.num_attention_heads * self.head_size)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        tables = 1 if self.tie_embeddings else 2
        return (
            self.num_layers * layer + self.hidden_size + tables * self.vocab_size * self.hidden_size
        )


class ParallelConfig(Section):
    """Degrees of parallelism. Data parallelism takes what is left of the world."""

    tp: int = Field(default=1, gt=0)
    """Tensor parallel size; above 1 sequence parallelism is on."""
    pp: int = Field(default=1, gt=0)
    """Pipeline parallel size."""
    cp: int = Field(default=1, gt=0)
    """Context parallel size: ranks that share one row."""
    cp_layout: Literal["auto", "zigzag", "contiguous"] = "auto"
    """How a row's tokens are dealt to the context ranks. `auto`: by its documents, each row anew,
    so that every rank has equal tokens and nearly equal attention and few keys travel. `zigzag`:
    an early and a late part for each rank, balanced only if the row is one document."""
    cp_comm: Literal["auto", "gather", "ring", "ulysses", "ulysses_ring"] = "auto"
    """How keys meet queries. `ring`: only keys that some query of a rank sees travel to it, under
    the attention on those before. `ulysses`: all-to-all, each rank attends with some heads over the
    whole row. `ulysses_ring`: both, see `cp_ulysses`. `gather`: every rank collects all keys.
    `auto`: for each stage what some of its rows are predicted to be fast with, by rates measured
    at the start and kept in the run folder (context_rates.json); the choice is written into
    config.resolved.toml."""
    cp_ulysses: int = Field(default=0, ge=0)
    """`ulysses_ring` only: how many neighbouring context ranks share heads (best those of a node);
    the ring goes over cp / cp_ulysses."""


class TrainConfig(Section):
    """How steps are computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank; `auto` takes CUDA where there is one. Decides NCCL or gloo."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Parameter and activation type; `auto`: bf16 on CUDA, fp32 on CPU. Gradients add in fp32."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps one tensor per layer and recomputes the layer in the backward pass."""
    max_steps: int = Field(default=0, ge=0)
    """Stop after this many steps over all stages; 0: run every stage. Schedules do not change."""
    deterministic: bool = False
    """Let "auto" of `parallel.cp_layout` and `cp_comm` go by published rates instead of measured
    ones, so that a run in another folder shares its rows out alike: equal sums on equal ranks."""
    loss_chunk_tokens: int = Field(default=2048, gt=0)
    """Tokens whose logits exist at one time."""


class OptimizerConfig(Section):
    """AdamW (decoupled weight decay), moments in fp32."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay per unit of learning rate."""
    decay_norms: bool = False
    """Whether norm weights decay too (as in ProLong's own runs)."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


class DataConfig(Section):
    """What holds for every domain."""

    tokenizer: str = ""
    """Tokenizer file or folder; its files travel in every checkpoint. Empty: those of the
    checkpoint that the run starts from."""
    max_epochs: int = Field(default=4, gt=0)
    """How often a domain may be repeated over the whole run before that is an error."""
    held_out_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of each domain's documents that is never trained on."""
    allow_changed: bool = False
    """Whether a run may go on from a checkpoint with other data, seed, shares, packing or held-out
    share than it was trained with; documents may then come twice."""


class MixtureEntry(Section):
    """One part of a stage's data."""

    prefix: str
    """Indexed file without its ending: `<prefix>.bin`, `<prefix>.idx`; or its URL."""
    packing: Packing
    """`exact`: equal pieces cut from long documents. `concat`: documents one after another.
    `best-fit`: whole documents, what they leave of a row is padding without labels."""
    piece_length: int = Field(default=0, ge=0)
    """`exact` only: tokens of a piece, dividing the stage's seq_length; 0: seq_length."""
    share: float | tuple[float, float]
    """Share of the stage's tokens, above 0: constant, or at the stage's start and at its end,
    changing linearly between them. The shares of a stage add up to 1 at both."""

    @field_validator("share", mode="before")
    @classmethod
    def _check_share(cls, share: Any) -> Any:
        ends = share if isinstance(share, (list, tuple)) else (share, share)
        is_number = all(type(end) in (int, float) for end in ends)
        if not (len(ends) == 2 and is_number and all(0 <= end <= 1 for end in ends) and any(ends)):
            raise PydanticCustomError(
                "share",
                "a share is a number above 0 and at most 1, or [start, end] from 0 to 1 with one "
                "of them above 0; leave an entry without share out",
            )
        return share

    @property
    def share_ends(self) -> tuple[float, float]:
        """Share at the stage's start and at its end."""
        return self.share if isinstance(self.share, tuple) else (self.share, self.share)


class StageConfig(Section):
    """One stage of training. The hand-over from stage to stage is automatic."""

    name: str
    """Shown in metrics."""
    seq_length: int = Field(gt=1)
    """Tokens T of a row."""
    rope_base: float = Field(gt=1)
    """Base of the rotary frequencies."""
    tokens: int = Field(gt=0)
    """Tokens of the whole stage; a multiple of tokens_per_step."""
    tokens_per_step: int = Field(gt=0)
    """Tokens of one optimizer step over all ranks; a multiple of seq_length."""
    document_mask: bool = True
    """Whether attention and positions stay within a document."""
    optimizer_state: Literal["carry", "fresh"] = "carry"
    """Whether the moments of the stage before go on or start at zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr: float = Field(gt=0)
    """Highest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the stage (not for `constant`)."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the stage's steps over which the learning rate rises from zero."""
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """Where the rows come from."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        return self.tokens // self.tokens_per_step

    @property
    def rows_per_step(self) -> int:
        """Rows of one global batch."""
        return self.tokens_per_step // self.seq_length

    @property
    def num_rows(self) -> int:
        """Rows of the whole stage."""
        return self.num_steps * self.rows_per_step


class ValidationConfig(Section):
    """Loss on held-out documents."""

    rows_per_domain: int = Field(default=0, ge=0)
    """Rows read from each domain of the stage; 0: no validation."""
    every_steps: int = Field(default=0, ge=0)
    """Steps between validations; one is always made at the end of a stage and of the run."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; one is always written at the end of a stage and of the run."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints of this run that stay; those at the end of a stage always stay. Later
    steps of work that is not gone on with are never deleted: a start moves them to
    `<run.dir>/abandoned-<n>`."""
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto`: go on from the checkpoint that the run folder's `latest` names, or from the newest
    whole one where `latest` is lost; start if there is none. `required`: only go on. `never`: start
    anew; what is there is moved aside."""


class MetricsConfig(Section):
    """What is recorded beside the console line and metrics.jsonl."""

    tensorboard: bool = True
    """Whether to write event files to the run folder's `tensorboard`."""


class Config(Section):
    """A run."""

    seed: int = Field(default=1234, ge=0)
    """Seed of initial weights and row order."""
    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    stage: tuple[StageConfig, ...] = Field(min_length=1)
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def prefixes(self) -> list[str]:
        """Every prefix of the run's data once, in order of first use."""
        return list(dict.fromkeys(e.prefix for stage in self.stage for e in stage.mixture))

    @property
    def num_steps(self) -> int:
        """Optimizer steps over all stages, before `train.max_steps`."""
        return sum(stage.num_steps for stage in self.stage)


def check_config(config: Config) -> None:
    """Check the rules that join several fields. Raises `ConfigError`."""
    _check_model(config)
    _check_context(config)
    _check_validation(config)
    for number, stage in enumerate(config.stage):
        _check_stage(config, number, stage)
        check_mixture(f"stage.{number}", stage.mixture, stage.seq_length)


def check_mixture(where: str, mixture: Sequence[MixtureEntry], seq_length: int) -> list[int]:
    """Check a stage's mixture and return the piece length of each entry, in tokens.

    Args:
        where: name of the stage in messages, as in `stage.0`.
        mixture: the entries.
        seq_length: tokens of a row.

    Raises:
        ConfigError: the shares do not add up to 1 within 1e-6 at the stage's start and end, a piece
            length has no effect or does not divide seq_length, or entries of one prefix have two
            packings, are concatenated or best-fit twice or cut twice to the same length.
    """
    is_constant = all(start == end for start, end in (e.share_ends for e in mixture))
    for place, name in enumerate(("start", "end")):
        total = sum(entry.share_ends[place] for entry in mixture)
        if abs(total - 1.0) > 1e-6:
            at = "" if is_constant else f" at the stage's {name}"
            raise ConfigError(
                f"{where}.mixture: the shares add up to {total:.6f}{at}; they must add up to 1: "
                "change one of them"
            )
    piece_lengths: list[int] = []
    seen: dict[str, list[tuple[str, int]]] = {}
    for number, entry in enumerate(mixture):
        name = f"{where}.mixture.{number}"
        if entry.packing != "exact" and entry.piece_length:
            raise ConfigError(
                f"{name}.piece_length({entry.piece_length}) has no effect with packing "
                f"{entry.packing}; remove it"
            )
        length = entry.piece_length or seq_length
        if seq_length % length:
            raise ConfigError(
                f"{name}.piece_length({length}) must divide seq_length({seq_length}); change one "
                "of them"
            )
        others = seen.setdefault(entry.prefix, [])
        if others and others[0][0] != entry.packing:
            raise ConfigError(
                f"{name}.packing({entry.packing}): an entry before has prefix({entry.prefix}) with "
                f"packing({others[0][0]}); all entries of one prefix in a stage share one packing: "
                "change one of them"
            )
        if (entry.packing, length) in others:
            raise ConfigError(
                f"{name}: prefix({entry.prefix}) with packing({entry.packing}) and pieces of "
                f"{length} tokens is given twice; add the shares into one entry"
            )
        others.append((entry.packing, length))
        piece_lengths.append(length)
    return piece_lengths


def check_world(config: Config, world_size: int) -> int:
    """Check the layout against the number of processes and return the data parallel size.

    Raises:
        ConfigError: if tp * pp * cp does not divide the world, or rows do not divide by dp.
    """
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % ranks:
        raise ConfigError(
            f"parallel: tp({parallel.tp}) * pp({parallel.pp}) * cp({parallel.cp}) = {ranks} does "
            f"not divide the world size {world_size}; change one of them or start a multiple of "
            f"{ranks} processes"
        )
    dp = world_size // ranks
    for number, stage in enumerate(config.stage):
        if stage.rows_per_step % dp:
            raise ConfigError(
                f"stage.{number}: tokens_per_step({stage.tokens_per_step}) / "
                f"seq_length({stage.seq_length}) = {stage.rows_per_step} rows a step cannot be "
                f"dealt equally to {dp} data parallel ranks (world {world_size} / {ranks}); "
                "change tokens_per_step or the number of processes"
            )
    return dp


def check_heads(model: ModelConfig) -> None:
    """Check that the heads divide as they must. Raises `ConfigError`."""
    if model.num_attention_heads % model.num_kv_heads:
        raise ConfigError(
            f"model: num_kv_heads({model.num_kv_heads}) must divide "
            f"num_attention_heads({model.num_attention_heads}); change one of them"
        )
    if not model.head_dim and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model: num_attention_heads({model.num_attention_heads}) must divide "
            f"hidden_size({model.hidden_size}), or set model.head_dim"
        )


def _check_model(config: Config) -> None:
    model, parallel = config.model, config.parallel
    check_heads(model)
    if model.head_size % 2:
        raise ConfigError(f"model: head size {model.head_size} must be even; set model.head_dim")
    for name in ("num_attention_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(model, name)
        if value % parallel.tp:
            raise ConfigError(
                f"model.{name}({value}) must be divisible by parallel.tp({parallel.tp}); "
                "change parallel.tp" + (" or pad the vocabulary" if name == "vocab_size" else "")
            )
    if model.num_layers % parallel.pp:
        raise ConfigError(
            f"model.num_layers({model.num_layers}) must be divisible by "
            f"parallel.pp({parallel.pp}); change parallel.pp"
        )


def _check_validation(config: Config) -> None:
    validation = config.validation
    if validation.every_steps and not validation.rows_per_domain:
        raise ConfigError(
            f"validation.every_steps({validation.every_steps}) has no effect while "
            "validation.rows_per_domain is 0; set both or none"
        )
    if validation.rows_per_domain and not config.data.held_out_fraction:
        raise ConfigError(
            f"validation.rows_per_domain({validation.rows_per_domain}) needs documents that are "
            "held out; set data.held_out_fraction above 0"
        )


def _check_context(config: Config) -> None:
    model, parallel = config.model, config.parallel
    cp, inner = parallel.cp, parallel.cp_ulysses
    if parallel.cp_comm == "ulysses_ring":
        if cp % max(1, inner) or not 1 < inner < cp:
            raise ConfigError(
                f"parallel.cp_ulysses({inner}) must divide parallel.cp({cp}) and lie between 1 and "
                "it with cp_comm 'ulysses_ring'; set it, or use cp_comm 'ring' or 'ulysses'"
            )
    elif inner:
        raise ConfigError(
            f"parallel.cp_ulysses({inner}) has no effect with cp_comm '{parallel.cp_comm}'; remove "
            "it or use cp_comm 'ulysses_ring'"
        )
    sharing = cp if parallel.cp_comm == "ulysses" else inner
    heads = model.num_attention_heads // parallel.tp
    if sharing and heads % sharing:
        raise ConfigError(
            f"parallel: {sharing} context ranks share the heads with cp_comm "
            f"'{parallel.cp_comm}', which does not divide model.num_attention_heads"
            f"({model.num_attention_heads}) / tp({parallel.tp}) = {heads}; use cp_comm 'ring', or "
            "'ulysses_ring' with another cp_ulysses"
        )


def _check_stage(config: Config, number: int, stage: StageConfig) -> None:
    where, parallel = f"stage.{number}", config.parallel
    chunks = parallel.cp * (2 if parallel.cp_layout == "zigzag" and parallel.cp > 1 else 1)
    if stage.seq_length % (chunks * parallel.tp):
        raise ConfigError(
            f"{where}.seq_length({stage.seq_length}) must be divisible by {chunks * parallel.tp}: "
            f"{chunks} chunks of the {parallel.cp_layout} layout at cp={parallel.cp}, each split "
            f"over tp={parallel.tp}; change seq_length or the layout"
        )
    if stage.tokens_per_step % stage.seq_length:
        raise ConfigError(
            f"{where}.tokens_per_step({stage.tokens_per_step}) must be a multiple of "
            f"seq_length({stage.seq_length}); change one of them"
        )
    if stage.tokens % stage.tokens_per_step:
        near = max(1, round(stage.tokens / stage.tokens_per_step)) * stage.tokens_per_step
        raise ConfigError(
            f"{where}.tokens({stage.tokens}) must be a multiple of "
            f"tokens_per_step({stage.tokens_per_step}); the nearest is {near}"
        )
    if stage.schedule != "constant" and stage.min_lr > stage.lr:
        raise ConfigError(f"{where}.min_lr({stage.min_lr}) is above lr({stage.lr}); lower it")
    if stage.schedule == "constant" and stage.min_lr:
        raise ConfigError(f"{where}.min_lr({stage.min_lr}) has no effect when constant; remove it")
