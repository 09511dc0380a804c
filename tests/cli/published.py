"""The shapes of the published models, as in their config.json, and README.md's tables made from them.

    python3 tests/cli/published.py          prints the tables, as `deepseek info` computes them
"""
import json
import os
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("DEEPSEEK", str(ROOT / "deepseek"))

QWEN = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "max_position_embeddings": 131072, "vocab_size": 152064, "tie_word_embeddings": False}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "max_position_embeddings": 131072, "vocab_size": 128256, "tie_word_embeddings": False,
         "num_key_value_heads": 8, "rope_scaling": {
             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}}
QWEN3 = {**QWEN, "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
         "rope_theta": 1000000, "attention_bias": False, "rope_scaling": {
             "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
             "attn_factor": 0.8782488562869419}}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1}
MLA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840,
       "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
       "moe_layer_freq": 1, "tie_word_embeddings": False}
V2 = {**MLA, "model_type": "deepseek_v2", "vocab_size": 102400, "scoring_func": "softmax",
      "norm_topk_prob": False, "first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 6,
      "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}


def shape(base, sizes, **more):
    """`sizes`: hidden size, FFN width, layers, heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**base, **dict(zip(names, sizes)), **more}


V2_LITE = shape(V2, (2048, 10944, 27, 16), num_key_value_heads=16, q_lora_rank=None,
                moe_intermediate_size=1408, n_routed_experts=64, topk_method="greedy", n_group=1,
                topk_group=1, routed_scaling_factor=1.0)
V2_FULL = shape(V2, (5120, 12288, 60, 128), num_key_value_heads=128, q_lora_rank=1536, n_routed_experts=160,
                moe_intermediate_size=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3,
                routed_scaling_factor=16.0)
V3 = shape(MLA, (7168, 18432, 61, 128), model_type="deepseek_v3", num_key_value_heads=128, q_lora_rank=1536,
           moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
           topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, n_group=8, topk_group=4,
           routed_scaling_factor=2.5, first_k_dense_replace=3, vocab_size=129280, num_nextn_predict_layers=1,
           rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
           quantization_config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                "weight_block_size": [128, 128]})
# The FP8 files hold the MTP layer with copies of embedding and head, and a scale for each block: bytes by
# the number of elements of each dtype, 680,571,043,840 F8_E4M3, 3,918,786,560 BF16 and 41,555,600 F32.
V3_BYTES = 680571043840 + 2 * 3918786560 + 4 * 41555600

MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": shape(QWEN, (1536, 8960, 28, 12), num_key_value_heads=2,
                                           vocab_size=151936),
    "DeepSeek-R1-Distill-Qwen-7B": shape(QWEN, (3584, 18944, 28, 28), num_key_value_heads=4),
    "DeepSeek-R1-Distill-Llama-8B": shape(LLAMA, (4096, 14336, 32, 32)),
    "DeepSeek-R1-0528-Qwen3-8B": shape(QWEN3, (4096, 12288, 36, 32)),
    "DeepSeek-R1-Distill-Qwen-14B": shape(QWEN, (5120, 13824, 48, 40), num_key_value_heads=8,
                                          rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-32B": shape(QWEN, (5120, 27648, 64, 40), num_key_value_heads=8,
                                          rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Llama-70B": shape(LLAMA, (8192, 28672, 80, 64)),
    "DeepSeek-V2-Lite-Chat, DeepSeek-Coder-V2-Lite-Instruct": V2_LITE,
    "DeepSeek-V2-Chat, DeepSeek-Coder-V2-Instruct": V2_FULL,
    "DeepSeek-V3, DeepSeek-R1, DeepSeek-R1-Zero": V3,
}


def info(config, context):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        command = [PROGRAM, "info", "-m", folder, "--json", "--ctx", str(context)]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def billions(n):
    return f"{n / 1e9:.2f} B" if n < 1e10 else f"{n / 1e9:.1f} B"


def row(name, config):
    """Parameters, bytes of the files, and the cache, of one model."""
    short, long = info(config, 4096), info(config, 32768)
    total, active = short["parameters"]["total"], short["parameters"]["active"]
    size = V3_BYTES if "quantization_config" in config else 2 * total
    kv, mha = short["kv_bytes_per_token"], short["mha_kv_bytes_per_token"]
    need = [f"{(i['memory']['cache'] + i['memory']['activations']) / 1e9:.1f} GB" for i in (short, long)]
    return (f"| {name} | {billions(total)} | {billions(active)} | {size / 1e9:.1f} GB "
            f"| {kv / 1e3:.0f} kB ({mha / kv:.0f}x less) | {need[0]}, {need[1]} |")


def table():
    head = ("| model | parameters | active | files | cache a token (than MHA) | memory at 4k, 32k context |\n"
            "|---|---|---|---|---|---|")
    return "\n".join([head] + [row(name, config) for name, config in MODELS.items()])


def quantised_weights(config, quant):
    """Bytes of the weights when they are quantised, as the memory plan bills them, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        command = [PROGRAM, "info", "-m", folder, "--quant", quant, "--ctx", "4096"]
        plan = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(re.search(rf"--quant {quant}: weights ([\d.]+) GB", plan)[1])


def memory_table():
    """For some sizes of memory, the largest R1-Distill that leaves a tenth of it to other programs."""
    sizes, types = (8, 16, 32, 64), {"q4_k_m": "q4_k", "q8_0": "q8_0"}       # --type and its --quant
    best = {}
    for name, config in MODELS.items():                                  # smaller ones come first
        if "Distill" not in name:
            continue
        memory = info(config, 4096)["memory"]
        more = (memory["cache"] + memory["activations"]) / 1e9
        for quant in types.values():
            weights = quantised_weights(config, quant)
            for size in sizes:
                if weights + more <= 0.9 * size:
                    best[size, quant] = f"{name.split('Distill-')[1]}: {weights:.1f} + {more:.1f} GB"
    lines = ["| memory | " + " | ".join(f"`--type {t}`" for t in types) + " |",
             "|---" * (1 + len(types)) + "|"]
    for size in sizes:
        lines.append(f"| {size} GB | " + " | ".join(best[size, quant] for quant in types.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), memory_table(), sep="\n\n")
