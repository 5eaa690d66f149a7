"""Output: any name can be shown, and a script that cannot work gets an explanation."""

import errno
import io
import locale
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nnunetv2_macl.cli.messages import run
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.messages import for_log_file, progress_bar, show_any_character
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL

# A character that no code page of Windows has, and a name that is not in UTF-8.
NAMES = ("\u03a9", os.fsdecode(b"M\xfcller"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_name_that_the_output_cannot_show_ends_nothing(monkeypatch, name, encoding):
    # Keep the message from pytest, because its workers cannot exchange names that are not in UTF-8.
    monkeypatch.setattr(logging.getLogger("nnunetv2_macl"), "propagate", False)
    streams = {}
    for stream in ("stdout", "stderr"):
        streams[stream] = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(streams[stream], encoding=encoding))
    run(lambda: logging.getLogger("nnunetv2_macl").warning("Left out: %s_0000.nii.gz", name))
    print(name, file=sys.stderr, flush=True)
    assert b"_0000.nii.gz" in streams["stdout"].getvalue() and streams["stderr"].getvalue()


def test_output_that_is_no_text_stream_is_not_changed(monkeypatch):
    """Notebooks have another kind of stream, and some programs have none."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show_any_character()


def test_the_log_file_holds_any_name(target, monkeypatch):
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "cp1252")
    assert for_log_file("M\u00fcller \u03a9") == "M\u00fcller \\u03a9"
    plans = target.plans_manager.plans | {"continue_training": False}
    trainer = nnUNetTrainerMACL(plans, "2d", 0, target.dataset_json, torch.device("cpu"))
    trainer.print_to_log_file(*NAMES)
    with open(trainer.log_file, encoding="cp1252") as log:
        assert "\\u03a9" in log.read()


def test_a_progress_bar_needs_no_console(monkeypatch):
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar(range(3), unit="case")) == [0, 1, 2]
        assert not (stream and stream.getvalue())


@pytest.mark.parametrize(
    ("script", "good"),
    [
        ("pretrain()", False),
        ("import logging\nlogging.getLogger(__name__)\npretrain()", False),
        ('if __name__ == "__main__":\n    pretrain()', True),
        ('if "__main__" == __name__:\n    pretrain()', True),
        ('def main(): pass\n__name__ == "__main__" and main()', True),
        ('main() if __name__ == "__main__" else None', True),
        ("\x00 not Python", True),
    ],
)
def test_a_script_that_would_run_again_in_each_process_is_refused(tmp_path, monkeypatch, script, good):
    file = tmp_path / "my_script.py"
    file.write_text(script)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(file), __spec__=None))
    if good:
        require_main_guard()
        return
    with pytest.raises(UserError, match=r'my_script\.py would run again .* if __name__ == "__main__":$'):
        require_main_guard()


GUARDED = 'if __name__ == "__main__":\n    print("{}")\n'


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize(
    ("script", "good"),
    [
        ("{call}", False),
        (GUARDED.format("a guard elsewhere") + "{call}", False),
        ("{call}\n" + GUARDED.format("a guard below"), False),
        (GUARDED.format("a guard around the call") + "    {call}", True),
        ('def main():\n    {call}\n__name__ == "__main__" and main()', True),
        (
            "import threading\n" + GUARDED.format("a thread") + "    threading.Thread(target=lambda: {call}).start()",
            True,
        ),
    ],
)
def test_the_call_itself_must_be_below_the_guard(tmp_path, script, good, as_module):
    call = "__import__('nnunetv2_macl.main_guard').main_guard.require_main_guard()"
    (tmp_path / "my_script.py").write_text(script.format(call=call))
    command = [sys.executable, *(["-m", "my_script"] if as_module else ["my_script.py"])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (process.returncode == 0) == good, process.stderr
    assert good or "my_script.py would run again in each" in process.stderr


def test_consoles_and_modules_need_no_guard(monkeypatch):
    for main in (SimpleNamespace(), SimpleNamespace(__file__="/nowhere/console.exe/__main__.py", __spec__=None)):
        monkeypatch.setitem(sys.modules, "__main__", main)
        require_main_guard()
    code = "from nnunetv2_macl.main_guard import require_main_guard; require_main_guard()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_script_from_standard_input_can_start_processes():
    code = """if True:
        import multiprocessing, os
        from concurrent.futures import ProcessPoolExecutor
        from nnunetv2_macl.main_guard import require_main_guard
        require_main_guard()
        print(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")).submit(os.getpid).result())
    """
    process = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip().isdecimal(), process.stderr


needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")


def prints(text, *, flush):
    return lambda: print(text, flush=flush)


def prints_and_fails():
    print("begun")
    raise UserError("the user's mistake")


@needs_full_device
@pytest.mark.parametrize(
    "action, reason",
    [
        (prints("a line", flush=True), "No space left on device"),
        (prints("a line", flush=False), "No space left on device"),
        (prints("x" * 100_000, flush=False), "No space left on device"),
        (prints_and_fails, "the user's mistake"),
    ],
    ids=["at once", "at the end", "when the buffer is full", "after another mistake"],
)
def test_a_full_output_is_explained(monkeypatch, action, reason):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run(action)
    assert end.value.code.startswith("\nError: ") and reason in end.value.code


def test_a_closed_pipe_is_explained(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match="Broken pipe"):
            run(prints("a line", flush=False))


def test_a_full_disk_elsewhere_is_not_reported_as_full_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    def fails():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        run(fails)


@needs_full_device
def test_a_command_ends_with_one_sentence_where_its_output_is_full():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", "from nnunetv2_macl.cli.doctor import trainers_entry; trainers_entry()"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("Error: ")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_ctrl_c_ends_a_command_by_the_signal_so_that_a_loop_of_a_shell_ends_too():
    code = "import sys; from nnunetv2_macl.cli.messages import run; run(lambda: sys.exit(130))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGINT and not process.stderr
