"""What a user does with saved folders where `gengram` is not installed; run by test_hub.py in such an environment.

    python use_without_package.py FOLDERS HUB_REPOSITORY OUTPUT

Reads `FOLDERS/{head}` and `FOLDERS/input_ids.pt`. Writes models that it saved again to `OUTPUT/{head}`, all outputs to
`OUTPUT/outputs.pt`, and everything that is not a tensor to `OUTPUT/report.json`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

HEADS = {
    "GengramModel": (AutoModel, "feature-extraction"),
    "GengramForCausalLM": (AutoModelForCausalLM, "text-generation"),
    "GengramForMaskedLM": (AutoModelForMaskedLM, "fill-mask"),
    "GengramForSequenceClassification": (AutoModelForSequenceClassification, "text-classification"),
    "GengramForTokenClassification": (AutoModelForTokenClassification, "token-classification"),
}
TEXT = "ACG[MASK]TNacguRX"
BASES = ["A", "C", "G", "T"]


def module_of(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


@torch.no_grad()
def main(folders: Path, hub_repository: str, output: Path) -> None:
    ids = torch.load(folders / "input_ids.pt")
    outputs: dict[str, torch.Tensor] = {}
    report: dict = {"gengram is installed": importlib.util.find_spec("gengram") is not None}
    for name, (auto_class, task) in HEADS.items():
        notes = report[name] = {}
        folder, again = str(folders / name), str(output / name)

        notes["config"] = module_of(AutoConfig.from_pretrained(folder, trust_remote_code=True))
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        notes["model"] = module_of(model)
        outputs[f"{name} loaded"] = model(ids)[0]

        for trust in (None, False, True):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
            notes[f"ids, trust {trust}"] = tokenizer(TEXT)["input_ids"]
        notes["decoded"] = tokenizer.decode(tokenizer("ACGTN")["input_ids"])

        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        reloaded = auto_class.from_pretrained(again, trust_remote_code=True)
        outputs[f"{name} saved again"] = reloaded(ids)[0]
        outputs[f"{name} from config"] = auto_class.from_config(model.config, trust_remote_code=True)(ids)[0]

        pipe = pipeline(task, model=folder, trust_remote_code=True)
        if task == "fill-mask":
            notes["pipeline"] = pipe("ACG[MASK]TTG", targets=BASES)
        elif task == "text-generation":
            others = [i for i in range(model.config.vocab_size) if i not in tokenizer.convert_tokens_to_ids(BASES)]
            options = dict(max_new_tokens=12, do_sample=False, suppress_tokens=others)
            notes["pipeline"] = pipe("ACGTTG", **options)
            outputs["generated"] = model.generate(ids[:1], **options)
            outputs["generated without cache"] = model.generate(ids[:1], use_cache=False, **options)
        else:
            notes["pipeline"] = pipe("ACGTTG")

    hub_model = AutoModelForCausalLM.from_pretrained(hub_repository, trust_remote_code=True)
    report["hub model"] = module_of(hub_model)
    outputs["hub"] = hub_model(ids)[0]
    hub_model.save_pretrained(output / "from hub")
    report["hub ids"] = AutoTokenizer.from_pretrained(hub_repository)(TEXT)["input_ids"]

    torch.save(outputs, output / "outputs.pt")
    (output / "report.json").write_text(json.dumps(report, default=float))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
