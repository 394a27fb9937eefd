"""Run with transformers 4 first on the path: what it makes of the checkpoints in a folder.

usage: load_with_transformers4.py FOLDER OUT.json. FOLDER/NAME.json says what to ask the checkpoint FOLDER/NAME:
{"input_ids", "text", "options"}. OUT.json gets for each NAME {"logits", "dtype", "token_ids", "decoded", "generated"},
or {"error"} where the checkpoint says that it wants another transformers.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

root, out = map(Path, sys.argv[1:])
assert transformers.__version__.startswith("4."), transformers.__version__
torch.set_num_threads(1)
found = {}
for file in sorted(root.glob("*.json")):
    asked = json.loads(file.read_text(encoding="utf-8"))
    try:
        model = AutoModelForCausalLM.from_pretrained(root / file.stem, **asked["options"]).eval()
    except ImportError as error:
        found[file.stem] = {"error": str(error)}
        continue
    tokenizer = AutoTokenizer.from_pretrained(root / file.stem)
    inputs = tokenizer(asked["text"], return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([asked["input_ids"]])).logits[0]
        generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]
    found[file.stem] = {
        "logits": logits.tolist(),
        "dtype": str(model.dtype),
        "token_ids": inputs["input_ids"][0].tolist(),
        "decoded": tokenizer.decode(inputs["input_ids"][0]),
        "generated": generated.tolist(),
    }
out.write_text(json.dumps(found), encoding="utf-8")
