"""The supported architectures as a table: what a Hugging Face config means, and how its tensors map to Megatron's.

A new decoder of the same family is a new row of ARCHITECTURES; nothing else reads the model_type.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig


class UnsupportedModel(ValueError):
    """Raised for a model, or a split of it over ranks, that cannot be trained."""


class Layout(Enum):
    """How Hugging Face tensors lie in one Megatron tensor, and how that is cut over tensor parallel ranks."""

    REPLICATED = auto()
    """The same on every rank: norms."""
    ROWS = auto()
    """Cut by rows, padded at the end: embedding and output head."""
    COLUMNS = auto()
    """Cut by columns: the projections back to the hidden size."""
    GROUPED_QKV = auto()
    """q, k, v interleaved by query group, cut by groups."""
    GATE_UP = auto()
    """A rank's rows of the gate, then its rows of the up projection."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the traits of an architecture."""

    qkv_bias: bool = False
    qk_norm: bool = False
    mixture: bool = False
    """Each layer has experts and a router in place of one MLP."""
    required: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """By attribute of the config, the values for which the layers built here are right; it may be absent."""


_COMMON: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False, None),
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(required={**_COMMON, "attention_bias": (False,), "pretraining_tp": (1, None)}),
    "qwen2": Architecture(qkv_bias=True, required=_COMMON),
    "qwen3": Architecture(qk_norm=True, required={**_COMMON, "attention_bias": (False,)}),
    "qwen3_moe": Architecture(
        qk_norm=True,
        mixture=True,
        required={**_COMMON, "attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
}
ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling of rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Experts:
    """The experts of each layer. The router's softmax is over all experts; a token goes to the likeliest ones, none is
    dropped, and their outputs are weighted by the softmax."""

    count: int
    chosen: int
    normalised: bool
    """The weights of a token's experts are divided by their sum."""


@dataclass(frozen=True)
class Shape:
    """Everything about one checkpoint that the trainer needs to know, parsed from its config.json."""

    architecture: Architecture
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP, or of each expert."""
    experts: Experts | None
    attention_heads: int
    query_groups: int
    head_size: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_embeddings: bool

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Return the vocabulary size, padded so that it divides evenly over ranks. Padding is in no softmax."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size


def read_shape(model_path: Path, *, trust_remote_code: bool = False) -> Shape:
    """Return the shape in config.json. Raises UnsupportedModel, which names what is allowed."""
    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UnsupportedModel(f"{model_path}: config.json cannot be read: {error}") from error
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        allowed = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(
            f"{model_path}: model_type {config.model_type} cannot be trained; supported are {allowed}"
        )
    for name, allowed_values in architecture.required.items():
        value = getattr(config, name, allowed_values[0])
        if value not in allowed_values:
            raise UnsupportedModel(
                f"{model_path}: {name} must be {allowed_values[0]} for {config.model_type}, not {value}"
            )
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModel(f"{model_path}: rope type {rope['rope_type']} is not supported; use one of {ROPE_TYPES}")
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Llama3Rope(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    experts = None
    if architecture.mixture:
        experts = Experts(config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
    return Shape(
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size if experts is None else config.moe_intermediate_size,
        experts=experts,
        attention_heads=config.num_attention_heads,
        query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        tied_embeddings=config.tie_word_embeddings,
    )


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: tuple[str, ...]
    """Its names: in local layers, and in Transformer Engine's, where a norm is part of the linear layer after it."""
    hf: tuple[str, ...]
    layout: Layout
    expert: int | None = None
    """Index of the layer's expert that it belongs to; None if to none."""


def mappings(shape: Shape) -> Iterator[Mapping]:
    """Yield every parameter of the model, in the order of the layers."""
    yield Mapping(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Layout.ROWS)
    for layer in range(shape.layers):
        hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}"
        yield Mapping(
            (f"{megatron}.input_layernorm.weight", f"{megatron}.self_attention.linear_qkv.layer_norm_weight"),
            (f"{hf}.input_layernorm.weight",),
            Layout.REPLICATED,
        )
        for kind in ("weight", "bias") if shape.architecture.qkv_bias else ("weight",):
            yield Mapping(
                (f"{megatron}.self_attention.linear_qkv.{kind}",),
                tuple(f"{hf}.self_attn.{name}_proj.{kind}" for name in "qkv"),
                Layout.GROUPED_QKV,
            )
        if shape.architecture.qk_norm:
            for name in "qk":
                yield Mapping(
                    (f"{megatron}.self_attention.{name}_layernorm.weight",),
                    (f"{hf}.self_attn.{name}_norm.weight",),
                    Layout.REPLICATED,
                )
        yield Mapping(
            (f"{megatron}.self_attention.linear_proj.weight",), (f"{hf}.self_attn.o_proj.weight",), Layout.COLUMNS
        )
        yield Mapping(
            (f"{megatron}.pre_mlp_layernorm.weight", f"{megatron}.mlp.linear_fc1.layer_norm_weight"),
            (f"{hf}.post_attention_layernorm.weight",),
            Layout.REPLICATED,
        )
        if shape.experts is None:
            yield from _mlp((f"{megatron}.mlp.linear_fc{{}}.weight",), f"{hf}.mlp")
            continue
        yield Mapping((f"{megatron}.mlp.router.weight",), (f"{hf}.mlp.gate.weight",), Layout.REPLICATED)
        for expert in range(shape.experts.count):
            names = (
                f"{megatron}.mlp.experts.local_experts.{expert}.linear_fc{{}}.weight",
                f"{megatron}.mlp.experts.linear_fc{{}}.weight{expert}",
            )
            yield from _mlp(names, f"{hf}.mlp.experts.{expert}", expert)
    yield Mapping(("decoder.final_layernorm.weight",), ("model.norm.weight",), Layout.REPLICATED)
    if not shape.tied_embeddings:
        yield Mapping(("output_layer.weight",), ("lm_head.weight",), Layout.ROWS)


def _mlp(megatron: tuple[str, ...], hf: str, expert: int | None = None) -> Iterator[Mapping]:
    """Yield the parameters of a gated MLP; `megatron` has a {} for the number of each of its two layers."""
    first, second = (tuple(name.format(number) for name in megatron) for number in (1, 2))
    yield Mapping(first, (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"), Layout.GATE_UP, expert)
    yield Mapping(second, (f"{hf}.down_proj.weight",), Layout.COLUMNS, expert)
