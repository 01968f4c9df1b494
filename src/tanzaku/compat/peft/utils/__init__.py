"""What programs take from `peft.utils`."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import PeftType, TaskType
from tanzaku.compat.peft.layers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from tanzaku.compat.peft.utils.constants import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from tanzaku.compat.peft.utils.other import _get_submodules, infer_device, prepare_model_for_kbit_training
from tanzaku.compat.peft.utils.save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "_get_submodules",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
__getattr__ = absent_from(__name__, __all__)
