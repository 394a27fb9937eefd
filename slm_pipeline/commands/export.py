"""``slm-export``: the model of a run, or a model folder, in the forms that other tools read.

slm-export gguf RUN --type q8_0                 one file for llama.cpp and all that is built on it
slm-export gguf FOLDER --type f16 --out my.gguf

RUN is a run's folder (outputs/runs/NAME/TIME), FOLDER one that transformers loads, with safetensors and tokenizer.json.
What a form cannot hold is refused before anything is written; nothing that is there is overwritten.
docs/checkpoints.md says which form is for what.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.export import exported
from slm_pipeline.export.exported import WHICH

TYPES = ("f16", "q8_0", "q4_0")


def main() -> None:
    """Console entry point."""
    given = _parser().parse_args()
    with errors_in_one_line():
        given.run(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slm-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    forms = parser.add_subparsers(metavar="FORM", required=True)
    gguf = _form(forms, "gguf", "one GGUF file, with the tokenizer in it", _gguf)
    gguf.add_argument("--type", choices=TYPES, default="f16", help="16, 8.5 or 4.5 bits a weight; default: f16")
    gguf.add_argument("--out", type=Path, metavar="FILE", help="default: MODEL-METHOD-WHICH-TYPE.gguf, here")
    gguf.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="llama.cpp's name of the first cut of a byte-level BPE, where it is not recognised",
    )
    return parser


def _form(forms: argparse._SubParsersAction, name: str, words: str, run: object) -> argparse.ArgumentParser:
    form = forms.add_parser(name, help=words, description=words)
    form.add_argument("place", type=Path, metavar="RUN", help="a run's folder, or a model folder")
    form.add_argument("--which", choices=WHICH, help="of a run; default: the last that it made")
    form.set_defaults(run=run)
    return form


def _gguf(given: argparse.Namespace) -> None:
    found = exported.find(given.place, given.which)
    file = given.out or Path(f"{found.name}-{given.type}.gguf")
    exported.check_free(file)
    from slm_pipeline.export import gguf_file, llama_cpp

    llama_cpp.family_of(str(found.description["model_type"]))  # before the first expensive second
    model, tokenizer = found.load()
    said = gguf_file.write(model, tokenizer, file, given.type, name=found.name, pre=given.pre_tokenizer)
    for line in said:
        print(line)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
