"""A model of DeepSeek-R1's widths keeps to its plan of RAM while it runs, too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HIDDEN, HEADS, LORA, Q_LORA = 7168, 128, 512, 1536
DENSE, MOE, EXPERTS, VOCAB = 18432, 2048, 32, 256

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": MOE,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": Q_LORA,
    "kv_lora_rank": LORA,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor but the MLPs' of the MoE layer, in BF16."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_a_proj.weight": (Q_LORA, HIDDEN),
            f"{prefix}.self_attn.q_a_layernorm.weight": (Q_LORA,),
            f"{prefix}.self_attn.q_b_proj.weight": (HEADS * 192, Q_LORA),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (LORA + 64, HIDDEN),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (LORA,),
            f"{prefix}.self_attn.kv_b_proj.weight": (HEADS * 256, LORA),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * 128),
        }
    mlps = [("model.layers.0.mlp", DENSE), ("model.layers.1.mlp.shared_experts", MOE)]
    mlps += [(f"model.layers.1.mlp.experts.{e}", MOE) for e in range(EXPERTS)]
    for prefix, width in mlps:
        found |= {
            f"{prefix}.gate_proj.weight": (width, HIDDEN),
            f"{prefix}.up_proj.weight": (width, HIDDEN),
            f"{prefix}.down_proj.weight": (HIDDEN, width),
        }
    return found | {"model.layers.1.mlp.gate.weight": (EXPERTS, HIDDEN)}


def write_zeros(folder: Path) -> None:
    """Write a checkpoint of zeros: a hole in a file, so that it takes no room on the disk."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes().items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    header[bias] = {"dtype": "F32", "shape": [EXPERTS], "data_offsets": [end, end + 4 * EXPERTS]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end + 4 * EXPERTS)


PEAK = """
import json, sys
import numpy as np
import dsfp4

def kib(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
baseline = kib("VmRSS") * 1024
tokens = int(sys.argv[3])
model = dsfp4.Model(sys.argv[1], ram_limit=float(sys.argv[2]), max_context=tokens + 8, threads=2,
                    warm_start=False)
model.generate(np.arange(tokens) % 256, max_tokens=4, stop_ids=[])
stats = model.stats()
print(json.dumps({"baseline": baseline, "peak": kib("VmHWM") * 1024,
                  "reserved": stats["reserved_bytes"], "tiered": stats["tiered"]}))
"""


@pytest.mark.full
def test_peak_memory_at_the_widths_of_r1(tmp_path: Path) -> None:
    write_zeros(tmp_path)
    limit = 4.0
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(limit), "1024"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert used["tiered"]
    assert used["peak"] <= used["baseline"] + used["reserved"] + 30e6
    assert used["peak"] <= limit * 1e9
