"""Turn errors that end a run into messages for the user: what happened, and the command that continues the run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_macl import distributed
from nnunetv2_macl.data import reset_sigchld_handler, too_little_shared_memory, worker_was_killed
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import CannotWriteError, is_permission_or_space_error, write_error
from nnunetv2_macl.planning.plan import has_current_plan, plan_file
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.commands import command_as_typed, command_to_pretrain
from nnunetv2_macl.training.out_of_memory import is_out_of_memory, out_of_memory_advice
from nnunetv2_macl.training.run_folder import PLAN_COPY

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain

_COMPILER = ("torch._dynamo", "torch._inductor", "triton")


def exit_on_user_error(method: Callable) -> Callable:
    """Turn a UserError of a trainer's method into an exit with code 1 that shows only the message.

    nnU-Net's commands would print a traceback. A run that has written nothing except its log leaves no folder behind.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except UserError as error:
            self.print_to_log_file(f"Error: {error}", also_print_to_console=False)
            _remove_empty_folders(Path(self.output_folder), Path(self.log_file))
            raise SystemExit(f"\nError: {error}") from error

    return wrapped


def _remove_empty_folders(folder: Path, log: Path) -> None:
    # Another rank may be removing them too.
    with contextlib.suppress(OSError):
        if any(path != log and not path.name.startswith(".") for path in folder.iterdir()):
            return
        log.unlink(missing_ok=True)
        # These are the folders of fold, trainer and data set. A folder that is not empty stays.
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()


@contextlib.contextmanager
def exit_on_refused_write(trainer: nnUNetTrainerMACLPretrain) -> Iterator[None]:
    """Exit with code 1 and the name of the file if nnU-Net's constructor cannot write, because there is no log file yet."""
    try:
        yield
    except OSError as error:
        if not is_permission_or_space_error(error):
            raise
        message = write_error(error, Path(error.filename or trainer.output_folder))
        raise SystemExit(f"\nError: {message}") from message


@contextlib.contextmanager
def explain_run_errors(trainer: nnUNetTrainerMACLPretrain) -> Iterator[None]:
    """Turn errors outside of a training step into a UserError with the command that continues the run.

    Raises:
        UserError: A file could not be written, or a data worker was killed.
    """
    try:
        yield
    except (CannotWriteError, OSError) as error:
        message: Exception = error
        if isinstance(error, OSError):  # nnU-Net writes files too
            if not is_permission_or_space_error(error):
                raise
            message = write_error(error, Path(error.filename or trainer.output_folder))
        continues = resume.has_checkpoint(Path(trainer.output_folder))
        advice = f" To continue after that, type:\n    {trainer.command_to_go_on()}" if continues else ""
        raise UserError(f"{message}{advice}") from error
    except RuntimeError as error:
        if not worker_was_killed(error):
            raise
        reset_sigchld_handler()
        if "Bus error" in str(error):  # a process gets this signal when it writes beyond the end of shared memory
            raise UserError(f"A data worker was killed. {too_little_shared_memory(trainer.batch_bytes)}") from error
        raise UserError(
            f"A data worker was killed, most likely because memory ran out ({str(error).splitlines()[0]}). To continue with "
            f"fewer workers, type: nnUNet_n_proc_DA=2 {trainer.command_to_go_on()}"
        ) from error


@contextlib.contextmanager
def explain_step_errors(trainer: nnUNetTrainerMACLPretrain) -> Iterator[None]:
    """Turn errors of a training step into a UserError with the command that avoids the error.

    Raises:
        UserError: torch.compile does not work here, or the memory is too small.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(_COMPILER):  # not an error of the compiled code
            typed = command_as_typed(trainer.macl_configuration, trainer.fold, trainer.device.type)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
            raise UserError(
                f"torch.compile, which nnU-Net uses on GPUs, does not work here: {reason}. It needs a C compiler, Python's "
                "headers (python3-dev) and a GPU of compute capability 7.0 or newer. Install them, or train without "
                f"torch.compile, which gives the same result. Type:\n    nnUNet_compile=f {typed}"
            ) from error
        if not is_out_of_memory(error):
            raise
        folder = Path(trainer.output_folder)
        advice = out_of_memory_advice(
            trainer.macl_plan,
            trainer.device.type,
            not trainer.disable_checkpointing and resume.has_checkpoint(folder),
            distributed.world_size(),
            folder,
            in_parts=not trainer.step.model.network.mixes_samples,
        )
        raise UserError(advice + _plan_edit_hint(trainer)) from error


def refuse_pretrained_weights(trainer: nnUNetTrainerMACLPretrain) -> None:
    """Refuse ``-pretrained_weights`` of nnU-Net's own command, which expects weights of a whole segmentation network.

    Raises:
        UserError: The command line has ``-pretrained_weights``, and is not our command. The message names our command.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-pretrained_weights")
    weights = parser.parse_known_args(sys.argv[1:])[0].pretrained_weights
    if weights is not None and not has_current_plan():
        raise UserError(
            f"nnU-Net's command cannot start a pre-training from weights. Type:\n"
            f"    {command_to_pretrain(trainer.macl_configuration, trainer.fold, trainer.device.type)} "
            f"-pretrained_weights {shlex.quote(weights)}"
        )


def _plan_edit_hint(trainer: nnUNetTrainerMACLPretrain) -> str:
    """Return a hint for users of nnU-Net's own command, which reads these settings only from the plan file."""
    next_to_nnunets, of_the_run = plan_file(trainer.macl_configuration), Path(trainer.output_folder) / PLAN_COPY
    if has_current_plan() or not next_to_nnunets.is_file():
        return ""
    hint = (
        f" nnU-Net's own command has no such options. Set patches_at_once or batch_size in {next_to_nnunets}, and repeat the "
        "command."
    )
    if of_the_run.is_file():
        hint += f" To continue (--c), set patches_at_once in {of_the_run}."
    return hint
