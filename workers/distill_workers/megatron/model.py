"""The student as a Megatron GPTModel that returns hidden states; logprobs.py applies the output head, in chunks."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from distill_api.spec.job_spec import Recompute
from distill_workers.megatron import pipeline
from distill_workers.megatron.architecture import Layout, Shape, UnsupportedModel
from distill_workers.megatron.context import causal_attention, gather_sequence
from distill_workers.megatron.parallel import Ranks


class HiddenStateModel(GPTModel):  # type: ignore[misc]  # megatron-core carries no types
    """A stage of a GPTModel; the last stops after the final norm: [batch, sequence] -> [sequence, batch, hidden]."""

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output head, padding included: [vocab / tensor_parallel, hidden]. Last stage only."""
        tied_here = self.share_embeddings_and_output_weights and self.pre_process
        weight: torch.Tensor = self.embedding.word_embeddings.weight if tied_here else self.output_layer.weight
        return weight


class CausalAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, in place of Megatron's, which builds [heads, s, s].

    Sequences are padded on the right, so a real token never sees padding and no mask is needed; the outputs at padding
    are finite and never used.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **unused: Any) -> None:
        super().__init__()
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        self.context_group = pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **unused: Any
    ) -> torch.Tensor:
        """query [s, b, heads, head], key and value [s, b, groups, head] -> [s, b, heads * head]; s: of this rank."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        over_ranks = self.context_group.size() > 1
        if over_ranks:
            k, v = (gather_sequence(x, self.context_group) for x in (k, v))
        k, v = (x.repeat_interleave(self.queries_per_group, dim=1) for x in (k, v))
        if over_ranks:
            out = causal_attention(q, k, v, self.context_group)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class Norm(torch.nn.RMSNorm):
    """Megatron's norm of the local layers, which refuses sequence parallelism: there each rank sees other tokens, and
    the mark makes finalize_model_grads add up the gradients of the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark


def check_experts(shape: Shape, *, on_gpu: bool, with_engine: bool) -> None:
    """Raise UnsupportedModel for experts on a GPU without Transformer Engine's grouped layers: one after the other, as
    Megatron's SequentialMLP has them, 128 experts of each layer are thousands of tiny kernels."""
    if on_gpu and shape.experts is not None and not with_engine:
        raise UnsupportedModel(
            f"a mixture of {shape.experts.count} experts cannot be trained on GPUs here: Transformer Engine is not "
            "installed (or trainer.lora is set, which does without); train a dense student, or use an image that has it"
        )


def build_model(
    shape: Shape,
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    seed: int,
    fused: bool = True,
    recompute: Recompute = Recompute.AUTO,
    sequence_parallel: bool = False,
) -> HiddenStateModel:
    """This stage on this rank's device, weights not yet set (see checkpoint/hugging_face.py). Raises UnsupportedModel
    on a bad split.

    fused: with Transformer Engine's layers, where it is installed. A mixture of experts is always sequence parallel:
    Megatron trains none without, and then each token is routed once, on one tensor parallel rank.
    """
    pipeline.check(shape, ranks)
    for name, size in (
        ("attention heads", shape.attention_heads),
        ("key-value heads", shape.query_groups),
        ("the MLP's width" if shape.experts is None else "an expert's width", shape.ffn_hidden_size),
    ):
        if size % ranks.tensor_size:
            raise UnsupportedModel(f"parallelism.tensor {ranks.tensor_size} does not divide {name} ({size})")
    if shape.vocab_size < ranks.tensor_size**2:
        raise UnsupportedModel(f"{shape.vocab_size} tokens are too few for parallelism.tensor {ranks.tensor_size}")
    on_gpu = ranks.device.type == "cuda"
    with_engine = fused and on_gpu and importlib.util.find_spec("transformer_engine") is not None
    check_experts(shape, on_gpu=on_gpu, with_engine=with_engine)
    if on_gpu:
        model_parallel_cuda_manual_seed(seed)
    else:
        initialize_rng_tracker(inference_rng_tracker=True)
    config = _transformer_config(
        shape, ranks, dtype, recompute, on_gpu=on_gpu, with_engine=with_engine, sequence_parallel=sequence_parallel
    )
    if with_engine:
        layers: Any = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        )
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = Norm
        # megatron-core 0.16.1 asks for it where Transformer Engine is not installed, and does not define it there.
        vars(moe_utils).setdefault("te_general_gemm", None)
        layers = TransformerBlockSubmodules([layer] * (shape.layers // ranks.pipeline_size), layer_norm=Norm)
    model: HiddenStateModel = HiddenStateModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=shape.padded_vocab_size(ranks.tensor_size),
        max_sequence_length=shape.max_positions,
        pre_process=ranks.pipeline_rank == 0,
        post_process=ranks.is_last_pipeline_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    model.to(device=ranks.device, dtype=dtype)
    if shape.rope_scaling is not None:
        # GPTModel passes on the factor alone.
        rope = model.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=shape.rope_scaling.factor,
            low_freq_factor=shape.rope_scaling.low_freq_factor,
            high_freq_factor=shape.rope_scaling.high_freq_factor,
            original_max_position_embeddings=shape.rope_scaling.original_max_position_embeddings,
        )
    _mark_shards(model, shape, ranks)
    return model


RECOMPUTATION: dict[Recompute, dict[str, Any]] = {
    Recompute.NONE: {},
    # The attention keeps nothing of [sequence, sequence], so the MLPs' are the largest activations. Each of the two
    # leaves layers of the other kind alone.
    Recompute.SELECTIVE: {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    Recompute.FULL: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _transformer_config(
    shape: Shape,
    ranks: Ranks,
    dtype: torch.dtype,
    recompute: Recompute,
    *,
    on_gpu: bool,
    with_engine: bool,
    sequence_parallel: bool,
) -> TransformerConfig:
    experts: dict[str, Any] = {}
    if shape.experts is not None:
        sequence_parallel = sequence_parallel or ranks.tensor_size > 1
        experts = {
            "num_moe_experts": shape.experts.count,
            "moe_ffn_hidden_size": shape.ffn_hidden_size,
            "moe_router_topk": shape.experts.chosen,
            # The softmax of the chosen logits alone is that of all, divided by the sum over the chosen.
            "moe_router_pre_softmax": not shape.experts.normalised,
            "moe_router_dtype": "fp32",
            # The divergence from the teacher is the loss. A term that evens out the experts' load would pull the
            # routing of an already trained model away from where the teacher's tokens are best predicted.
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": with_engine,
            "expert_model_parallel_size": ranks.expert_size,
        }
    if recompute is Recompute.AUTO:
        # Activations of a long response do not fit without; a small model on a CPU has no use for it.
        recompute = Recompute.FULL if on_gpu else Recompute.NONE
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.attention_heads,
        num_query_groups=shape.query_groups,
        kv_channels=shape.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=shape.architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks.tensor_size,
        pipeline_model_parallel_size=ranks.pipeline_size,
        sequence_parallel=sequence_parallel,
        context_parallel_size=ranks.context_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Micro-batches differ in length: a stage tells the next one the shape before the tensor.
        variable_seq_lengths=ranks.pipeline_size > 1,
        # variable_seq_lengths requires it, also of a model without experts.
        moe_token_dispatcher_type="alltoall",
        # A stage does not keep what it has sent: backward needs the graph alone.
        deallocate_pipeline_outputs=True,
        bf16=dtype == torch.bfloat16,
        # The gradient is a sum over tokens until finalize_model_grads divides it by their number in the global batch.
        calculate_per_token_loss=True,
        # Every weight is read from the checkpoint.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        # Fused kernels of Apex or a compiler; none is needed for correctness.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
        **RECOMPUTATION[recompute],
        **experts,
    )


def _mark_shards(model: HiddenStateModel, shape: Shape, ranks: Ranks) -> None:
    """Tell Megatron which parameters are shards: its initialisation would have, and the gradient norm depends on it."""
    parameters = dict(model.named_parameters())
    for mapping in pipeline.local_parameters(shape, ranks):
        parameter = next(parameters[name] for name in mapping.megatron if name in parameters)
        if mapping.layout is not Layout.REPLICATED:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = 1 if mapping.layout is Layout.COLUMNS else 0
            parameter.partition_stride = 1
