"""What a training needs on many GPUs, on paper: pure formulas, no measuring, no Ray, no torch.

Sources: memory by ZeRO stage and the volumes exchanged: Rajbhandari et al., arXiv 1910.02054, sections 3, 5 and 7.
Operations a token: Chowdhery et al. (PaLM), arXiv 2204.02311, appendix B; with recomputation one more forward pass, as
in Narayanan et al., arXiv 2104.04473, section 5.1. Activations: Korthikanti et al., arXiv 2205.05198, section 4, here
for a gated MLP and without dropout. Interval between checkpoints: Young, CACM 17(9), 1974, and Daly, Future Generation
Computer Systems 22(3), 2006, equations 20 and 37.

Units: bytes, seconds, operations, tokens; GB is 10^9 bytes, GiB is 2^30.
"""

import math
from dataclasses import dataclass

STAGES = (0, 1, 2, 3)
# DeepSpeed's default of stage3_max_live_parameters: that many stay gathered at a time
MAX_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family.

    Attributes:
        layers: number of layers.
        hidden: width.
        intermediate: width of the gated MLP.
        vocabulary: rows of the embedding.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        tied: whether the head is the embedding.
        qkv_bias: whether queries, keys and values have biases.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * query + 2 * self.hidden * key + self.qkv_bias * (query + 2 * key)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.embedding * (1 if self.tied else 2) + self.layers * layer + self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: an untied embedding is only looked up."""
        return self.parameters - (0 if self.tied else self.embedding)


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and what is around it.

    Attributes:
        peak_flops: operations a second of one GPU.
        memory: bytes of one GPU.
        node_gpus: GPUs of a node.
        intra_bandwidth: bytes a second that a GPU exchanges within its node.
        inter_bandwidth: bytes a second that a GPU exchanges with other nodes.
        storage_bandwidth: bytes a second that all nodes together write.
        efficiency: share of the peak that computing alone reaches.
        overlap: share of the computing behind which exchanging can hide.
        reserved: bytes of a GPU for context, buffers and fragments.
        mtbf_s: mean time between failures that one GPU causes.
        restart_s: from a failure to the next step.
        price_per_hour: of one GPU.
    """

    peak_flops: float
    memory: float
    node_gpus: int
    intra_bandwidth: float
    inter_bandwidth: float
    storage_bandwidth: float
    efficiency: float
    overlap: float
    reserved: float
    mtbf_s: float
    restart_s: float
    price_per_hour: float


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter: of weights, of gradients, and of what the optimizer keeps."""

    weight: int
    gradient: int
    optimizer: int


BF16 = Precision(2, 2, 12)  # float32 weights and two moments of Adam
FP32 = Precision(4, 4, 8)


def flops_per_token(shape: Shape, length: int, *, recompute: bool) -> float:
    """Return the operations of forward and backward (and, with recomputation, another forward pass) for a token.

    6 N + 12 L H Q T without, 8 N + 16 L H Q T with recomputation; the causal mask saves nothing.
    """
    attention = 12 * shape.layers * shape.heads * shape.head_dim * length
    return (6 * shape.multiplied + attention) * (4 / 3 if recompute else 1)


def state_bytes(parameters: int, stage: int, gpus: int, precision: Precision = BF16) -> tuple[float, float, float]:
    """Return the bytes of weights, of gradients and of what the optimizer keeps on one GPU.

    Stage 1 splits what the optimizer keeps, stage 2 also gradients, stage 3 also weights, of which at most
    `MAX_LIVE_PARAMETERS` are whole at a time.
    """
    weights, gradients, optimizer = (
        parameters * each / (gpus if stage >= first else 1)
        for each, first in ((precision.weight, 3), (precision.gradient, 2), (precision.optimizer, 1))
    )
    live = precision.weight * min(parameters, MAX_LIVE_PARAMETERS) * (1 - 1 / gpus) if stage == 3 else 0
    return weights + live, gradients, optimizer


def activation_bytes(shape: Shape, rows: int, length: int, *, recompute: bool, whole_scores: bool = False) -> float:
    """Return the bytes that a forward pass keeps for its backward pass, 2 a number, logits in float32.

    A layer keeps 10 for attention, 4 for norms and 2 + 8 i/h for the gated MLP, in bytes a number of its input, and 5
    bytes a score where attention keeps its scores. With recomputation it keeps its input, and one layer all.

    Args:
        shape: the model.
        rows: sequences at a time.
        length: tokens of each.
        recompute: gradient checkpointing.
        whole_scores: attention that keeps its scores (eager), not a fused one.
    """
    numbers = rows * length * shape.hidden
    layer = numbers * (16 + 8 * shape.intermediate / shape.hidden)
    layer += 5 * rows * shape.heads * length**2 * whole_scores
    layers = shape.layers * 2 * numbers + layer if recompute else shape.layers * layer
    return layers + 4 * rows * length * shape.vocabulary


def exchanged_elements(parameters: int, stage: int, micro_steps: int = 1) -> float:
    """Return how many elements a step sends and receives for each GPU, before the factor (gpus - 1) / gpus.

    Stages 0 and 1: gradients are reduced once a step and spread (or updated weights gathered), 2 P. Stage 2 reduces
    them after every micro-step. Stage 3 gathers the weights for every forward and every backward pass and reduces the
    gradients: 3 P a micro-step.
    """
    return parameters * {0: 2, 1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}[stage]


def exchange_seconds(parameters: int, stage: int, gpus: int, micro_steps: int, hardware: Hardware) -> float:
    """Return the seconds that a step exchanges bfloat16 over the slowest link that is used."""
    slow = hardware.inter_bandwidth if gpus > hardware.node_gpus else hardware.intra_bandwidth
    return 2 * exchanged_elements(parameters, stage, micro_steps) * (gpus - 1) / gpus / slow


def step_seconds(compute_s: float, exchange_s: float, overlap: float) -> float:
    """Return a step's seconds: exchanging hides behind at most the share `overlap` of the computing."""
    return compute_s + max(0.0, exchange_s - overlap * compute_s)


def young_interval(save_s: float, mtbf_s: float) -> float:
    """Return the seconds of work between two checkpoints, sqrt(2 delta M) (Young)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly_interval(save_s: float, mtbf_s: float) -> float:
    """Return the seconds of work between two checkpoints that lose least (Daly, equation 37)."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young_interval(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(save_s: float, mtbf_s: float, restart_s: float, interval_s: float) -> float:
    """Return the share of all time that saving, lost work and restarts take (Daly, equation 20)."""
    whole = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s) / interval_s
    return 1 - 1 / whole


@dataclass(frozen=True)
class Plan:
    """One number of GPUs at one ZeRO stage.

    Attributes:
        gpus: all of them.
        stage: of ZeRO.
        rows: sequences that a GPU takes at a time; 0: not even one fits, and all that follows from it is 0.
        micro_steps: forward and backward passes of a step.
        batch_tokens: tokens of a step over all GPUs.
        states: bytes of weights, of gradients and of the optimizer on a GPU.
        activations: bytes of one row's activations on a GPU with recomputation.
        whole_activations: the same without recomputation.
        memory: bytes used on a GPU.
        exchanged: bytes that a GPU exchanges in a step.
        tokens_per_s: of all GPUs, without losses.
        checkpoint: bytes of a checkpoint.
        save_s: seconds that it takes.
        interval_s: seconds between two of them.
        lost: share of the time that saving, lost work and restarts take.
        price: of 10^9 tokens, losses included.
    """

    gpus: int
    stage: int
    rows: int
    micro_steps: int
    batch_tokens: int
    states: tuple[float, float, float]
    activations: float
    whole_activations: float
    memory: float
    exchanged: float = 0.0
    tokens_per_s: float = 0.0
    checkpoint: float = 0.0
    save_s: float = 0.0
    interval_s: float = 0.0
    lost: float = 0.0
    price: float = 0.0


def plan(
    shape: Shape,
    hardware: Hardware,
    gpus: int,
    stage: int,
    *,
    length: int,
    batch_tokens: int,
    checkpoint_bytes: float,
    recompute: bool,
    exchange_factor: float = 1.0,
) -> Plan:
    """Plan a training with the most rows at a time, a power of two, that fit the memory and the wanted batch.

    Args:
        shape: the model.
        hardware: the GPUs.
        gpus: how many.
        stage: of ZeRO.
        length: tokens of a row.
        batch_tokens: wanted tokens of a step; a step has at least one row a GPU, which may be more.
        checkpoint_bytes: bytes of a checkpoint for each parameter.
        recompute: gradient checkpointing.
        exchange_factor: what is really exchanged, over the formula.
    """
    states = state_bytes(shape.parameters, stage, gpus)
    one, whole = (activation_bytes(shape, 1, length, recompute=each) for each in (True, False))
    used = one if recompute else whole
    room = (hardware.memory - hardware.reserved - sum(states)) // used
    if room < 1:
        return Plan(gpus, stage, 0, 0, 0, states, one, whole, sum(states) + used + hardware.reserved)
    per_gpu = max(1, batch_tokens // (gpus * length))
    rows = 2 ** int(math.log2(min(room, per_gpu)))
    micro_steps = max(1, round(per_gpu / rows))
    tokens = rows * length * micro_steps
    compute_s = flops_per_token(shape, length, recompute=recompute) * tokens / hardware.peak_flops
    compute_s /= hardware.efficiency
    exchange_s = exchange_factor * exchange_seconds(shape.parameters, stage, gpus, micro_steps, hardware)
    tokens_per_s = gpus * tokens / step_seconds(compute_s, exchange_s, hardware.overlap)
    checkpoint = checkpoint_bytes * shape.parameters
    save_s, mtbf_s = checkpoint / hardware.storage_bandwidth, hardware.mtbf_s / gpus
    interval_s = daly_interval(save_s, mtbf_s)
    lost = lost_share(save_s, mtbf_s, hardware.restart_s, interval_s)
    return Plan(
        gpus,
        stage,
        rows,
        micro_steps,
        gpus * tokens,
        states,
        one,
        whole,
        sum(states) + rows * used + hardware.reserved,
        exchange_factor * 2 * exchanged_elements(shape.parameters, stage, micro_steps) * (gpus - 1) / gpus,
        tokens_per_s,
        checkpoint,
        save_s,
        interval_s,
        lost,
        gpus * hardware.price_per_hour / 3600 / (tokens_per_s * (1 - lost)) * 1e9,
    )
