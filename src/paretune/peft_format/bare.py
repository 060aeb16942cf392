"""Adapters that were published as one file of bare tensors: loralib's LoRA and T-Few's (IA)³, under the model's own names.

    <module>.lora_A (r, I), <module>.lora_B (O, r);   <module>.multi_lora_b (O, 1) rescales the module's output;   other names: the head

loralib: Hu et al. 2021, arXiv:2106.09685; T-Few: Liu et al. 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from paretune.errors import Incompatible
from paretune.peft_format import files

ENDS = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight", ".multi_lora_b": ".ia3_l"}


def load(file: Path, alpha: float | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) as PEFT would have written them.

    Raises:
        Incompatible: for a file of another kind, or LoRA without its alpha.
        StoreError: for a damaged file.
    """
    tensors = files.load_tensors(file)
    ends = {n: next((e for e in ENDS if n.endswith(e)), "") for n in tensors}
    targets = sorted({n.removesuffix(end) for n, end in ends.items() if end})
    kinds = {"IA3" if end == ".multi_lora_b" else "LORA" for end in ends.values() if end}
    if len(kinds) != 1:
        raise Incompatible(f"{file} holds bare tensors of neither loralib nor T-Few; give the folder with {files.CONFIG}")
    config = {
        "peft_type": kinds.pop(), "target_modules": targets, "feedforward_modules": [],
        "modules_to_save": sorted({n.rpartition(".")[0] for n, end in ends.items() if not end}),
    }  # fmt: skip
    if config["peft_type"] == "LORA":
        if alpha is None:
            raise Incompatible(f"{file} does not say its alpha, without which the update has no scale; give alpha=..., as the publication has it")
        ranks = {len(t) for n, t in tensors.items() if ends[n] == ".lora_A"}
        if len(ranks) != 1:
            raise Incompatible(f"{file} holds updates of {len(ranks)} ranks; loralib's files have one")
        config |= {"r": ranks.pop(), "lora_alpha": alpha}
    return config, {files.PREFIX + n.removesuffix(end) + ENDS.get(end, ""): t for (n, t), end in zip(tensors.items(), ends.values(), strict=True)}
