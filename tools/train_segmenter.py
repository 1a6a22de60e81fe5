"""Train a semantic segmenter with mmseg.

    python -m zoo.tools.train_segmenter CONFIG.py [--work-dir DIR] [--amp bfloat16] [--cfg-options key=value ...]
    torchrun --nproc-per-node 2 -m zoo.tools.train_segmenter CONFIG.py [--fsdp] ...

A run that was stopped or killed goes on from its last checkpoint: run the same command again.
"""

import sys

from zoo.tools.dense_runs import training_command


def main(arguments: list[str] | None = None) -> int:
    """Command line: a config file and changes to it."""
    return training_command("mmseg", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
