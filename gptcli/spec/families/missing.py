"""Well-known families that are not read, and what they need that is not here; data only."""

from __future__ import annotations

_EXPERTS = "mixtures of experts"
_STATE = "state-space or recurrent layers"
_ALIBI = "positions as slopes on the scores (ALiBi)"
_GEMMA = "norms that multiply by 1 + weight, and scaled embeddings"
_CAPS = "soft-capped scores and logits"
_SIDE = "one norm for attention and MLP side by side"
_PAIRS = "rotary positions of neighbouring pairs"
_SCALES = "multipliers of embeddings, residuals and logits"
_LATENT = "attention over compressed keys and values"
_CODER = "a decoder with an encoder beside it"
_IMAGES = "images, or sound, beside text"
_ENCODER = "attention in both directions: it is an encoder, and continues no text"

_BY_NEED = {
    _EXPERTS: (
        "mixtral qwen2_moe qwen3_moe olmoe dbrx arctic phimoe gpt_oss granitemoe granitemoeshared llama4 llama4_text "
        "ernie4_5_moe glm4_moe dots1 minimax minimax_m2 hunyuan_v1_moe flex_olmo switch_transformers exaone_moe"
    ),
    f"{_EXPERTS}, and {_LATENT}": "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 longcat_flash",
    _LATENT: "minicpm3",
    f"{_EXPERTS}, and {_STATE}": "jamba qwen3_next granitemoehybrid",
    _STATE: "mamba mamba2 falcon_mamba falcon_h1 rwkv xlstm recurrent_gemma zamba zamba2 bamba nemotron_h lfm2",
    _ALIBI: "bloom mpt",
    f"{_ALIBI}, or keys and values shared by all heads in a layout of its own": "falcon RefinedWeb RefinedWebModel",
    _GEMMA: "gemma",
    f"{_CAPS}, and {_GEMMA}": "gemma2 vaultgemma",
    f"{_GEMMA}, and two kinds of rotary positions": "gemma3_text gemma3n_text",
    f"{_GEMMA}, and {_IMAGES}": "gemma3 gemma3n paligemma",
    _SIDE: "phi cohere cohere2",
    f"{_SIDE}, and {_PAIRS}": "gptj codegen",
    _PAIRS: "glm glm4 chatglm ernie4_5",
    _SCALES: "granite minicpm",
    "layers that see only nearby tokens, with unscaled scores": "gpt_neo",
    "keys and values shared by all heads, in GPT-2's layout": "gpt_bigcode",
    "layer norms without weights, and clipped queries and keys": "olmo",
    "rotary positions that differ between kinds of layers": "olmo3 modernbert-decoder",
    "a name table, though its axes are here": "stablelm starcoder2",
    "squared ReLUs, and norms that multiply by 1 + weight": "nemotron",
    "squared ReLUs, and layer norms of query and key": "persimmon",
    "another layout of its tensors": "qwen internlm internlm2 exaone",
    "positions relative to each other": "xlnet transfo-xl",
    "sinusoid positions": "ctrl xglm",
    _CODER: ("t5 mt5 umt5 longt5 t5gemma bart mbart pegasus marian m2m_100 blenderbot prophetnet led nllb-moe whisper"),
    _ENCODER: (
        "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta camembert modernbert mpnet roformer"
    ),
    _IMAGES: (
        "llava llava_next llava_onevision idefics2 idefics3 smolvlm mllama mistral3 pixtral qwen2_vl qwen2_5_vl "
        "qwen3_vl qwen2_audio qwen2_5_omni phi4_multimodal phi3_v internvl fuyu chameleon emu3 git blip-2 "
        "instructblip aria molmo"
    ),
}

NEEDS = {family: need for need, families in _BY_NEED.items() for family in families.split()}
