"""``slm-export``: the model of a run, or a model folder, in the forms that other tools read.

slm-export gguf RUN --type q8_0                 one file for llama.cpp and all that is built on it
slm-export gguf FOLDER --type f16 --out my.gguf
slm-export padded RUN --out FOLDER              layers that differ, filled up with zeros: the stock class
slm-export card RUN                             the model card, with every score
slm-export hub RUN --repo ME/NAME --dry-run     what would be pushed; without --dry-run, push it

RUN is a run's folder (outputs/runs/NAME/TIME), FOLDER one that transformers loads, with safetensors and tokenizer.json.
What a form cannot hold is refused before anything is written; nothing that is there is overwritten.
docs/checkpoints.md says which form is for what.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.commands.arguments import parsed
from slm_pipeline.errors import UserError
from slm_pipeline.export import exported
from slm_pipeline.export.exported import WHICH
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.store.files import write_text

TYPES = ("f16", "q8_0", "q4_0")


def main() -> None:
    """Console entry point."""
    given = parsed(_parser())
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
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
    padded = _form(forms, "padded", "a folder of the stock class, as wide as the widest layer", _padded)
    padded.add_argument("--out", type=Path, metavar="FOLDER", required=True)
    card = _form(forms, "card", "the model card, README.md of a repository", _card)
    card.add_argument("--out", type=Path, metavar="FILE", help="default: printed")
    hub = _form(forms, "hub", "push model, tokenizer, plan and card to huggingface.co", _hub)
    hub.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    hub.add_argument("--private", action="store_true", help="make the repository a private one")
    hub.add_argument("--dry-run", action="store_true", help="only show what would be pushed")
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


def _padded(given: argparse.Namespace) -> None:
    found = exported.find(given.place, given.which)
    exported.check_free(given.out)
    if not str(found.description["model_type"]).startswith(PRUNED):
        raise UserError(f"{found.folder} is of a stock class already: nothing is to be padded")
    from slm_pipeline.export import padded

    model, tokenizer = found.load()
    padded.save(model, tokenizer, given.out, card=found.card, plan=found.plan, config=found.config)
    print(f"wrote {given.out}")


def _card(given: argparse.Namespace) -> None:
    text = exported.find(given.place, given.which).card("FOLDER")
    if given.out is None:
        print(text)
        return
    exported.check_free(given.out)
    write_text(given.out, f"{text}\n")
    print(f"wrote {given.out}")


def _hub(given: argparse.Namespace) -> None:
    found = exported.find(given.place, given.which)
    from slm_pipeline.export import hub

    files = hub.files(found, given.repo)
    for name, num_bytes in hub.sizes(files).items():
        print(f"{num_bytes:>14,}  {name}")
    if given.dry_run:
        print(f"would go to {given.repo}; README.md:\n\n{found.card(given.repo)}")
        return
    print(f"pushed to {hub.push(files, given.repo, private=given.private)}")


if __name__ == "__main__":
    main()
