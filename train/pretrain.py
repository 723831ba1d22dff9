"""Train a language model: ``python -m train.pretrain --config configs/nano.yaml``.

Exit status:

==== ==========================================================================================
0    the run has reached its last step
1    an error that nobody foresaw, with a traceback
2    the configuration, the data or the checkpoint do not fit; one line says which key and value
3    loss or gradient norm is not finite; the step and all norms are printed
4    a checkpoint or another file of the run could not be written, or no checkpoint is sound;
     all is saved that could be
5    a worker process that reads the data (``data.num_workers``) has died, perhaps for want of
     memory; all is saved, the same command goes on
75   stopped by SIGTERM or Ctrl-C, with all saved that there was; the same command goes on
130  stopped at once by a second Ctrl-C; what came after the last checkpoint is lost
==== ==========================================================================================

When one of several processes stops with 4 for its log or with 5, the others end with 75.

A run that was stopped or killed and resumed gives the same bits as one that was not, on the same
machine with the same versions, devices and CPU affinity. On GPUs that takes
``XLA_FLAGS=--xla_gpu_deterministic_ops=true``: kernels that add in varying order are left out, and
so is the timing of kernels that may choose another one the next time. It costs some speed.
"""

from train.signals import EXIT_RESUMABLE, exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # now: the imports below take seconds

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from nha_jax.compilation_cache import use_compilation_cache
from nha_jax.models.checkpoint_files import CHECKPOINTS_DIRECTORY
from train.agreement import check_agreement, shared_values
from train.checkpoints import CheckpointError, CheckpointMetadata, CheckpointStore, retire
from train.command_line import parse_command_line
from train.config import PretrainConfig
from train.data import DataError, Split, open_split
from train.distributed import initialise_distributed
from train.evaluation import ValidationResult
from train.integrity import DirectoryInUseError, NoSoundCheckpointError, lock_directory
from train.logging import RunLog
from train.loop import DataWorkerDied, Loop, StopRequested, TrainingDiverged
from train.plots import plot_run
from train.prepare_data import PrepareConfig, prepare
from train.resume import ResumeError, arguments_to_go_on, check_resumable
from train.run_files import RunFileError, writing
from train.sample import generate
from train.schema import ConfigError
from train.sharding import cuts_vocabulary, make_mesh
from train.step import TrainState, initialise_state, make_trainer
from train.stopping import Stopper
from train.terminal import drop_unprinted, show, show_error

EXIT_FINISHED = 0
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_CHECKPOINT = 4
EXIT_WORKER = 5

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        drop_unprinted()


def _main(arguments: Sequence[str]) -> int:
    try:
        config = parse_command_line(arguments)
        return run(config)
    except (ConfigError, DataError, ResumeError, DirectoryInUseError) as error:
        show_error(f"error: {error}")
        return EXIT_BAD_INPUT
    except TrainingDiverged as error:
        show_error(f"error: {error}")
        return EXIT_DIVERGED
    except (CheckpointError, NoSoundCheckpointError, RunFileError) as error:
        show_error(f"error: {error}")
        return EXIT_CHECKPOINT
    except DataWorkerDied as error:
        show_error(f"error: {error}")
        return EXIT_WORKER
    except StopRequested as stop:
        if jax.process_index() == 0:
            options = arguments_to_go_on(arguments, config.resume)
            command = [sys.orig_argv[0], "-m", "train.pretrain", *options]
            show(f"{stop}\nTo go on: {shlex.join(command)}")
        return EXIT_RESUMABLE


def run(
    config: PretrainConfig,
    *,
    before_step: Callable[[int, TrainState], TrainState] | None = None,
) -> int:
    """Train as configured, from the beginning or from the newest checkpoint.

    Args:
        config: The run.
        before_step: See ``train.loop.Loop``; for tests.

    Returns:
        0: the last step is reached.

    Raises:
        StopRequested: Stopped early, and saved.
        TrainingDiverged: Loss or gradient norm is not finite.
        ConfigError, DataError, ResumeError: Configuration, data or checkpoint do not fit.
        DirectoryInUseError: Another process trains in the run's folder.
        CheckpointError: A checkpoint could not be written or read.
        RunFileError: Another file of the run could not be written; what was trained is saved.
        DataWorkerDied: A worker process that reads the data has ended; what was trained is saved.
        NoSoundCheckpointError: There are checkpoints, all damaged.
    """
    if config.compilation_cache is not None:
        use_compilation_cache(config.compilation_cache)
    try:
        initialise_distributed()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print_once(config.to_yaml())
    for line in config.warnings():
        print_once(f"warning: {line}")
    with Stopper() as stopper:
        check_agreement(shared_values(config.to_dict()))
        mesh = make_mesh(config)
        train_split, validation_split = open_data(config, stopper)
        check_agreement({f"data {key}": v for key, v in train_split.identity().items()})
        if config.resume == "never":
            set_earlier_run_aside(config)
        with CheckpointStore(checkpoint_directory(config), config.checkpoint, print_once) as store:
            metadata = CheckpointMetadata(
                config=config.to_dict(),
                data=train_split.identity() | {"batch_size": config.batch_size},
                tokenizer=train_split.tokenizer.to_json(),
            )
            start = find_checkpoint(config, store, metadata)
            if start is not None:
                if report_if_finished(config, start):
                    return EXIT_FINISHED
                if start > config.steps:
                    raise ResumeError(
                        f"steps={config.steps}: the run has taken {start} steps already, as its "
                        f"checkpoint {store.directory / str(start)} says"
                    )
            trainer = make_trainer(config, mesh)
            if not cuts_vocabulary(mesh, config.model.vocab_size):
                print_once(
                    f"model.vocab_size={config.model.vocab_size} is not divisible by mesh.tensor="
                    f"{mesh.shape['tensor']}: embedding and readout are whole on each of them"
                )
            with RunLog(config, mesh, train_split.segment_lengths(), start_step=start or 0) as log:
                save_config(config)
                loop = Loop(
                    trainer=trainer,
                    train_split=train_split,
                    validation_split=validation_split,
                    store=store,
                    metadata=metadata,
                    log=log,
                    stopper=stopper,
                    before_step=before_step,
                )
                loop.measure_baselines()
                loop.compile()
                if start is None:
                    state = initialise_state(trainer)
                else:
                    state, _ = store.restore(start, trainer.abstract_state)
                    log.print(f"resumed after step {start} from {store.directory / str(start)}")
                state, validation = loop.run(state)
                finish(loop, state, validation)
    return EXIT_FINISHED


def open_data(config: PretrainConfig, stopper: Stopper) -> tuple[Split, Split]:
    """The training and validation splits, prepared first if the configuration says from what.

    Raises:
        DataError: The data is not there, is damaged or does not fit the model.
        StopRequested: Told to stop while it was prepared, as the only process; several agree on
            the first step instead.
    """
    data = config.data

    def check() -> None:
        if stopper.requested and jax.process_count() == 1:
            raise StopRequested("stopped while preparing the data, of which nothing is kept")

    if data.input:
        settings = PrepareConfig(
            input=data.input,
            output=data.directory,
            tokenizer=data.tokenizer,
            text_key=data.text_key,
            validation_fraction=data.validation_fraction,
            max_bytes=data.max_bytes,
        )
        first = jax.process_index() == 0
        prepare(settings, progress=first, log=show if first else lambda line: None, check=check)
    splits = [
        open_split(data.directory, name, context=config.context, seed=config.seed)
        for name in ("train", "validation")
    ]
    for split in splits:
        split.check_vocabulary(config.model.vocab_size)
        print_once(f"data: {split.summary()}")
    return splits[0], splits[1]


def print_once(line: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        show(line)


def checkpoint_directory(config: PretrainConfig) -> Path:
    """Folder of the run's checkpoints."""
    return config.directory / CHECKPOINTS_DIRECTORY


def set_earlier_run_aside(config: PretrainConfig) -> None:
    """Move the folder of an earlier run of this name out of the way.

    Raises:
        DirectoryInUseError: That run is still going on.
        RunFileError: It cannot be moved.
    """
    if jax.process_index() == 0:
        checkpoints = checkpoint_directory(config)
        if checkpoints.is_dir():
            os.close(lock_directory(checkpoints))
        with writing(config.directory):
            aside = retire(config.directory)
        if aside is not None:
            show(f"the earlier run of this name is now in {aside}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("earlier run set aside")


def find_checkpoint(
    config: PretrainConfig, store: CheckpointStore, metadata: CheckpointMetadata
) -> int | None:
    """The step to go on from, or None to begin; says what has changed since.

    Raises:
        ResumeError: The checkpoint is of another model or other data, or there must be one and is
            not.
        NoSoundCheckpointError: There are checkpoints, all damaged.
    """
    step = store.prepare()
    if step is None:
        if config.resume == "must":
            raise ResumeError(f"resume=must: {store.directory} holds no checkpoint")
        return None
    saved = store.read_metadata(step)
    changes = check_resumable(saved.config, metadata.config, saved.data, metadata.data)
    for line in changes:
        print_once(f"changed since step {step}: {line}")
    return step


def report_if_finished(config: PretrainConfig, step: int) -> bool:
    """Show the result of a run that has reached its last step and told so; else return False."""
    file = config.directory / RESULT_FILE
    if step < config.steps or not file.is_file():
        return False
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["step"] != step:
            return False
        described = describe_result(result)
    except (ValueError, KeyError, TypeError) as error:
        print_once(f"{file} is damaged ({error}): the result is made again")
        return False
    print_once(f"{config.name} has finished: {step} of {config.steps} steps are done.")
    print_once(described)
    print_once(
        "To train longer give more --steps; to start another run give another --name, or "
        "--resume never, which sets this one aside."
    )
    return True


def save_config(config: PretrainConfig) -> None:
    """Write the resolved configuration, which can be given back as ``--config``.

    Raises:
        RunFileError: It cannot be written.
    """
    if jax.process_index() == 0:
        file = config.directory / CONFIG_FILE
        with writing(file):
            file.write_text(config.to_yaml(), encoding="utf-8")


def finish(loop: Loop, state: TrainState, validation: ValidationResult) -> None:
    """Generate the sample, draw the pictures, and report, once the last checkpoint is complete.

    Raises:
        StopRequested: Told to stop before that; the same command does it then.
        CheckpointError: The last checkpoint could not be written.
        RunFileError: The log or the result could not be written; the checkpoint is complete.
    """
    config, log = loop.trainer.config, loop.log
    step = int(state.step)
    sample = None
    if config.sample.num_tokens:
        sample = generate(
            loop.trainer,
            state.params,
            loop.train_split.tokenizer,
            should_stop=lambda: loop.stopper.should_stop(step),
        )
    loop.store.wait()
    if config.sample.num_tokens and sample is None:
        raise StopRequested(f"stopped after the last step, {step}, without the sample")
    log.close()
    if log.failure is not None:
        raise log.failure
    if jax.process_index() != 0:
        return
    baselines = loop.baselines._asdict() if loop.baselines else None
    result = {
        "step": step,
        "validation": validation._asdict(),
        "baselines": baselines,
        "sample": sample,
        "checkpoint": str(loop.store.directory / str(step)),
        "pictures": [str(path) for path in draw_pictures(config)],
    }
    file = config.directory / RESULT_FILE
    # Replaced as a whole: a run that is killed here finishes when it is started again.
    temporary = file.with_suffix(".tmp")
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    with writing(file):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    show(describe_result(result))


def draw_pictures(config: PretrainConfig) -> list[Path]:
    """Draw the run's pictures, without which a run is complete: an error in writing is a line."""
    try:
        return plot_run(config.directory)
    except RunFileError as error:
        print_once(f"WARNING: the pictures cannot be drawn: {error}")
        return []


def describe_result(result: dict[str, Any]) -> str:
    """A finished run for people, from its ``result.json``."""
    validation, baselines = result["validation"], result["baselines"]
    lines = []
    if result["sample"] is not None:
        lines += ["sample:", *(f"    {line}" for line in result["sample"].splitlines()), ""]
    lines.append("bits per byte on the validation split:")
    if baselines is not None:
        lines.append(f"    unigram  {baselines['unigram_bits_per_byte']:.3f}")
        lines.append(f"    bigram   {baselines['bigram_bits_per_byte']:.3f}")
    lines.append(f"    model    {validation['bits_per_byte']:.3f}")
    lines.append(
        f"validation loss {validation['loss']:.4f}, perplexity {validation['perplexity']:.2f}"
    )
    lines += [f"picture: {path}" for path in result["pictures"]]
    lines.append(f"checkpoint: {result['checkpoint']}  (nha_jax.models.load reads it)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
