"""The methods, one file each, and their registry. Adding a method is a file and, here, its name twice."""

from __future__ import annotations

from tanzaku.core.method import Method
from tanzaku.errors import TanzakuError, nearest
from tanzaku.methods.adalora import AdaLoRA as AdaLoRA
from tanzaku.methods.average import Average as Average
from tanzaku.methods.beft import BEFT as BEFT
from tanzaku.methods.bitfit import BitFit as BitFit
from tanzaku.methods.boft import BOFT as BOFT
from tanzaku.methods.bottleneck import BottleneckAdapter as BottleneckAdapter
from tanzaku.methods.c3a import C3A as C3A
from tanzaku.methods.cartridge import Cartridge as Cartridge
from tanzaku.methods.compacter import Compacter as Compacter
from tanzaku.methods.cpt import CPT as CPT
from tanzaku.methods.deft import DEFT as DEFT
from tanzaku.methods.delora import DeLoRA as DeLoRA
from tanzaku.methods.fourierft import FourierFT as FourierFT
from tanzaku.methods.full import Full as Full
from tanzaku.methods.fusion import AdapterFusion as AdapterFusion
from tanzaku.methods.glora import GLoRA as GLoRA
from tanzaku.methods.gralora import GraLoRA as GraLoRA
from tanzaku.methods.head import Head as Head
from tanzaku.methods.hira import HiRA as HiRA
from tanzaku.methods.hra import HRA as HRA
from tanzaku.methods.hyper import Hyper as Hyper
from tanzaku.methods.ia3 import IA3 as IA3
from tanzaku.methods.llama_adapter import LlamaAdapter as LlamaAdapter
from tanzaku.methods.ln_tuning import LNTuning as LNTuning
from tanzaku.methods.loha import LoHa as LoHa
from tanzaku.methods.lokr import LoKr as LoKr
from tanzaku.methods.lora import LoRA as LoRA
from tanzaku.methods.lora_xs import LoRAXS as LoRAXS
from tanzaku.methods.miss import MiSS as MiSS
from tanzaku.methods.multitask_prompt_tuning import MultitaskPromptTuning as MultitaskPromptTuning
from tanzaku.methods.oft import OFT as OFT
from tanzaku.methods.p_tuning import PTuning as PTuning
from tanzaku.methods.p_tuning_v2 import PTuningV2 as PTuningV2
from tanzaku.methods.peanut import PEANuT as PEANuT
from tanzaku.methods.poly import Poly as Poly
from tanzaku.methods.prefix_tuning import PrefixTuning as PrefixTuning
from tanzaku.methods.prompt_tuning import PromptTuning as PromptTuning
from tanzaku.methods.psoft import PSOFT as PSOFT
from tanzaku.methods.pvera import PVeRA as PVeRA
from tanzaku.methods.randlora import RandLoRA as RandLoRA
from tanzaku.methods.reft import ReFT as ReFT
from tanzaku.methods.road import RoAd as RoAd
from tanzaku.methods.shira import SHiRA as SHiRA
from tanzaku.methods.supertuning import Supertuning as Supertuning
from tanzaku.methods.text_to_lora import TextToLora as TextToLora
from tanzaku.methods.tinylora import TinyLoRA as TinyLoRA
from tanzaku.methods.trainable_tokens import TrainableTokens as TrainableTokens
from tanzaku.methods.unilora import UniLoRA as UniLoRA
from tanzaku.methods.vblora import VBLoRA as VBLoRA
from tanzaku.methods.vera import VeRA as VeRA
from tanzaku.methods.waveft import WaveFT as WaveFT
from tanzaku.methods.xlora import XLora as XLora

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA,
        AdaLoRA,
        PromptTuning,
        PTuning,
        PrefixTuning,
        PTuningV2,
        Cartridge,
        MultitaskPromptTuning,
        CPT,
        IA3,
        LlamaAdapter,
        BitFit,
        BEFT,
        BottleneckAdapter,
        Compacter,
        ReFT,
        Hyper,
        TextToLora,
        LNTuning,
        TrainableTokens,
        LoHa,
        LoKr,
        VeRA,
        PVeRA,
        OFT,
        HRA,
        FourierFT,
        C3A,
        BOFT,
        MiSS,
        SHiRA,
        HiRA,
        RandLoRA,
        RoAd,
        WaveFT,
        GraLoRA,
        DeLoRA,
        VBLoRA,
        LoRAXS,
        TinyLoRA,
        PSOFT,
        UniLoRA,
        Supertuning,
        PEANuT,
        DEFT,
        GLoRA,
        Poly,
        AdapterFusion,
        Average,
        XLora,
        Full,
        Head,
    )
}


def method_named(name: str) -> type[Method]:
    """The method of that name, or an error with the nearest one."""
    if name not in METHODS:
        raise TanzakuError(f"unknown method {name!r}{nearest(name, METHODS)}; methods are {', '.join(METHODS)}")
    return METHODS[name]
