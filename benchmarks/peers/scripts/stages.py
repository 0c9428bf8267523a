"""What a process of a peer's script holds after each stage, in MiB of resident pages.

`python stages.py SCRIPT MODEL CASE INPUTS` answers with a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np


def held(name="VmRSS"):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", text).group(1)) / 1024


def main(script, model, case, data):
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stages = {"python and NumPy": held()}
    module = importlib.import_module(script)
    stages["imports"] = held()
    with np.load(data) as file:
        inputs = {name: file[name] for name in file.files}
    run = module.start(model, case, inputs)
    stages["arrays"] = held()
    for i in range(50):
        loss, _ = run.step(i)
        float(loss() if callable(loss) else loss)
        if i == 0:
            stages["first step"] = held()
    stages |= {"50 steps": held(), "peak": held("VmHWM")}
    print(json.dumps(stages), file=channel, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
