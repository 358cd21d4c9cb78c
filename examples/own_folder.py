"""The program on a folder of images a class, from Python: `python examples/own_folder.py FOLDER`.

The same on the command line: complora train --data folder:FOLDER --model ViT-B-32-quickgelu --pretrained openai
"""

import sys

from complora_kernels.fewshot.__main__ import main as complora

MODEL = ("--model", "ViT-B-32-quickgelu", "--pretrained", "openai")


def main(folder: str, *more: str) -> int:
    """Compare plain LoRA with Comp-LoRA on four images a class; table and figures go to runs/own. The exit code."""
    options = ("--methods", "lora", "output", "--shots", "4", "--seeds", "0", "--output", "runs/own")
    return complora(["train", "--data", f"folder:{folder}", *MODEL, *options, *more])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
