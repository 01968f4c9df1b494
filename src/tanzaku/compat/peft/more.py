"""Methods whose configurations and tuners need nothing of their own here: each is made of the method.

Settings have PEFT's names, and stand here in PEFT's order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tanzaku.compat.peft.config import CONFIGS, PeftConfig, PeftType, PromptLearningConfig
from tanzaku.compat.peft.tuner import PREFIXES, TUNERS, BaseTuner
from tanzaku.core.method import Method
from tanzaku.methods import METHODS

# PEFT's name of the method -> how its classes' names begin, and its parameters' names; its settings in order.
_KINDS: dict[str, tuple[str, str, str]] = {
    "BOFT": (
        "BOFT",
        "boft_",
        "boft_block_size boft_block_num boft_n_butterfly_factor target_modules exclude_modules boft_dropout "
        "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern",
    ),
    "C3A": (
        "C3A",
        "c3a_",
        "block_size target_modules bias modules_to_save layers_to_transform layers_pattern block_size_pattern "
        "init_weights",
    ),
    "CARTRIDGE": (
        "Cartridge",
        "",
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
        "modules_to_save num_frozen_tokens",
    ),
    "DEFT": (
        "Deft",
        "deft_",
        "r target_modules exclude_modules decomposition_method init_scale alpha para fan_in_fan_out "
        "deft_dropout init_weights layers_to_transform layers_pattern bias modules_to_save",
    ),
    "DELORA": (
        "Delora",
        "delora_",
        "r delora_lambda module_dropout target_modules exclude_modules bias init_weights layers_to_transform "
        "layers_pattern rank_pattern lambda_pattern modules_to_save",
    ),
    "FOURIERFT": (
        "FourierFT",
        "fourierft_",
        "n_frequency scaling random_loc_seed fan_in_fan_out target_modules exclude_modules bias "
        "modules_to_save layers_to_transform layers_pattern n_frequency_pattern init_weights",
    ),
    "GLORA": ("Glora", "glora_", "r target_modules bias modules_to_save config_A_B config_C config_D_E init_weights"),
    "GRALORA": (
        "Gralora",
        "gralora_",
        "r hybrid_r target_modules alpha gralora_dropout gralora_k fan_in_fan_out bias modules_to_save "
        "init_weights layers_to_transform layers_pattern",
    ),
    "HIRA": (
        "Hira",
        "hira_",
        "r target_modules exclude_modules hira_dropout fan_in_fan_out modules_to_save init_weights "
        "layers_to_transform layers_pattern rank_pattern",
    ),
    "HRA": (
        "HRA",
        "hra_",
        "r apply_GS target_modules exclude_modules init_weights layers_to_transform layers_pattern bias "
        "modules_to_save",
    ),
    "LN_TUNING": ("LNTuning", "ln_tuning_", "target_modules exclude_modules modules_to_save"),
    "LOHA": (
        "LoHa",
        "hada_",
        "rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d target_modules "
        "exclude_modules init_weights layers_to_transform layers_pattern modules_to_save",
    ),
    "LOKR": (
        "LoKr",
        "lokr_",
        "rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d decompose_both "
        "decompose_factor rank_dropout_scale target_modules exclude_modules init_weights layers_to_transform "
        "layers_pattern modules_to_save",
    ),
    "MISS": (
        "Miss",
        "miss_",
        "r miss_dropout mini_r target_modules exclude_modules init_weights layers_to_transform layers_pattern "
        "bias modules_to_save",
    ),
    "MULTITASK_PROMPT_TUNING": (
        "MultitaskPromptTuning",
        "",
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
        "modules_to_save prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs "
        "prompt_tuning_init_state_dict_path prompt_tuning_init_task num_ranks num_tasks",
    ),
    "BEFT": ("Beft", "beft_", "target_modules modules_to_save init_weights"),
    "OFT": (
        "OFT",
        "oft_",
        "r oft_block_size module_dropout target_modules fan_in_fan_out bias exclude_modules init_weights "
        "layers_to_transform layers_pattern modules_to_save coft eps block_share use_cayley_neumann "
        "num_cayley_neumann_terms",
    ),
    "PEANUT": (
        "Peanut",
        "peanut_",
        "r depth act_fn scaling target_modules exclude_modules modules_to_save layers_to_transform "
        "layers_pattern init_weights",
    ),
    "POLY": (
        "Poly",
        "poly_",
        "r target_modules exclude_modules modules_to_save init_weights poly_type n_tasks n_skills n_splits",
    ),
    "PSOFT": (
        "Psoft",
        "psoft_",
        "r target_modules exclude_modules psoft_alpha psoft_dropout fan_in_fan_out ab_svd_init psoft_svd "
        "psoft_svd_lowrank_niter random_seed psoft_orth psoft_mag_b psoft_mag_a use_cayley_neumann "
        "num_cayley_neumann_terms cayley_neumann_eps modules_to_save init_weights layers_to_transform "
        "layers_pattern",
    ),
    "PVERA": (
        "Pvera",
        "pvera_lambda_",
        "r target_modules projection_prng_key save_projection pvera_dropout d_initial fan_in_fan_out bias "
        "modules_to_save init_weights layers_to_transform layers_pattern sample_at_inference generator_seed",
    ),
    "RANDLORA": (
        "RandLora",
        "randlora_",
        "r target_modules projection_prng_key save_projection sparse very_sparse randlora_dropout "
        "fan_in_fan_out randlora_alpha bias modules_to_save init_weights layers_to_transform layers_pattern",
    ),
    "ROAD": ("Road", "road_", "variant group_size init_weights target_modules modules_to_save"),
    "SHIRA": ("Shira", "shira_", "r mask_type random_seed target_modules fan_in_fan_out init_weights modules_to_save"),
    "SUPERTUNING": (
        "Supertuning",
        "supertuning_",
        "target_modules modules_to_save sparsity select_top r lora_alpha lora_dropout init_weights "
        "save_precomputed_indices",
    ),
    "TINYLORA": (
        "TinyLora",
        "tinylora_",
        "r u weight_tying projection_seed save_projection init_v_bound target_modules tinylora_dropout "
        "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern",
    ),
    "TRAINABLE_TOKENS": ("TrainableTokens", "trainable_tokens_", "token_indices target_modules init_weights"),
    "UNILORA": (
        "UniLora",
        "unilora_",
        "r proj_seed theta_d_length target_modules unilora_dropout fan_in_fan_out bias modules_to_save "
        "init_theta_d_bound init_weights save_indices layers_to_transform layers_pattern",
    ),
    "VBLORA": (
        "VBLoRA",
        "vblora_",
        "r num_vectors vector_length topk target_modules exclude_modules save_only_topk_weights "
        "vblora_dropout fan_in_fan_out bias modules_to_save init_vector_bank_bound init_logits_std "
        "layers_to_transform layers_pattern",
    ),
    "VERA": (
        "Vera",
        "vera_lambda_",
        "r target_modules projection_prng_key save_projection vera_dropout d_initial fan_in_fan_out bias "
        "modules_to_save init_weights layers_to_transform layers_pattern",
    ),
    "WAVEFT": (
        "WaveFT",
        "waveft_",
        "n_frequency scaling wavelet_family use_idwt random_loc_seed fan_in_fan_out target_modules "
        "exclude_modules bias modules_to_save layers_to_transform layers_pattern n_frequency_pattern "
        "proportional_parameters init_weights",
    ),
}


def _config(method: type[Method], name: str, order: tuple[str, ...]) -> type[PeftConfig]:
    own = {field.name for field in dataclasses.fields(method)}
    parts: dict[str, Any] = {
        "__doc__": f"{method.__name__} by PEFT's names: :class:`tanzaku.{method.__name__}` has the settings.",
        "__module__": __name__,
        "method": method,
        "peft_type": PeftType(method.peft_type),
        "order": order,
        "elsewhere": dict.fromkeys(key for key in order if key not in own),
    }
    first = PromptLearningConfig if "num_virtual_tokens" in own else PeftConfig
    return dataclasses.dataclass(init=False)(type(name, (first, method), parts))


MORE: dict[str, type[Any]] = {}
for _method in METHODS.values():
    if _method.in_peft and _method.peft_type in _KINDS and _method.peft_type not in CONFIGS:
        _name, _prefix, _order = _KINDS[_method.peft_type]
        _made = _config(_method, f"{_name}Config", tuple(_order.split()))
        CONFIGS[_method.peft_type] = MORE[_made.__name__] = _made
        PREFIXES[_method.peft_type] = _prefix or "prompt_encoder."
        if _prefix:
            _parts = {"prefix": _prefix, "__module__": __name__, "__doc__": f"With {_method.__name__}."}
            TUNERS[_method.peft_type] = MORE[f"{_name}Model"] = type(f"{_name}Model", (BaseTuner,), _parts)

__all__ = list(MORE)
globals().update(MORE)
