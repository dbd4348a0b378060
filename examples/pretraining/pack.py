"""Make the folder of a model that ships: half the bytes, float32 by default, with a card and the training record.

    python pack.py TRAINED OUTPUT --card CARD.md --record STAGE1/training.json STAGE2/training.json

Weights are stored in float16 and `config.json` says float32, so that `from_pretrained` computes in float32 and the
file is half as large.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.inference.generation import all_but_bases
from gengram.support.whole_output import whole_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="folder that pretrain.py left")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--card", type=Path, required=True, help="model card")
    parser.add_argument("--record", type=Path, nargs="+", default=[], help="training.json of each stage, in order")
    arguments = parser.parse_args()
    model = GengramForCausalLM.from_pretrained(arguments.trained, dtype=torch.float32)
    tokenizer = GengramTokenizer(model_max_length=model.config.max_position_embeddings)
    weights = {name: weight.detach().half() for name, weight in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:
        weights.pop(tied, None)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError(f"{arguments.trained}: a weight does not fit into float16.")
    with whole_folder(arguments.output) as folder:
        model.config.dtype = torch.float32
        model.config.architectures = ["GengramForCausalLM"]
        model.config.bos_token_id = model.config.eos_token_id = None  # the trainer took them from the tokenizer
        if hasattr(model.config, "auto_map"):  # the package that this folder is in is its code
            del model.config.auto_map
        model.config.save_pretrained(folder)
        others = all_but_bases(tokenizer, model.config, "ACGTN")
        GenerationConfig(pad_token_id=tokenizer.pad_token_id, suppress_tokens=others, do_sample=False).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        path = folder / "model.safetensors"
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
        path.chmod(0o644)
        shutil.copy(arguments.card, folder / "README.md")
        stages = [json.loads(path.read_text()) for path in arguments.record]
        (folder / "training.json").write_text(json.dumps(stages, indent=1) + "\n")


if __name__ == "__main__":
    main()
