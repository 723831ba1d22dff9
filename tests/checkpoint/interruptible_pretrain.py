"""The training program as a process to be interrupted.

`python interruptible_pretrain.py ARGUMENTS` is `python -m train.pretrain ARGUMENTS` with, by
environment variables:

RECORD_BATCHES     append a line with the step and a hash of this process's batch to this file
SECONDS_PER_STEP   wait before each step, so that there is time to interrupt it
KILL_IN_SAVE_OF    kill the process (SIGKILL) right after the save of this step has begun
NAN_AT             put a NaN into the parameters before this step
"""

import hashlib
import os
import signal
import sys
import time

import jax
import numpy as np

from train import checkpoints, loop, pretrain

RECORD = os.environ.get("RECORD_BATCHES")
SECONDS = float(os.environ.get("SECONDS_PER_STEP", "0"))
KILL = int(os.environ.get("KILL_IN_SAVE_OF", "-1"))
NAN = int(os.environ.get("NAN_AT", "-1"))


def main():
    batch_hash = ""
    to_global_batch, save = loop.to_global_batch, checkpoints.CheckpointStore.save

    def recording(mesh, batch, *arguments):
        nonlocal batch_hash
        parts = [np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch)]
        batch_hash = hashlib.sha256(b"".join(parts)).hexdigest()
        return to_global_batch(mesh, batch, *arguments)

    def before_step(step, state):
        if RECORD:
            with open(RECORD, "a") as file:
                file.write(f"{step} {batch_hash}\n")
        time.sleep(SECONDS)
        if step == NAN:
            state = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
        return state

    def killed_save(self, step, *arguments):
        saved = save(self, step, *arguments)
        if step == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return saved

    class InterruptibleLoop(loop.Loop):
        def __init__(self, **fields):
            super().__init__(**(fields | {"before_step": before_step}))

    loop.to_global_batch = recording
    pretrain.Loop = InterruptibleLoop
    checkpoints.CheckpointStore.save = killed_save
    return pretrain.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
