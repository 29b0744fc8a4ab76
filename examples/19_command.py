"""A whole run from one file, and a look at its store: the command `lopd`.

It is called from Python here, so that this page runs anywhere.  In a shell it is

    lopd run --example > runs/19.yaml
    lopd run runs/19.yaml
    lopd info runs/command/seed-0/rollouts.zarr
    lopd verify runs/command/seed-0/rollouts.zarr

The file names a student and its teacher, prompts, SFT on the teacher's text, rollouts, scores, OPD, and an evaluation before and after it.
Run it twice: the second call finds everything done.
"""

from contextlib import redirect_stdout
from pathlib import Path

from tiny import model_folders

from lopd.tools.command import main

model_folders()
# Replace these by your own: the models and prompts that the file names.
with Path("runs/19.yaml").open("w") as file, redirect_stdout(file):
    main(["run", "--example"])

store = "runs/command/seed-0/rollouts.zarr"
for words in (["run", "runs/19.yaml"], ["info", store], ["verify", store]):
    print(f"\n$ lopd {' '.join(words)}")
    print(f"exit code {main(words)}")
