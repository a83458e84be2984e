"""How small each value of a configuration becomes in a tiny model, by its name: a table for `structures`."""

from __future__ import annotations

from typing import Any

LAYERS = 8
WIDTH = 32
VOCABULARY = 97
POSITIONS = 256
WINDOW = 8


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _sizes(*sizes: tuple[int, str]) -> dict[str, Any]:
    return {name: size for size, names in sizes for name in names.split()}


#: Values that a configuration derives from others, or lists of one entry for each of many layers: left out.
DERIVED = _names(
    """
    layer_types mlp_layer_types moe_layers no_rope_layers full_attn_idxs layers_block_type attention_layers
    transformers_version architectures dtype torch_dtype hybrid_override_pattern indexer_types layer_rope_theta
    num_attention_heads_per_layer block_types kv_source_layers rope_scaling_layers hybrid_layer_ids local_layer_ids
    mtp_layers_block_type mtp_local_layer_ids activation_sparsity_pattern kv_sharing_modes num_layers_per_stack
    mtp_layer_types mtp_mlp_layer_types n_recurrent_layers per_layer_config
    """
)

#: Parts of a configuration that describe a decoder of text.
TEXT_PARTS = _names(
    "text_config llm_config language_config decoder decoder_config language_model_config thinker_config"
)


#: Of a decoder.
TEXT: dict[str, Any] = _sizes(
    (VOCABULARY, "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (
        WIDTH,
        """
            hidden_size d_model n_embd dim_model emb_dim embed_dim embedding_dim word_embed_proj_dim
            embedding_size input_embedding_size output_embedding_size aux_hidden_size
            cross_attention_hidden_size moe_hidden_size lru_width attention_hidden_size backbone_hidden_size
        """,
    ),
    # With few heads of an indexer most keys score zero alike, and which are chosen depends on how many there are.
    (16, "index_n_heads"),
    (
        48,
        """
            intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff ffn_hidden_size dff dim_ff d_inner
            n_inner intermediate_size_mlp dense_intermediate_size mlp_dim feed_forward_size
        """,
    ),
    (
        LAYERS,
        """
            num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks layers
            encoder_layers num_encoder_layers
        """,
    ),
    (
        4,
        """
            num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
            num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads
            num_sliding_attention_heads linear_num_heads num_experts n_routed_experts num_local_experts
            moe_num_experts rotary_dim time_step_rank mamba_dt_rank mamba_chunk_size chunk_size laurel_rank
            adapter_rank block_size
        """,
    ),
    (
        2,
        """
            num_key_value_heads swa_num_key_value_heads kv_n_heads
            num_kv_heads num_global_key_value_heads num_experts_per_tok moe_topk moe_k moe_top_k
            num_experts_per_token zero_expert_num linear_num_key_heads linear_num_value_heads
            o_groups n_groups mamba_expand expand type_vocab_size
        """,
    ),
    (
        1,
        """
            n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
            first_k_dense_replace moe_layer_start_index mamba_n_groups mamba_ngroups n_mamba_heads
        """,
    ),
    (0, "num_nextn_predict_layers num_mtp_layers"),
    (LAYERS - 1, "moe_layer_end_index"),
    (3, "max_window_layers"),
    (
        POSITIONS,
        """
            max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_target_positions
            max_source_positions context_length original_max_position_embeddings
        """,
    ),
    (
        WINDOW,
        """
            sliding_window sliding_window_size attention_window_size window_size attention_chunk_size
            keep_window_size floor_scale index_topk head_dim swa_head_dim global_head_dim d_kv
            attention_head_size d_head dim_head kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim
            index_head_dim o_lora_rank query_pre_attn_scalar linear_key_head_dim linear_value_head_dim
            hidden_size_per_layer_input d_rel mamba_d_state mamba_n_heads mamba_d_head state_size ssm_state_size
            mamba_num_heads mamba_head_dim mamba_headdim
        """,
    ),
    (16, "local_attention q_lora_rank kv_lora_rank qk_head_dim rel_extent router_hidden_size"),
    (
        24,
        """
            moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
            shared_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size
            share_expert_dim
        """,
    ),
    (64, "mamba_d_ssm log_scaling_n_floor"),
)

#: Of everything else: towers of images and sounds, and what lies between them and the decoder.
TOWER: dict[str, Any] = {
    **{
        name: size
        for name, size in TEXT.items()
        if name
        not in ("attention_chunk_size", "sliding_window", "chunk_size", "block_size", "expand", "floor_scale")
    },
    **_sizes(
        (
            WIDTH,
            """
            out_hidden_size output_dim projection_dim text_hidden_size encoder_hidden_size decoder_hidden_size
            projector_hidden_size projection_hidden_size projector_input_dim projector_output_dim
            vision_output_dim hidden_dim vision_hidden_size image_text_hidden_size projection_hidden_dim
            image_token_embed_dim patch_embed_hidden_size input_size
        """,
        ),
        (48, "projection_intermediate_size alignment_intermediate_size merged_hidden_size"),
        (
            2,
            """
            num_hidden_layers n_layer n_layers num_layers depth decoder_layers num_blocks layers encoder_layers
            resampler_depth num_quantizers num_codebooks
        """,
        ),
        (4, "num_key_value_heads resampler_n_latents resampler_n_heads num_query_tokens window_size"),
        (16, "num_position_embeddings num_patches codebook_size"),
        (8, "resampler_head_dim num_filters codebook_dim"),
        (12, "attention_chunk_size"),
    ),
}

#: Of a configuration that holds a decoder's: what connects its parts.
COMPOSITE: dict[str, Any] = {
    name: TOWER[name]
    for name in _names(
        """
        projection_dim projector_hidden_size projection_hidden_size out_hidden_size vision_hidden_size
        image_text_hidden_size alignment_intermediate_size merged_hidden_size num_query_tokens
        """
    )
}

#: What is taken for a value that a configuration leaves open.
OPEN: dict[str, Any] = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}

_HEADS_ALIKE = {"num_key_value_heads": 4}
_SAM = {"output_channels": 32, "scale": 4}
_VQ = {
    "base_channels": 32,
    "latent_channels": 32,
    "num_embeddings": 16,
    "resolution": 64,
    "channel_multiplier": [1, 1],
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}

#: What names alone do not say, by the type of a configuration or of a part of one. `...` leaves a value out.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 60, "audio_token_offset": 76},
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1]},
    "bamba": {"attn_layer_indices": [1, 3, 5, 7]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "local_attention_window_len": 16,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 96, **{f"IMGIMG{letter}Z": 86 + i for i, letter in enumerate("ABCD")}}
    },
    "chameleon_vqgan": _VQ,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)},
    "deepseek_ocr2_sam_vision_model": _SAM,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "per_layer_config": {}},
    "dots3_note_text": {**_HEADS_ALIKE, "per_layer_config": {}, "head_dim": 16},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 95, "<image>": 96, "<|visual token 000000|>": 90}},
    "emu3_vqgan": _VQ,
    "glm5_next_text": {**_HEADS_ALIKE, "index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "hrm_text": {"num_layers_per_stack": 2},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local", "lsh"] * (LAYERS // 2),
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCABULARY,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": _SAM},
    "janus_vqgan": _VQ,
    "got_ocr2_vision": _SAM,
    "pp_formulanet_vision": {
        **_SAM,
        "post_conv_in_channels": 32,
        "post_conv_mid_channels": 32,
        "post_conv_out_channels": 32,
    },
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 8},
    "sam_vision_model": _SAM,
    "unlimited_ocr_sam_vision_model": _SAM,
    "gemma4_vision": {"position_embedding_size": 64},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 1], [-2, 3]],
        "spatial_target_layers": [2, 4, 5, 6],
        "downsample_rate": "1/2",
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * (LAYERS // 4)},
    "phi4_multimodal_audio": {
        "depthwise_separable_out_channel": 32,
        "ext_pw_out_channel": 32,
        "nemo_conv_channels": 32,
    },
    "wavtokenizer_encoder": {"codebook_dim": WIDTH},
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_embed_dim": WIDTH,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "gemma3n": {"num_kv_shared_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "hy_v4_vl_vision": {"max_image_size": 64, "max_vit_seq_len": 64},
    "hunyuan_vl_vision": {"max_image_size": 64, "min_image_size": 28, "max_vit_seq_len": 64},
    "inkling_audio": {"mel_vocab_size": 8, "n_mel_bins": 8},
    "zamba2": {"n_mamba_heads": 8, "layer_types": ["mamba", "hybrid"] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},
}

#: Types whose kinds of layers cannot be put in another order.
OWN_PATTERN: frozenset[str] = frozenset()
